"""`wanfast quantize`: the experts once through a recipe, kept for every later run."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from wanfast.commands import options
from wanfast.runtime.config import Device, Expert, Recipe
from wanfast.runtime.plan import default_device

_EXPERTS: dict[str, tuple[Expert, ...]] = {
    "both": ("high_noise", "low_noise"),
    "high": ("high_noise",),
    "low": ("low_noise",),
}


def quantize(
    recipe: Annotated[
        Recipe,
        typer.Option(help="int8-dynamic and fp8-rowwise also multiply in 8 bits; bf16 casts and quantizes nothing."),
    ],
    model: options.Model = "a14b",
    expert: Annotated[Literal["both", "high", "low"], typer.Option(help="Which of the two.")] = "both",
    device: Annotated[
        Device | None, typer.Option(help="Where the values are worked out.  [default: cuda where there is a driver]")
    ] = None,
    artifacts_dir: options.ArtifactsDir = "artifacts",
    json_: options.Json = False,
) -> None:
    """Quantize the experts and keep them: `generate --quantize` then loads a quarter of the bytes.

    Run again after a failure, it goes on with the expert that is missing.
    """
    from wanfast.runtime import quantize as worker  # torch begins here

    request = worker.Request(
        model=model,
        recipe=recipe,
        experts=_EXPERTS[expert],
        device=device or default_device(),
        artifacts_dir=artifacts_dir,
    )
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[Expert, TaskID] = {}

        def progress(expert: Expert, done: int, total: int) -> None:
            if expert not in tasks:
                tasks[expert] = bars.add_task(expert.replace("_", " "), total=total)
            bars.update(tasks[expert], completed=done)

        results = worker.run(request, progress)
    for line in worker.describe(results):
        console.print(line, markup=False)
    if json_:
        print(json.dumps({"results": results}))
