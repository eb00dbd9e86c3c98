"""Defines the errors that a user can fix.

Each error has an exit code, and its text is one line that names the option and the fix. Only `cli.py` turns an error
into an exit code. Any other exception that escapes is a bug and keeps its traceback. Users' files are read inside
`foreign`. This function turns every exception of a parser or of the file system into an error of this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}


class WanFastError(Exception):
    """This class is the base of all errors that are not bugs."""

    exit_code = 1
    is_agreed = False  # True if all ranks of a rank group raised the error, so that they may continue

    def __str__(self) -> str:
        """Returns the message on one line: control characters, which a file name may hold, are escaped."""
        return super().__str__().translate(_ESCAPES)


class ConfigError(WanFastError):
    """This error means that an option, or the file that an option names, is wrong."""

    exit_code = 2


class NeedsGpuError(ConfigError):
    """This error means that an option needs a GPU, and the device is a CPU."""


class JoiningMemoryError(ConfigError):
    """This error means that the host has too little memory to join clips."""

    need = ""  # the message without the option and the fix


class MissingArtifactError(WanFastError):
    """This error means that weights or another artifact are missing.

    The message names the command that makes the missing files.
    """

    exit_code = 3


class CorruptArtifactError(WanFastError):
    """This error means that a file has wrong content.

    Examples are a missing tensor, an unexpected tensor, a tensor of a wrong shape, and a wrong hash.
    """

    exit_code = 4


class RankFailedError(WanFastError):
    """This error means that a rank failed or was lost; if several failed, the message is about the first one."""

    exit_code = 5


class JobsFailedError(WanFastError):
    """This error means that some lines of a `--jobs` file failed; the other lines were completed."""

    exit_code = 6


class NotFiniteError(WanFastError):
    """This error means that a computed value is NaN or an infinity; the message says where the value was first seen."""

    exit_code = 7


class CancelledError(WanFastError):
    """This error means that a job was cancelled between two steps."""

    exit_code = 130
    is_agreed = True  # every rank asks the leader

    def __init__(self, message: str = "cancelled") -> None:
        super().__init__(message)


@contextmanager
def foreign(subject: str, fix: str, kind: type[WanFastError] = ConfigError) -> Iterator[None]:
    """Turns every exception that a parser or the file system raises about a user's file into one error of class `kind`.

    The error's message is one line, "SUBJECT: REASON: FIX"; `subject` names the option and the file. The `with` block
    must contain only the call of the parser or of the file system, so that our own bugs keep their traceback. A
    WanFastError passes through unchanged, and so does a request to stop (KeyboardInterrupt, SystemExit).
    """
    try:
        yield
    except (WanFastError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library derives from BaseException alone
        raise kind(f"{subject}: {reason(error)}: {fix}") from error


def reason(error: BaseException) -> str:
    """Returns the cause of an exception of a parser or of the file system: one line, of about 100 letters at most."""
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text"
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    return f"{words:.100}" if words else type(error).__name__


def failure(error: WanFastError) -> dict[str, Any]:
    """Returns an error as a document {"error", "exit_code"}, which can be sent to another process."""
    return {"error": str(error), "exit_code": error.exit_code}


def from_failure(document: dict[str, Any]) -> WanFastError:
    """Takes a document that `failure` returned, and returns the error that the document describes."""
    kinds = (ConfigError, MissingArtifactError, CorruptArtifactError, RankFailedError, NotFiniteError, CancelledError)
    message = document["error"]
    return next((kind(message) for kind in kinds if kind.exit_code == document["exit_code"]), WanFastError(message))
