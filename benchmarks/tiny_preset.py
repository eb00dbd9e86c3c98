"""Measures the curve of MagCache that ships for the tiny model, and writes wanfast/assets/magcache/tiny.json.

    python benchmarks/tiny_preset.py      # by `wanfast calibrate-magcache`; half a minute on two cores

A curve is valid only for the weights with which it was measured, so other weights need another curve. Artifacts are
written to a folder that is removed afterwards. The last line is the JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PRESET = Path(__file__).parents[1] / "wanfast/assets/magcache/tiny.json"
COMMAND = ("wanfast", "calibrate-magcache", "--model", "tiny", "--device", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PRESET)
    options = parser.parse_args()
    document = preset(measured())
    options.output.write_text(text_of(document))
    print(json.dumps(document))


def measured() -> dict[str, Any]:
    """Returns the JSON document that `wanfast calibrate-magcache` prints.

    The command runs with an empty folder of artifacts, so that it measures and takes no stored curve.
    """
    with tempfile.TemporaryDirectory() as artifacts:
        command = [sys.executable, "-m", *COMMAND, "--artifacts-dir", artifacts, "--json"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    document: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return document


def preset(curve: dict[str, Any]) -> dict[str, Any]:
    """Returns the document that ships: the ratios, and what they were measured with."""
    inputs = curve["inputs"]
    (guidance,) = set(inputs["guidance"].values())
    measured_with = f"{curve['clips']} clips, {inputs['precision']}, guidance {guidance:g}"
    return {
        "model": "tiny",
        **{name: inputs[name] for name in ("steps", "shift", "solver", "boundary")},
        "source": f"{' '.join(COMMAND)} ({measured_with}); of each step the ratio of the prompt's branch and of the "
        "negative prompt's",
        "experts": inputs["experts"],
        "ratios": [[round(ratio, 5) for ratio in pair] for pair in curve["ratios"]],
    }


def text_of(document: dict[str, Any]) -> str:
    """Returns the document as JSON with one line for each step."""
    *_, last = document
    ratios = ",\n".join(f"  {json.dumps(pair)}" for pair in document[last])
    head = json.dumps({name: value for name, value in document.items() if name != last}, indent=1)
    return f'{head[:-2]},\n "{last}": [\n{ratios}\n ]\n}}\n'


if __name__ == "__main__":
    main()
