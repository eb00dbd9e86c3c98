"""Which versions of packages are installed, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """None if it is not installed as a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
