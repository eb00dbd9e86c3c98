"""Holds the options of the server itself. The module needs none of the packages of the extra `serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from wanfast.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """This class holds the options of `wanfast serve` that concern only the server, not its videos."""

    host: str
    port: int
    data_dir: Path
    database: str | None = None
    api_key_file: Path | None = None
    max_queue: int = 100
    max_upload_mb: int = 32
    keep_hours: float = 24.0
    max_clips: int | None = None  # as many as 12 seconds need, which are the longest that clients ask for

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.api_key_file is None:
            raise ConfigError(
                f"--host {self.host} lets other machines use the server: add --api-key-file FILE, or use "
                "--host 127.0.0.1"
            )
        if self.database is not None and not self.database.startswith("postgresql"):
            raise ConfigError(
                "--database is not postgresql://USER@HOST/NAME: fix the URL, or drop --database to use SQLite"
            )
        for name, value, low, high in (
            ("--port", self.port, 0, 65535), ("--max-queue", self.max_queue, 1, 1_000_000),
            ("--max-upload-mb", self.max_upload_mb, 1, 1000), ("--keep-hours", self.keep_hours, 0.001, 87600),
            ("--max-clips", 1 if self.max_clips is None else self.max_clips, 1, 100),
        ):  # fmt: skip
            if not low <= value <= high:
                raise ConfigError(f"{name} {value:.15g}: use {low:.15g} to {high:.15g}")

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data_dir / 'jobs.sqlite'}"


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address is a loopback address, which only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
