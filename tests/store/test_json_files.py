"""Tests that whatever a JSON file holds, reading it gives an object or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.jobs import doctor
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.json_files import read_object

DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b'"\xff"', DEEP.encode()], ids=lambda text: str(text[:4]))
def test_what_is_no_object_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CorruptArtifactError, match=r"a\.json: .*: copy it again$"):
        read_object(tmp_path / "a.json", "copy it again")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(CorruptArtifactError, match=r"copy it again$"):
            read_object(path, "copy it again")


def test_a_deep_manifest_is_damaged_and_stops_nobody_else(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.publish("quantized", {"a": 1}, lambda folder: (folder / "file").touch()).folder
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {"file"}
    (folder / "manifest.json").write_text(DEEP)
    with pytest.raises(CorruptArtifactError, match="remove this folder"):
        store.find("quantized", {"a": 1})
    assert list(store.manifests("quantized")) == []
    assert doctor._holds("quantized", folder) is None
