"""Lets a program of the user replace a prompt by a longer prompt.

The program gets the prompt on stdin, as UTF-8, and the path of the image in the environment variable WANFAST_IMAGE. The
program must print the new prompt on stdout. No shell is used to start the program. This module does not import torch.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media.tokenizer import clean_prompt

IMAGE = "WANFAST_IMAGE"
TIMEOUT_S = 300
MOST_CHARACTERS = 5000  # the model reads 512 tokens
_MOST_BYTES = 1 << 20  # of stdout; a program that prints more is ended
_ERRORS_BYTES = 1 << 16  # of stderr, from its end
_GRACE_S = 1.0  # for a process that writes the program's stdout after the program's end, such as one of a pipeline
_LOOK_S = 0.05  # between two looks whether the program has ended
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f]")


def extended(command: str, prompt: str, image: str | None) -> str:
    """Returns the new prompt that the user's `command` prints for a prompt and an image.

    `image`: the path of the image, or None.

    Raises ConfigError if the program fails, needs more than TIMEOUT_S seconds, or prints anything except one line of
    UTF-8 text with at most MOST_CHARACTERS characters, none of which is a control character.
    """
    words = shlex.split(command)
    subject = f"--extend-prompt {words[0]}"
    environment = {name: value for name, value in os.environ.items() if name != IMAGE}
    environment |= {IMAGE: image} if image else {}
    try:
        done = _run(words, prompt.encode(), environment)
    except OSError as error:
        raise ConfigError(
            f"{subject}: cannot be started ({error.strerror}): give the path of a program that you can run"
        ) from None
    if done.is_late:
        raise ConfigError(f"{subject}: did not end within {TIMEOUT_S} s: use a faster program, or drop --extend-prompt")
    if len(done.printed) > _MOST_BYTES:
        raise ConfigError(f"{subject}: its output does not stop: print only the new prompt, on one line")
    if done.code:
        *_, last = ["nothing on stderr", *done.errors.decode(errors="replace").strip().splitlines()]
        raise ConfigError(
            f"{subject}: ended with code {done.code} ({last.strip():.100}): correct the program, or drop "
            "--extend-prompt"
        )
    return _checked(done.printed, subject)


@dataclass(frozen=True)
class _Done:
    """This class holds what a program printed, and how it ended."""

    printed: bytes
    errors: bytes  # the end of its stderr
    code: int
    is_late: bool


def _run(words: list[str], text: bytes, environment: dict[str, str]) -> _Done:
    """Runs a program with `text` on its stdin.

    At the end, nothing of the program's session is left. A process that the program started in a session of its own,
    such as a server, goes on; such a process may hold the program's stdout, so the end of stdout is no end.
    """
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        subprocess.Popen(words, env=environment, start_new_session=True, bufsize=0, **pipes) as process,
        _Pipes(process, text) as moved,
    ):
        try:
            late_s = time.monotonic() + TIMEOUT_S
            while (code := process.poll()) is None and not moved.is_too_much and time.monotonic() < late_s:
                moved.move(_LOOK_S)
            is_late = code is None and not moved.is_too_much
            grace_s = time.monotonic() + (0 if code is None else _GRACE_S)
            while moved.is_stdout_open and not moved.is_too_much and time.monotonic() < grace_s:
                moved.move(_LOOK_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        moved.move(0)  # what still lies in the pipes
        return _Done(moved.printed, moved.errors, code, is_late)


class _Pipes:
    """This class writes `text` to a program's stdin, and reads its stdout and stderr; nothing here blocks.

    `printed`: the bytes of stdout. `errors`: the last bytes of stderr.
    """

    def __init__(self, process: subprocess.Popen[bytes], text: bytes) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.printed = self.errors = b""
        self._text, self._stdout = text, process.stdout
        self._open = selectors.DefaultSelector()
        for stream, event, move in (
            (process.stdin, selectors.EVENT_WRITE, self._write), (process.stdout, selectors.EVENT_READ, self._print),
            (process.stderr, selectors.EVENT_READ, self._complain),
        ):  # fmt: skip
            os.set_blocking(stream.fileno(), False)
            self._open.register(stream, event, move)

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def is_stdout_open(self) -> bool:
        """Returns whether a process can still write to stdout."""
        return not self._stdout.closed

    @property
    def is_too_much(self) -> bool:
        return len(self.printed) > _MOST_BYTES

    def move(self, timeout_s: float) -> None:
        """Writes and reads what is possible now; if nothing is, waits for it, at most `timeout_s` seconds."""
        for key, _ in self._open.select(timeout_s):
            stream: Any = key.fileobj
            if not key.data(stream):
                self._open.unregister(stream)
                stream.close()

    def _write(self, stream: IO[bytes]) -> bool:
        with suppress(BrokenPipeError):  # the program need not read
            self._text = self._text[stream.write(self._text) :]
            return bool(self._text)
        return False

    def _print(self, stream: IO[bytes]) -> bool:
        more = stream.read(_MOST_BYTES + 1)
        self.printed += more
        return bool(more)

    def _complain(self, stream: IO[bytes]) -> bool:
        more = stream.read(_MOST_BYTES)
        self.errors = (self.errors + more)[-_ERRORS_BYTES:]
        return bool(more)


def _checked(printed: bytes, subject: str) -> str:
    """Returns the text that a program printed, if it is one prompt. Raises ConfigError."""
    try:
        text = printed.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{subject}: its output is not UTF-8: print the new prompt as UTF-8") from None
    if not clean_prompt(text):
        raise ConfigError(f"{subject}: printed nothing: print the new prompt on stdout")
    if control := _CONTROL.search(text):
        raise ConfigError(f"{subject}: printed the control character {control[0]!a}: print only text")
    if len(text.splitlines()) > 1:
        raise ConfigError(f"{subject}: printed {len(text.splitlines())} lines: print only the new prompt, on one line")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{subject}: printed {len(text)} characters: print at most {MOST_CHARACTERS}")
    return text
