"""Tests that a result names the commit that made it."""

import subprocess
from pathlib import Path

import pytest

import wanfast
from wanfast.runtime.machine import packages


def test_the_commit_is_head_and_says_whether_the_tree_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(packages, "_ROOT", tmp_path)
    monkeypatch.delenv("WANFAST_COMMIT", raising=False)
    packages.commit.cache_clear()
    git("init")
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (tmp_path / "code.py").write_text("1\n")
    (results / "a.json").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    (results / "a.json").write_text("2\n")
    (tmp_path / "untracked").write_text("")
    assert packages.commit() == head
    (tmp_path / "code.py").write_text("2\n")
    packages.commit.cache_clear()
    assert packages.commit() == f"{head}-dirty"


def test_without_a_repository_the_environment_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_ROOT", tmp_path)
    monkeypatch.delenv("WANFAST_COMMIT", raising=False)
    packages.commit.cache_clear()
    assert packages.commit() is None
    monkeypatch.setenv("WANFAST_COMMIT", "abc1234")
    packages.commit.cache_clear()
    assert packages.commit() == "abc1234"
    packages.commit.cache_clear()


def test_the_version_is_that_of_the_code_that_runs() -> None:
    """An installed package's metadata may be older than a checkout, or missing."""
    assert packages.versions()["wanfast"] == wanfast.__version__
