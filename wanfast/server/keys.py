"""Reads API keys from a file, and finds the owner of a request. Only hashes of the keys are held in memory."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from wanfast.runtime.errors import ConfigError, foreign

_LEAST_LETTERS = 16
_SCHEME = "bearer "
EVERYBODY = "everybody"  # the owner of all jobs of a server without keys


@dataclass(frozen=True)
class Keys:
    """This class holds the hashes of all API keys, and says which client owns the jobs of a request.

    The owner is the client whose key the request contains. A server without keys treats all requests as requests of one
    client.
    """

    hashes: tuple[bytes, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Keys:
        """Reads a key from each line; blank lines and lines that begin with # are left out. Raises ConfigError."""
        subject = f"--api-key-file {file}"
        with foreign(subject, "give a UTF-8 text file with one key on each line"):
            lines = file.read_text(encoding="utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError(f"{subject}: has no key: write one key on each line")
        for number, key in enumerate(keys, start=1):
            if len(key) < _LEAST_LETTERS or not key.isascii() or not key.isprintable() or " " in key:
                fix = f"use at least {_LEAST_LETTERS} letters and digits, such as `openssl rand -hex 16` prints"
                raise ConfigError(
                    f"{subject}: key {number} is too short, or has characters that are not allowed: {fix}"
                )
        return cls(tuple(map(_hash, keys)))

    def owner(self, authorization: str | None) -> str | None:
        """Returns the owner whose key is in the header `Authorization: Bearer KEY`; None if the key is not known.

        An owner's name is the hash of the key. A server without keys returns EVERYBODY. The response time reveals
        nothing about the keys, because the hash is always compared with the hashes of all keys.
        """
        if not self.hashes:
            return EVERYBODY
        header = authorization or ""
        key = header[len(_SCHEME) :].strip() if header[: len(_SCHEME)].lower() == _SCHEME else ""
        given = _hash(key)
        found = [hmac.compare_digest(given, known) for known in self.hashes]
        return given.hex() if any(found) else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
