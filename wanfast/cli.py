"""This module is the Typer app: it registers the commands. No other module turns an error into an exit code.

Exit codes: 0 success, 2 wrong option, 3 missing artifact, 4 damaged artifact, 5 a rank died, 6 some jobs failed, 7 a
computed value is not finite, 130 interrupted, 143 terminated. Code 1 means a bug, and its traceback is printed.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from typing import Any

import typer

from wanfast import __version__
from wanfast.commands.bench import bench
from wanfast.commands.calibrate_attention import calibrate_attention
from wanfast.commands.calibrate_magcache import calibrate_magcache
from wanfast.commands.dispatch import VERBS
from wanfast.commands.doctor import doctor
from wanfast.commands.download import download
from wanfast.commands.generate import generate
from wanfast.commands.options import UsageError, one_line
from wanfast.commands.quantize import quantize
from wanfast.commands.serve import serve
from wanfast.commands.warmup import warmup
from wanfast.runtime.errors import JobsFailedError, WanFastError, failure
from wanfast.runtime.machine.launchers import refuse_launchers

app = typer.Typer(
    name="wanfast",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(generate)
app.command()(download)
app.command()(quantize)
app.command()(calibrate_magcache)
app.command()(calibrate_attention)
app.command()(warmup)
app.command()(bench)
app.command()(serve)
app.command()(doctor)

_MESSAGES = {
    130: "interrupted: no half-written file is left",
    143: "terminated: no half-written file is left",
}


@app.callback(invoke_without_command=True)
def wanfast(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Make a video from an image and a prompt, or from a prompt alone, with Wan2.2-A14B, fast and correctly."""
    if version:
        print(f"wanfast {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line (default: the process's own arguments), and ends the process with an exit code."""
    _open_missing_streams()
    arguments = [_as_utf8(argument) for argument in (sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    as_json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character still gets the rest
    stopped = _stopped_by_signals()
    try:
        if arguments[:1] and arguments[0] in VERBS and not any(word.startswith("--nnodes") for word in arguments):
            refuse_launchers("this command", f"type `{shlex.join(['wanfast', *arguments])}`", "--num-gpus ")
        sys.exit(_run(arguments, stopped))
    except WanFastError as error:
        print(f"error: {error}", file=sys.stderr)
        if not isinstance(error, JobsFailedError):  # the command has printed the document of failed jobs
            _last_line(as_json, failure(error))
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code in _MESSAGES:
            message = _MESSAGES[int(stop.code or 0)]
            print(f"error: {message}", file=sys.stderr)
            _last_line(as_json, {"error": message, "exit_code": stop.code})
        raise


def _stopped_by_signals() -> list[int]:
    """Lets SIGTERM and SIGINT end the process by an exception, so that every `finally` runs.

    Returns the exit codes of the signals that have come; the list grows when one comes.
    """
    codes: list[int] = []

    def stop(number: int, frame: object) -> None:
        codes.append(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(codes[-1])

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell's background command ignores it
        signal.signal(signal.SIGINT, stop)
    return codes


def _run(arguments: list[str], stopped: list[int]) -> int:
    """Runs a command line and returns its exit code; `stopped` holds the exit codes of signals that have come.

    Raises WanFastError, also for wrong usage.
    """
    try:
        return app(arguments, prog_name="wanfast", standalone_mode=False) or 0
    except Exception as error:
        if stopped:  # C code, such as torch's, may turn the exception of a signal into another one
            return stopped[0]
        if isinstance(error, UsageError):
            raise one_line(error, arguments) from None
        raise


def _open_missing_streams() -> None:
    """Opens the standard streams that the caller closed, so that no later file gets the descriptor of such a stream."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))


def _as_utf8(argument: str) -> str:
    """Returns an argument that the locale could not decode, if its bytes are UTF-8; else returns it unchanged."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def _last_line(as_json: bool, document: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(document))
