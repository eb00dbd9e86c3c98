"""The Typer app: registers the commands, and is the only place that turns an error into an exit code.

Exit codes: 0 done, 2 a wrong option, 3 a missing artifact, 4 a corrupt one, 5 a worker died, 6 some jobs failed,
130 interrupted.
"""

from __future__ import annotations

import json
import sys

import typer

from wanfast import __version__
from wanfast.commands.generate import generate
from wanfast.runtime.errors import JobsFailedError, WanFastError, failure

app = typer.Typer(
    name="wanfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate)


@app.callback(invoke_without_command=True)
def wanfast(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Wan2.2-I2V-A14B, fast and exact: an image and a prompt to a video."""
    if version:
        print(f"wanfast {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line (that of the process by default) and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="wanfast")
    except WanFastError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments and not isinstance(error, JobsFailedError):  # those printed their document
            print(json.dumps(failure(error), ensure_ascii=False))
        sys.exit(error.exit_code)
