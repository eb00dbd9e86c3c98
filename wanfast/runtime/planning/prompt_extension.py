"""Lets a program of the user write a longer prompt.

The program gets the prompt on stdin, as UTF-8, and the path of the image in the environment variable WANFAST_IMAGE. It
prints the new prompt. No shell runs it. This module does not import torch.
"""

from __future__ import annotations

import os
import shlex
import subprocess

from wanfast.runtime.errors import ConfigError
from wanfast.runtime.media.tokenizer import clean_prompt

IMAGE = "WANFAST_IMAGE"
TIMEOUT_S = 300
MOST_CHARACTERS = 5000  # the model reads 512 tokens


def extended(command: str, prompt: str, image: str | None) -> str:
    """Returns the prompt that `command` prints for a prompt and the path of its image. Raises ConfigError."""
    words = shlex.split(command)
    subject = f"--extend-prompt {words[0]}"
    environment = {name: value for name, value in os.environ.items() if name != IMAGE}
    environment |= {IMAGE: image} if image else {}
    try:
        done = subprocess.run(words, input=prompt.encode(), capture_output=True, timeout=TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{subject}: did not end within {TIMEOUT_S} s: use a faster program, or drop --extend-prompt"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{subject}: cannot be started ({error.strerror}): name a program that this user can run"
        ) from None
    if done.returncode:
        *_, last = ["nothing on stderr", *done.stderr.decode(errors="replace").strip().splitlines()]
        raise ConfigError(
            f"{subject}: ended with code {done.returncode} ({last.strip():.100}): correct the program, or drop "
            "--extend-prompt"
        )
    return _checked(done.stdout, subject)


def _checked(printed: bytes, subject: str) -> str:
    """Returns the text that a program printed, if it is one prompt. Raises ConfigError."""
    try:
        text = printed.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{subject}: printed what is not UTF-8 text: print the new prompt as UTF-8") from None
    if not clean_prompt(text):
        raise ConfigError(f"{subject}: printed nothing: print the new prompt on stdout")
    if len(text.splitlines()) > 1:
        raise ConfigError(f"{subject}: printed {len(text.splitlines())} lines: print only the new prompt, on one line")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{subject}: printed {len(text)} characters: print at most {MOST_CHARACTERS}")
    return text
