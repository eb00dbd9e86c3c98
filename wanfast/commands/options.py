"""Option types that commands share, and how typed options, files of options and defaults come together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from wanfast.runtime.config import Device, Precision

Model = Annotated[
    str,
    typer.Option(
        help="tiny (ships with the package), a14b (the published weights), or a folder in either public layout."
    ),
]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to run.  [default: cuda where there is a driver]")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the matrix products; all that is small stays fp32.")]
ArtifactsDir = Annotated[
    str, typer.Option(envvar="WANFAST_ARTIFACTS", help="Where weights, embeddings and runs are kept.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; needs no weights.")]


def given(context: typer.Context, names: set[str]) -> dict[str, Any]:
    """The options among `names` that the user gave, on the command line or by environment: defaults are left out."""
    return {
        name: value
        for name, value in context.params.items()
        if name in names and (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }
