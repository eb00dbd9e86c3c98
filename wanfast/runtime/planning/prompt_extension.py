"""Lets a program of the user replace a prompt by a longer prompt.

The program gets the prompt on stdin, as UTF-8, and the path of the image in the environment variable WANFAST_IMAGE. The
program must print the new prompt on stdout. No shell is used to start the program. This module does not import torch.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def extended(command: str, prompt: str, image: str | None) -> str:
    """Returns the new prompt that the user's `command` prints for a prompt and an image.

    `image`: the path of the image, or None.

    Raises ConfigError if the program fails, needs more than TIMEOUT_S seconds, or prints anything except one line of
    UTF-8 text with at most MOST_CHARACTERS characters.
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
    """Runs a program with `text` on its stdin. At the end, nothing that the program started is left."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    late = threading.Event()
    with (
        subprocess.Popen(words, env=environment, start_new_session=True, **pipes) as process,
        ThreadPoolExecutor(3) as threads,
    ):

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def end_late() -> None:
            late.set()
            end()

        timer = threading.Timer(TIMEOUT_S, end_late)
        timer.start()
        try:
            assert process.stdin and process.stdout and process.stderr
            threads.submit(_write, process.stdin, text)
            errors = threads.submit(_last, process.stderr)
            printed = threads.submit(_first, process.stdout, end).result()
            return _Done(printed, errors.result(), process.wait(), late.is_set())
        finally:
            timer.cancel()
            end()


def _write(stream: IO[bytes], text: bytes) -> None:
    with suppress(BrokenPipeError), stream:  # the program need not read
        stream.write(text)


def _first(stream: IO[bytes], end: Callable[[], None]) -> bytes:
    """Returns what a stream holds; calls `end` if it holds over _MOST_BYTES."""
    found = stream.read(_MOST_BYTES + 1)
    if len(found) > _MOST_BYTES:
        end()
    return found


def _last(stream: IO[bytes]) -> bytes:
    """Reads a stream to its end, and returns its last bytes."""
    found = b""
    while more := stream.read(_ERRORS_BYTES):
        found = (found + more)[-_ERRORS_BYTES:]
    return found


def _checked(printed: bytes, subject: str) -> str:
    """Returns the text that a program printed, if it is one prompt. Raises ConfigError."""
    try:
        text = printed.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{subject}: its output is not UTF-8: print the new prompt as UTF-8") from None
    if not clean_prompt(text):
        raise ConfigError(f"{subject}: printed nothing: print the new prompt on stdout")
    if len(text.splitlines()) > 1:
        raise ConfigError(f"{subject}: printed {len(text.splitlines())} lines: print only the new prompt, on one line")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{subject}: printed {len(text)} characters: print at most {MOST_CHARACTERS}")
    return text
