from __future__ import annotations

import errno
import json

import pytest

from wanfast.runtime.errors import (
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    failure,
    foreign,
    from_failure,
)


class Panic(BaseException):
    """Stands for a panic of a library that is written in Rust."""


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "is not UTF-8 text"),
        (MemoryError(), "needs more memory than is available"),
        (RecursionError("maximum recursion\ndepth"), "maximum recursion depth"),
        (NotImplementedError(), "NotImplementedError"),
        (Panic("out of range"), "out of range"),
    ],
)
def test_whatever_is_raised_about_a_file_is_one_line(raised: BaseException, reason: str) -> None:
    with pytest.raises(CorruptArtifactError) as caught, foreign("w.json", "copy it again", CorruptArtifactError):
        raise raised
    assert str(caught.value) == f"w.json: {reason}: copy it again"


@pytest.mark.parametrize("passing", [KeyboardInterrupt(), SystemExit(3), MissingArtifactError("w.json is missing")])
def test_requests_to_stop_and_our_own_errors_pass(passing: BaseException) -> None:
    with pytest.raises(type(passing)) as caught, foreign("w.json", "copy it again"):
        raise passing
    assert caught.value is passing


def test_a_parsers_error_is_the_users() -> None:
    message = r"^--jobs a.jsonl: Expecting value: line 1 column 1 \(char 0\): fix it$"
    with pytest.raises(ConfigError, match=message), foreign("--jobs a.jsonl", "fix it"):
        json.loads("x")


def test_an_error_is_one_line_whatever_a_user_wrote() -> None:
    """A key of a JSON file, a path and a prompt may hold any character."""
    error = ConfigError("--model 'a\nb\r\x1b[31m\x85': no such folder; use tiny")
    assert str(error) == "--model 'a\\nb\\r\\x1b[31m\\x85': no such folder; use tiny"
    assert failure(error)["error"] == str(error) and str(from_failure(failure(error))) == str(error)
