"""Tests that the key of every kind of artifact holds all its inputs: each of them changes the key."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import pytest

from tests.configs import effective_config
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.engine import compilation, prompt_embeds
from wanfast.runtime.errors import CorruptArtifactError, MissingArtifactError
from wanfast.runtime.media.tokenizer import PromptTokenizer, TokenizedPrompt
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store import code, curves, model_files, quantized
from wanfast.runtime.store.artifacts import ArtifactStore, key_of
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return model_files.locate("tiny", str(tmp_path / "artifacts"))


def embeds_key(files: ModelFiles, config: EffectiveConfig, ids: tuple[int, ...] = (5, 1)) -> str:
    return key_of(
        prompt_embeds._inputs(TokenizedPrompt(text="a", ids=ids, num_tokens_before_truncation=2), files, config)
    )


def curve_key(files: ModelFiles, config: EffectiveConfig) -> str:
    return key_of(curves.curve_inputs(config, files, "set"))


def compiled_key(files: ModelFiles, config: EffectiveConfig) -> str:
    return key_of(compilation.cache_inputs(Plan.of(config, files.spec, (64, 64)), "flash"))


def expert_key(files: ModelFiles, config: EffectiveConfig, torchao: str = "0.18.0", device: str = "cpu") -> str:
    store = ArtifactStore(Path("artifacts"))
    return key_of(QuantizedExpert(store, files, "high_noise", "int8-dynamic", "tiny").inputs(torchao, device))


KEYS: dict[str, tuple[Callable[[ModelFiles, EffectiveConfig], str], list[dict[str, Any]]]] = {
    "prompt_embeds": (embeds_key, [{"precision": "fp32"}, {"tf32": True}]),
    "magcache": (
        curve_key,
        [
            {"precision": "fp32"}, {"tf32": True}, {"quantize": "int8-dynamic"}, {"attention": "math"}, {"steps": 7},
            {"solver": "euler"}, {"shift": 3.0}, {"guidance_low_noise": 9.0}, {"guidance_high_noise": 9.0},
            {"size": "96x96"}, {"frames": 9}, {"negative_prompt": "dull"}, {"compile": True}, {"device": "cuda"},
        ],
    ),
    "inductor": (
        compiled_key,
        [
            {"precision": "fp32"}, {"tf32": True}, {"quantize": "int8-dynamic"}, {"attention": "math"},
            {"compile": True, "compile_mode": "max-autotune"}, {"cfg_parallel": 2, "num_gpus": 2},
        ],
    ),
    "quantized": (expert_key, []),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_each_option_that_changes_the_payload_changes_the_key(files: ModelFiles, kind: str) -> None:
    key, options = KEYS[kind]
    keys = {key(files, effective_config(**own)) for own in ({}, *options)}
    assert len(keys) == 1 + len(options)
    assert key(files, effective_config(seed=9, prompt="other", output="b.mp4")) == key(files, effective_config())


CODE = {
    "prompt_embeds": (
        "runtime/models/umt5.py", "runtime/media/tokenizer.py", "runtime/weights/checkpoint.py",
        "runtime/weights/key_maps.py", "runtime/engine/prompt_embeds.py",
    ),
    "magcache": (
        "runtime/models/dit.py", "runtime/models/vae.py", "runtime/media/images.py", "runtime/sampling/scheduler.py",
        "runtime/weights/checkpoint.py", "runtime/weights/lora.py", "runtime/weights/forms.py",
        "runtime/store/expert_files.py", "runtime/engine/prompt_embeds.py",
        "runtime/engine/session.py",
        "runtime/distributed/ulysses.py", "magcache_calib/recorder.py", "magcache_calib/calibrate.py",
    ),
    "inductor": ("runtime/models/dit.py", "runtime/engine/compilation.py", "runtime/weights/quantization.py"),
    "quantized": (
        "runtime/jobs/quantize.py", "runtime/weights/checkpoint.py", "runtime/weights/lora.py",
        "runtime/weights/quantization.py", "runtime/weights/forms.py", "runtime/store/expert_files.py",
        "runtime/weights/key_maps.py", "runtime/models/quantized.py", "runtime/models/dit.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, files in CODE.items() for file in files])
def test_each_file_of_the_code_changes_the_key(
    files: ModelFiles, kind: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = KEYS[kind]
    keys = set()
    for changed in (None, file):
        for module in (prompt_embeds, curves, compilation, quantized):
            fake = partial(digest_after_a_change, changed)
            monkeypatch.setattr(module, "digest_of_code", fake)
        keys.add(key(files, effective_config()))
    assert len(keys) == 2


def digest_after_a_change(changed: str | None, *patterns: str, words: bool = False) -> str:
    is_changed = changed is not None and any(map(PurePath(changed).match, patterns))
    return "changed" if is_changed else "digest"


@pytest.mark.parametrize(
    ("kind", "part"),
    [("prompt_embeds", "umt5"), ("magcache", "dit"), ("magcache", "vae"), ("magcache", "umt5"),
     ("inductor", "dit"), ("quantized", "dit")],
)  # fmt: skip
def test_each_json_fact_of_the_model_changes_the_key(files: ModelFiles, kind: str, part: str) -> None:
    """The weights stay the same."""
    key, _ = KEYS[kind]
    old = getattr(files.spec, part)
    new = replace(old, latents_std=(9.0,) * 16) if part == "vae" else replace(old, eps=0.01)
    other = replace(files, spec=replace(files.spec, **{part: new}))
    assert key(other, effective_config()) != key(files, effective_config())


@pytest.mark.parametrize("kind", ["magcache", "quantized"])
def test_another_torch_changes_the_key(files: ModelFiles, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = KEYS[kind]
    before = key(files, effective_config())
    for module in (curves, quantized):
        monkeypatch.setattr(module, "version_of", lambda package: "9.9")
    assert key(files, effective_config()) != before


def test_the_kind_of_device_belongs_to_8_bit_values(files: ModelFiles, tmp_path: Path) -> None:
    """A run accepts what either device computed."""
    config = effective_config()
    assert len({expert_key(files, config, device=device) for device in ("cpu", "cuda")}) == 2
    expert = QuantizedExpert(ArtifactStore(tmp_path), files, "high_noise", "int8-dynamic", "tiny")
    made_by = quantized.torchao_version()
    for device in ("cpu", "cuda"):
        made = write_old(expert.store, quantized.KIND, expert.inputs(made_by, device))
        assert expert.find() == made
    cast = replace(expert, scheme="bf16")
    assert cast.inputs(None, "cpu") == cast.inputs(None, "cuda")


def test_the_digest_of_code_sees_content_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)
    digest = code.digest_of_code.__wrapped__
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    first = digest("*.py")
    assert digest("*.py") == first == digest("a.py", "b.py")
    (tmp_path / "a.py").write_text("onet")
    (tmp_path / "b.py").write_text("wo")
    assert digest("*.py") != first
    with pytest.raises(AssertionError, match=r"no file is named gone\.py"):
        digest("gone.py")


DOCUMENTED = '''"""A module.

