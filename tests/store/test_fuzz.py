"""Mutates manifests, records and folders of the store: a read is a right hit, a miss, or an error of one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.damage import counts, examine
from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.store import identity
from wanfast.runtime.store.artifacts import MANIFEST, ArtifactStore

INPUTS: dict[str, Any] = {"text": "Grüße", "n": 1, "list": [1.5, None, True], "deep": {"a": "b"}}
PAYLOAD = {"data.bin": bytes(range(64)), "sub/more.bin": b"more"}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)
names = st.sampled_from(["data.bin", "sub/more.bin", "../out", "/etc/hostname", "", ".", "sub", MANIFEST, "new"])


def write(folder: Path) -> None:
    for name, data in PAYLOAD.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value of a JSON document."""
    children = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in children for place in places(value, (*path, key)))]


@st.composite
def mutated_json(draw: st.DrawFn, document: Any) -> Any:
    """Draws a document with some values replaced, removed or added."""
    document = {"": json.loads(json.dumps(document))}
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(document)[1:]))
        holder = document
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace" or last == "":
            holder[last] = draw(values)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(names | st.text())] = draw(values | st.just({"bytes": 4, "sha256": "0" * 64}))
    return document[""]


def damage_file(draw: st.DrawFn, file: Path) -> None:
    data = file.read_bytes()
    at = draw(st.integers(0, len(data)))
    file.write_bytes(
        draw(st.sampled_from([data[:at], data[:at] + draw(st.binary(max_size=4)) + data[at + 1 :], data * 2]))
    )


def damage(draw: st.DrawFn, folder: Path) -> None:
    """Changes a thing in the folder of an artifact, or nothing that matters."""
    file = folder / draw(st.sampled_from([*PAYLOAD, MANIFEST]))
    kind = draw(st.sampled_from(["manifest", "manifest", "bytes", "remove", "link", "add", "folder", "empty folder"]))
    if kind == "manifest":
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        (folder / MANIFEST).write_text(json.dumps(draw(mutated_json(document))), encoding="utf-8")
    elif kind == "bytes":
        damage_file(draw, file)
    elif kind == "remove":
        file.unlink()
    elif kind == "link":
        file.rename(folder.parent / "elsewhere")
        file.symlink_to(folder.parent / "elsewhere")
    elif kind == "add":
        (folder / draw(st.sampled_from(["new", ".new", "sub/new", "sub/.more.bin"]))).write_bytes(
            draw(st.binary(max_size=4))
        )
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        (folder / "empty").mkdir()


def is_whole(folder: Path) -> bool:
    """Returns whether a folder holds exactly the payload, and a manifest of these inputs."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if not file.is_dir()}
    manifest = json.loads(files.pop(MANIFEST).read_text(encoding="utf-8"))
    same = json.dumps(manifest["inputs"], sort_keys=True) == json.dumps(INPUTS, sort_keys=True)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    return same and not links and {name: file.read_bytes() for name, file in files.items()} == PAYLOAD


@counts(75)
def test_a_mutated_artifact(tmp_path: Path, examples: int) -> None:
    examine(st.data(), partial(check_artifact, tmp_path / "store"), examples)


def check_artifact(root: Path, data: st.DataObject) -> None:
    shutil.rmtree(root, ignore_errors=True)  # of the example before, which may have failed
    store = ArtifactStore(root)
    folder = store.publish("kind", INPUTS, write).folder
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    # The draws depend on the length of the file, and so must not depend on the time that writing took.
    (folder / MANIFEST).write_text(json.dumps(manifest | {"seconds": 0.0}), encoding="utf-8")
    damage(data.draw, folder)
    list(store.manifests("kind"))
    try:
        found = store.find("kind", INPUTS, verify=True)
    except CorruptArtifactError as error:
        assert "\n" not in str(error) and str(folder) in str(error) and "remove this folder" in str(error)
        assert store.find("kind", INPUTS, verify=True, damaged="miss") is None
    else:
        assert found == folder and is_whole(folder)
    assert store.publish("kind", INPUTS, write, damaged="miss").folder == folder
    assert is_whole(folder)


@counts(75)
def test_a_mutated_record_of_a_hash(tmp_path: Path, examples: int) -> None:
    examine(st.data(), partial(check_record, tmp_path / "store"), examples)


def check_record(root: Path, data: st.DataObject) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    weights = root / "weights"
    weights.write_bytes(b"weights")
    right = {weights: hashlib.sha256(b"weights").hexdigest()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(identity, "_SMALL_BYTES", 0)
        assert identity.sha256_of([weights], root) == right
        (record,) = (root / "hashes").glob("*.json")
        document = json.loads(record.read_text())
        mutated = data.draw(mutated_json(document))
        record.write_text(json.dumps(mutated))
        found = identity.sha256_of([weights], root)
    forged = isinstance(mutated, dict) and mutated == document | {"sha256": mutated.get("sha256")}
    assert found == right or (forged and found == {weights: mutated["sha256"]})
