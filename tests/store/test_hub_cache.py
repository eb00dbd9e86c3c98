"""Tests that weights in the cache of the Hugging Face Hub are found, read in place, and not downloaded again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.public_model import save_diffusers
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.store.hub_cache import PINNED, REPOS, Layout, cache_root, snapshot_of
from wanfast.runtime.store.model_files import A14B_FOLDER, locate

Wanfast = Callable[..., Outcome]
LAYOUTS: tuple[Layout, ...] = ("original", "diffusers")
FILES: Mapping[Layout, tuple[str, ...]] = {
    "original": (
        "high_noise_model/a.safetensors", "low_noise_model/a.safetensors", "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json",
    ),
    "diffusers": (
        "transformer/a.safetensors", "transformer_2/a.safetensors", "vae/a.safetensors",
        "text_encoder/a.safetensors", "tokenizer/tokenizer.json",
    ),
}  # fmt: skip


@pytest.fixture
def cache(workdir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("hub-cache")
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    return folder


def put(layout: Layout, name: str, data: bytes, commit: str | None = None) -> None:
    """Adds a file to the cache as the hub's library does: a link to a blob that is named by its sha256."""
    snapshot = snapshot_of(REPOS[layout], commit or PINNED[REPOS[layout]])
    blob = snapshot.parents[1] / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / name).symlink_to(blob)


def fill(layout: Layout, commit: str | None = None) -> Path:
    for name in FILES[layout]:
        put(layout, name, name.encode(), commit)
    return snapshot_of(REPOS[layout], commit or PINNED[REPOS[layout]])


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"HF_HUB_CACHE": "", "XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_place_of_the_cache(environment: dict[str, str], root: str) -> None:
    assert cache_root(environment) == Path(root).expanduser()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a14b_is_found_in_the_cache(cache: Path, layout: Layout) -> None:
    assert not locate("a14b", "artifacts").exists
    snapshot = fill(layout)
    files = locate("a14b", "artifacts")
    assert (files.root, files.layout, files.spec.dit) == (snapshot, layout, A14B.dit)
    assert files.spec.name == REPOS[layout].partition("/")[2]
    files.require()
    copy = Path(shutil.copytree(snapshot, Path("artifacts", "checkpoints", REPOS[layout].partition("/")[2])))
    own = locate("a14b", "artifacts")
    assert own.root == copy.absolute() and own.fingerprints == files.fingerprints


def test_an_incomplete_cache_does_not_count(cache: Path, workdir: Path) -> None:
    snapshot = fill("original")
    (snapshot / "Wan2.1_VAE.pth").unlink()
    files = locate("a14b", "artifacts")
    assert not files.exists and files.root == workdir / "artifacts" / A14B_FOLDER


def test_the_pinned_commit_comes_first_and_then_the_newest(cache: Path) -> None:
    newest = fill("original", "f" * 40)
    assert not locate("a14b", "artifacts").exists  # nothing says that this commit is one of the repository
    refs = newest.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("f" * 40)
    assert locate("a14b", "artifacts").root == newest
    pinned = fill("original")
    assert locate("a14b", "artifacts").root == pinned


def test_doctor_says_where_the_weights_are(wanfast: Wanfast, cache: Path) -> None:
    snapshot = fill("original")
    document = wanfast("doctor", "--json").document
    assert document["weights"]["folder"] == str(snapshot) and document["weights"]["trouble"] is None
    assert f"{snapshot}, original layout" in wanfast("doctor").out


def test_a_video_is_made_from_the_cache(
    wanfast: Wanfast, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    public = tmp_path_factory.mktemp("public")
    save_diffusers(public)
    for file in public.rglob("*.*"):
        put("diffusers", str(file.relative_to(public)), file.read_bytes())
    small = ("--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu", "--guidance-low-noise", "1")
    made = wanfast("generate", "--image", "cat.png", "--prompt", "a cat", *small)
    assert made.exit_code == 0, made.err
