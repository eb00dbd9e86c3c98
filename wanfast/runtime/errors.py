"""Errors that a user can fix. Each carries its exit code; its text is one line that names the option and the fix.

Only `cli.py` turns them into an exit code. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class WanFastError(Exception):
    """The root of all errors that are not bugs."""

    exit_code = 1
    is_agreed = False  # all ranks of a rank group raised it, so that they may go on together


class ConfigError(WanFastError):
    """An option, or the file that an option names, is wrong."""

    exit_code = 2


class MissingArtifactError(WanFastError):
    """Weights or another artifact are not there; the text holds the command that makes them."""

    exit_code = 3


class CorruptArtifactError(WanFastError):
    """A file is there but does not hold what it should: a missing, unexpected or misshapen tensor, a wrong hash."""

    exit_code = 4


class RankFailedError(WanFastError):
    """A worker process died; the text is the error of the first that failed."""

    exit_code = 5


class JobsFailedError(WanFastError):
    """Some lines of a `--jobs` file failed; the others were done."""

    exit_code = 6


class CancelledError(WanFastError):
    """A job was cancelled between two steps."""

    exit_code = 130
    is_agreed = True  # every rank asks the leader

    def __init__(self, message: str = "cancelled") -> None:
        super().__init__(message)


def failure(error: WanFastError) -> dict[str, Any]:
    """An error as a result document, the form in which it crosses to another process."""
    return {"error": str(error), "exit_code": error.exit_code}


def from_failure(document: dict[str, Any]) -> WanFastError:
    """The inverse of `failure`."""
    kinds = (ConfigError, MissingArtifactError, CorruptArtifactError, RankFailedError, CancelledError)
    message = document["error"]
    return next((kind(message) for kind in kinds if kind.exit_code == document["exit_code"]), WanFastError(message))
