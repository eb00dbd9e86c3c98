"""Tests which pictures of a package count as free, and that the split is by picture."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from training import photographs

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020 Somebody
License: GPL-3+

Files: images/land/*
Copyright: Various
License: public-domain
 Taken from morguefile.com, a collection.

Files: images/land/sea*
 images/land/sky?.jpg
Copyright: NASA
License: public-domain
 From NASA.

Files: images/land/sea7*
Copyright: Somebody
License: CC-BY-SA-4.0

Files: images/land/fog*
Copyright: Somebody
License: CC-BY-4.0
"""


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("images/land/sea1.jpg", ("public-domain", "NASA")),
        ("images/land/sky2.jpg", ("public-domain", "NASA")),
        ("images/land/fog0.jpg", ("CC-BY-4.0", "Somebody")),
        ("images/land/sea7.jpg", None),  # share-alike, and the last paragraph counts
        ("images/land/city1.jpg", None),  # a site whose licence is its own
        ("images/ship/a.jpg", None),  # GPL
    ],
)
def test_only_free_pictures_count(name: str, licence: tuple[str, str] | None) -> None:
    assert photographs.free_licence(name, list(photographs.licences(COPYRIGHT))) == licence


def test_the_split_is_by_picture_and_keeps_the_examples_out_of_training() -> None:
    manifest = json.loads(photographs.MANIFEST.read_text())
    names = [entry["name"] for entry in manifest]
    held_out = {entry["name"] for entry in manifest if entry["held_out"]}
    assert held_out == photographs.split(names) == photographs.split(names[::-1])
    assert len(held_out) == 100 and {"scikit-image/chelsea", "scikit-image/coffee"} <= held_out
    assert len({entry["sha256"] for entry in manifest}) == len(manifest)  # no picture is on both sides
    assert all(photographs._FREE.match(entry["licence"]) for entry in manifest)


@pytest.mark.parametrize(
    ("exists", "line"), [(False, "run this command on Debian 12 or newer"), (True, "error: `apt-get` failed: repeat")]
)
def test_packages_that_cannot_be_fetched_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, line: str
) -> None:
    def run(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.setattr(photographs.subprocess, "run", run)
    monkeypatch.setattr(photographs.shutil, "which", lambda name: name)
    sources = tmp_path / "debian.sources"
    if exists:
        sources.write_text("Types: deb\nSuites: bookworm\n")
    monkeypatch.setattr(photographs, "_SOURCES", sources)
    monkeypatch.setattr("sys.argv", ["photographs", "--output", str(tmp_path / "pack.zip")])
    with pytest.raises(SystemExit, match=line):
        photographs.main()
    assert not (tmp_path / "pack.zip").exists()