Its text.
"""

import os  # for the name


class A:
    """A class."""

    text = """No docstring # nor a comment."""

    def b(self) -> str:
        """A method."""
        # why
        return "c"
'''
BARE = '''import os
class A:
    text = """No docstring # nor a comment."""
    def b(self) -> str:
        return "c"
'''


@pytest.mark.parametrize("room", ["runtime/models", "runtime/processes", "runtime/engine", "server", "bench"])
def test_words_are_what_the_parser_calls_so(room: str) -> None:
    """The regular expressions find the comments and docstrings that Python's own parser finds."""
    for file in (Path(code.__file__).parents[2] / room).glob("*.py"):
        source = file.read_text()
        lines = source.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
        for node in ast.walk(ast.parse(source)):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and ast.get_docstring(node):
                first, last = node.body[0].lineno, node.body[0].end_lineno or 0
                lines[first - 1 : last] = [""] * (last - first + 1)
        assert code.without_words(source) == "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def test_other_words_are_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments and docstrings are left out, and other strings are not; caches of compiled code count every line."""
    assert code.without_words(DOCUMENTED) == BARE
    monkeypatch.setattr(code, "_PACKAGE", tmp_path)
    digest = code.digest_of_code.__wrapped__
    digests, whole = set(), set()
    for text in (DOCUMENTED, BARE, BARE.replace("nor a", "or a")):
        (tmp_path / "a.py").write_text(text)
        digests.add(digest("a.py"))
        whole.add(digest("a.py", words=True))
    assert len(digests) == 2 and len(whole) == 3


@pytest.mark.parametrize("kind", ["prompt_embeds", "magcache", "quantized"])
def test_other_weights_change_the_key(files: ModelFiles, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = KEYS[kind]
    before = key(files, effective_config())
    monkeypatch.setattr(ModelFiles, "fingerprint", lambda self, component: f"other {component}")
    assert key(files, effective_config()) != before


def test_the_ids_the_machine_and_torch_belong_to_an_embedding(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = effective_config()
    keys = {embeds_key(files, config), embeds_key(files, config, ids=(5, 6, 1))}
    with monkeypatch.context() as patched:
        patched.setattr(prompt_embeds, "describe", lambda device: {"device": "NVIDIA H200"})
        keys.add(embeds_key(files, config))
    monkeypatch.setattr(prompt_embeds, "versions", lambda: {"torch": "9.9"})
    assert len({*keys, embeds_key(files, config)}) == 4


def test_tf32_embeddings_are_not_taken_for_exact_ones(files: ModelFiles) -> None:
    tokens = PromptTokenizer(files.tokenizer, 512).encode("a cat")
    exact, fast = (effective_config(precision="fp32", tf32=tf32) for tf32 in (None, True))
    assert prompt_embeds._inputs(tokens, files, exact) != prompt_embeds._inputs(tokens, files, fast)


def write_old(store: ArtifactStore, kind: str, inputs: dict[str, Any]) -> Path:
    return store.publish(
        kind, inputs, lambda folder: (folder / "ratios.json").write_text('{"ratios": []}') and None
    ).folder


def test_an_expert_of_an_earlier_version_is_named(files: ModelFiles, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    expert = QuantizedExpert(store, files, "high_noise", "bf16", "tiny")
    now = expert.inputs(None, "cpu")
    old = {name: value for name, value in now.items() if name != "code"} | {"source": "0d0275e9101b9f83"}
    folder = write_old(store, quantized.KIND, old)
    with pytest.raises(
        MissingArtifactError, match=f"yet .only by another version of wanfast or torch: {folder}, which you may remove"
    ):
        expert.require()
    write_old(store, quantized.KIND, now)
    assert expert.require() == store.path(quantized.KIND, now)


def test_a_curve_of_an_earlier_version_is_named(files: ModelFiles, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    config = effective_config(magcache="artifact", artifacts_dir=str(store.root))
    assert config.skipping is not None
    old = curves.curve_inputs(config, files, "set") | {"experts": {"high_noise": "0d0275e9101b9f83", "low_noise": "1"}}
    del old["facts"]
    folder = write_old(store, curves.KIND, old)
    with pytest.raises(MissingArtifactError, match=f"an earlier version of wanfast made the curve {folder.name}"):
        curves._artifact(config, config.skipping, files)


def test_a_curve_that_is_damaged_after_it_was_found_is_one_line(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    config = effective_config(magcache="artifact", artifacts_dir=str(store.root))
    folder = write_old(store, curves.KIND, curves.curve_inputs(config, files, "set"))
    monkeypatch.setattr(ArtifactStore, "find", lambda *arguments, **options: folder)
    for damage in ("[" * 100_000, "{", "{}", '{"ratios": 3}'):
        (folder / curves.RATIOS).write_text(damage)
        with pytest.raises(CorruptArtifactError, match="run `wanfast calibrate-magcache`"):
            curves.curve_of(config, files)
    (folder / curves.RATIOS).unlink()
    with pytest.raises(CorruptArtifactError, match="No such file or directory: remove its folder"):
        curves.curve_of(config, files)


def test_of_two_curves_the_one_that_was_measured_like_this_run_is_taken(files: ModelFiles, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    config = effective_config(magcache="artifact", artifacts_dir=str(store.root))
    assert config.skipping is not None
    like = curves.curve_inputs(config, files, "set")
    unlike = json.loads(json.dumps(like)) | {"measured_by": {"attention": "fa3"}}
    other = write_old(store, curves.KIND, unlike)
    assert curves._artifact(config, config.skipping, files)[0] == other
    own = write_old(store, curves.KIND, like)
    assert curves._artifact(config, config.skipping, files)[0] == own
    assert other != own
