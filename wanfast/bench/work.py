"""Runs the work of `wanfast bench` that needs torch, in the separate process that `apart` starts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanfast.bench import compare
from wanfast.bench.model_folder import write_model
from wanfast.runtime.config import QuantizeConfig
from wanfast.runtime.errors import WanFastError, failure
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.jobs import quantize
from wanfast.runtime.machine.signals import end_with_parent
from wanfast.runtime.store.sharing import locked


def random_model(folder: str, facts: dict[str, Any]) -> None:
    """Writes a model with these `facts` and random weights into a new folder, completely or not at all.

    If the folder exists already, nothing is written.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with locked(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            shutil.rmtree(partial, ignore_errors=True)
            write_model(partial, ModelSpec.from_json(facts), is_random=True)
            partial.replace(target)


WORKS: dict[str, Callable[..., Any]] = {
    "quantize": lambda **options: quantize.run(QuantizeConfig(**options)),
    "random_model": random_model,
    "compare": compare.compared,
}


def main(name: str, file: Path) -> None:
    """Runs one function in `WORKS`, and writes its result, or its error, over the arguments in `file`.

    `name`: the function's key in `WORKS`, such as "compare". `file`: a JSON object of keyword arguments. Afterwards,
    this file holds {"result"}, or {"error", "exit_code"} if the function raised WanFastError.
    """
    end_with_parent()
    arguments = json.loads(file.read_text(encoding="utf-8"))
    try:
        document = {"result": WORKS[name](**arguments)}
    except WanFastError as error:
        document = failure(error)
    file.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
