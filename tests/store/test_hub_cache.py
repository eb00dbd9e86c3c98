"""Tests that weights in the cache of the Hugging Face Hub are found, read in place, and not downloaded again."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.public_model import save_diffusers
from wanfast.runtime.facts.choices import Layout
from wanfast.runtime.facts.model_spec import PUBLISHED
from wanfast.runtime.store.hub_cache import PINNED, REPOS, PublishedModel, cache_root, snapshot_of
from wanfast.runtime.store.model_files import checkpoints, locate

Wanfast = Callable[..., Outcome]
LAYOUTS: tuple[Layout, ...] = ("original", "diffusers")
MODELS: tuple[PublishedModel, ...] = ("a14b", "t2v-a14b")
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


def snapshot(layout: Layout, commit: str | None = None, model: PublishedModel = "a14b") -> Path:
    repo = REPOS[model][layout]
    return snapshot_of(repo, commit or PINNED[repo])


def put(layout: Layout, name: str, data: bytes, commit: str | None = None, model: PublishedModel = "a14b") -> None:
    """Adds a file to the cache as the hub's library does: a link to a blob that is named by its sha256."""
    root = snapshot(layout, commit, model)
    blob = root.parents[1] / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(blob)


def fill(layout: Layout, commit: str | None = None, model: PublishedModel = "a14b") -> Path:
    for name in FILES[layout]:
        put(layout, name, name.encode(), commit, model)
    return snapshot(layout, commit, model)


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
@pytest.mark.parametrize("model", MODELS)
def test_a_published_model_is_found_in_the_cache(cache: Path, model: PublishedModel, layout: Layout) -> None:
    """The folder has no file of facts, so that the name alone says which facts are the model's."""
    assert not locate(model, "artifacts").exists
    found = fill(layout, model=model)
    assert not any(locate(other, "artifacts").exists for other in MODELS if other != model)
    files = locate(model, "artifacts")
    assert (files.root, files.layout) == (found, layout)
    assert files.spec == dataclasses.replace(PUBLISHED[model], name=REPOS[model][layout].partition("/")[2])
    files.require()
    copy = Path(shutil.copytree(found, Path("artifacts", checkpoints(model, layout))))
    own = locate(model, "artifacts")
    assert own.root == copy.absolute() and own.fingerprints == files.fingerprints


def test_an_incomplete_cache_does_not_count(cache: Path, workdir: Path) -> None:
    found = fill("original")
    (found / "Wan2.1_VAE.pth").unlink()
    files = locate("a14b", "artifacts")
    assert not files.exists and files.root == workdir / "artifacts" / checkpoints("a14b", "original")


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
    found = fill("original")
    document = wanfast("doctor", "--json").document
    assert document["weights"]["folder"] == str(found) and document["weights"]["trouble"] is None
    assert f"{found}, original layout" in wanfast("doctor").out


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
