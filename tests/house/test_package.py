"""Tests the version, and that an installed wheel works outside of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from wanfast import __version__

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WANFAST_ARTIFACTS")}


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] == __version__


def run(*words: str | Path, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(map(str, words), cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=timeout)


def wheel(folder: Path) -> Path:
    """Builds the wheel from a copy of what it needs, so that no build folder is left in the repository."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "wanfast", source / "wanfast", ignore=shutil.ignore_patterns("__pycache__"))
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source)
    built = run(*command, cwd=folder)
    if built.returncode:  # without a network, this environment's setuptools builds it
        built = run(*command, "--no-build-isolation", cwd=folder)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def environment(folder: Path, package: Path) -> Path:
    """Installs the wheel in a new environment and returns its folder of programs.

    Its dependencies are fetched. Without a network they are this environment's.
    """
    venv.create(folder)
    python = folder / "bin/python"
    command = (sys.executable, "-m", "pip", "--python", python, "install", package)
    if run(*command, "-c", ROOT / "constraints/pins.txt", cwd=folder).returncode:
        assert run(*command, "--no-deps", cwd=folder).returncode == 0
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_an_installed_wheel_makes_a_video(tmp_path: Path) -> None:
    package = wheel(tmp_path)
    shipped = {str(file.relative_to(ROOT)) for file in (ROOT / "wanfast").rglob("*") if file.is_file()}
    assert {name for name in shipped if "__pycache__" not in name} <= set(zipfile.ZipFile(package).namelist())
    programs = environment(tmp_path / "env", package)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    assert run(programs / "wanfast", "--version", cwd=elsewhere).stdout == f"wanfast {__version__}\n"
    assert "fastest-original" in run(programs / "wanfast", "generate", "--help", cwd=elsewhere).stdout
    doctor = run(programs / "wanfast", "doctor", "--model", "tiny", "--json", cwd=elsewhere)
    weights = Path(json.loads(doctor.stdout.splitlines()[-1])["weights"]["folder"])
    assert weights.is_relative_to(tmp_path / "env")

    words = ("--prompt", "The big orange star goes right.", "--steps", "2", "--frames", "5", "--output", "star.mp4")
    image = weights.parent / "examples/star.png"
    made = run(
        programs / "wanfast", "generate", "--model", "tiny", "--device", "cpu", "--image", image, *words, cwd=elsewhere
    )
    assert made.returncode == 0, made.stderr
    assert (elsewhere / "star.mp4").stat().st_size > 1000
    assert json.loads((elsewhere / "star.json").read_text())["versions"]["wanfast"] == __version__
