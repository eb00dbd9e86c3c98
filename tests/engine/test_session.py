"""Tests what a session does once for many videos: compiler caches, text embeddings and source images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compiling import compiler
from tests.media.test_earlier_video import write
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import compilation, held_texts, loading, prompt_embeds
from wanfast.runtime.engine import session as session_module
from wanfast.runtime.engine.held_texts import MOST, HeldTexts
from wanfast.runtime.engine.prompt_embeds import Encoded
from wanfast.runtime.engine.session import Session, Sessions
from wanfast.runtime.errors import NotFiniteError
from wanfast.runtime.jobs import generate
from wanfast.runtime.media import earlier_video, images
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.placement import place
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store import model_files

SHAPE: dict[str, Any] = {
    "model": "tiny", "device": "cpu", "image": "cat.png", "prompt": "a cat", "seed": 1, "steps": 2, "size": "64x64",
    "frames": 5,
}  # fmt: skip


def job_of(**options: Any) -> Job:
    (plan,) = place([resolve({**SHAPE, **options}, writes=False)[0]])
    return plan.job()


def make(jobs: Iterable[Job], sessions: Sessions) -> list[dict[str, Any]]:
    found = generate.run(list(jobs), sessions, frames_of=lambda index: Path(f"frames/{index}.npy"))
    return [result() if callable(result) else result for _, result in found]  # a list's files are completed later


@pytest.mark.parametrize("found", ["0123456789ab", None])
def test_compiler_caches_are_loaded_once_for_each_key(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    """A miss is not repeated either, because the first video compiles the blocks."""
    looked: list[int] = []

    def load(store: object, inputs: dict[str, Any], *arguments: object, **named: object) -> str | None:
        looked.append(inputs["tokens"])
        return found

    monkeypatch.setattr(session_module, "load_caches", load)
    monkeypatch.setattr(compilation, "_import_compiler", lambda gpu: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **k: None)
    small, large = job_of(compile=True), job_of(compile=True, size="96x64")
    sessions = Sessions(Ranks("cpu"))
    results = make([small, large, small, small], sessions)
    assert [result["compile_cache"] for result in results] == [found] * 4
    of_small, of_large = (result["plan"]["tokens"] for result in results[:2])
    assert looked == [of_small, of_large]
    sessions.close()
    make([small], sessions)
    assert looked == [of_small, of_large, of_small]  # a new session


def test_a_process_compiles_for_more_sizes_than_torch_holds_graphs(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of earlier sizes are freed, also those of a session that was closed."""
    counter = compiler(monkeypatch, loading)
    monkeypatch.setattr(session_module, "load_caches", lambda *a, **k: None)
    monkeypatch.setattr(compilation, "_GRAPHS", 2 * compilation._GRAPHS_OF_A_SHAPE)
    monkeypatch.setattr(compilation, "_compiled", set())
    monkeypatch.setattr(session_module.hardware, "forget_cuda_graphs", lambda: None)  # as if none was ever captured
    sessions = Sessions(Ranks("cpu"))

    def frames_of(*sizes: str) -> list[Any]:
        results = make([job_of(compile=True, size=size) for size in sizes], sessions)
        return [np.load(result["frames"]) for result in results]

    with torch._dynamo.config.patch(recompile_limit=2):
        first, second = frames_of("64x64", "96x64")
        sessions.close()
        again, _, last = frames_of("96x64", "96x96", "64x64")
    assert counter.frame_count == 4  # 96x64 is compiled once
    assert (first == last).all() and (second == again).all()


class Loader:
    """Stands for UMT5 and the store: it notes what is loaded, and stores all texts except `unstored`."""

    def __init__(self, unstored: Iterable[str] = ()) -> None:
        self.asked: list[list[str]] = []
        self.unstored = set(unstored)

    def __call__(self, texts: list[str], most: int) -> Encoded:
        self.asked.append(list(texts))
        lost = self.unstored.intersection(texts)
        return Encoded({text: torch.zeros(1) for text in texts if text in {*texts[:most], *lost}}, lost, [])


def clips_of(count: int) -> list[tuple[str, str]]:
    return [(f"line {number}", "negative") for number in range(count)]


@pytest.mark.parametrize("twice", [False, True])
def test_embeddings_of_a_long_list_are_loaded_in_the_order_of_the_videos(twice: bool) -> None:
    """Each text is loaded once, at most 32 are held, and the next ones are among them."""
    clips = clips_of(1000) * (1 + twice)
    loader = Loader()
    held = HeldTexts(loader)
    held.expect(clips)
    (first,), most = loader.asked, len(held)
    assert first == ["line 0", "negative", *(f"line {number}" for number in range(1, 1000))]
    loader.asked.clear()
    for texts in clips:
        assert held.use(texts).keys() == {*texts}
        most = max(most, len(held))
    assert most == MOST
    reloaded = [text for texts in loader.asked for text in texts]
    assert reloaded == [text for text, _ in clips][MOST - 1 :]
    assert len(loader.asked) == -(-len(reloaded) // (MOST - 1))
    assert held._clips == []


def test_a_text_that_several_lines_need_is_held_until_the_last_of_them() -> None:
    """Lines that another rank group or an error took are passed."""
    loader = Loader()
    held = HeldTexts(loader)
    clips = clips_of(40)
    often = [texts for clip in clips for texts in (clip, ("often", "negative"))]
    held.expect(often)
    for texts in often[2:10] + often[20:]:
        held.use(texts)
    reloaded = [text for texts in loader.asked[1:] for text in texts]
    assert "often" not in reloaded and "negative" not in reloaded and len(reloaded) == len({*reloaded})
    held.use(("another list's", ""))
    assert len(held) == MOST


def test_embeddings_that_cannot_be_stored_are_held_until_no_line_needs_them() -> None:
    """Else UMT5 would be loaded for each of them."""
    clips = clips_of(100)
    loader = Loader(unstored=(text for texts in clips for text in texts))
    held = HeldTexts(loader)
    held.expect(clips)
    assert len(held) == 101
    left = []
    for texts in clips:
        held.use(texts)
        left.append(len(held))
    assert len(loader.asked) == 1 and left == [max(MOST, 101 - number) for number in range(100)]


def test_a_session_holds_the_texts_that_were_used_last(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server gives each video as a list of one."""
    loader = Loader()
    monkeypatch.setattr(session_module, "prompt_embeds", lambda texts, *others, stores: loader(texts, others[-1]))
    session = Session.open(job_of().config, Ranks("cpu"))
    for texts in clips_of(100):
        session.encode([texts])
        session.text_of(session.config.replace(prompt=texts[0], negative_prompt=texts[1]))
    assert len(session._texts) == MOST and sum("negative" in texts for texts in loader.asked) == 1


def test_a_list_asks_for_its_texts_clip_by_clip(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(held_texts, "MOST", 3)
    encode = session_module.prompt_embeds

    def noted(texts: list[str], *others: Any, **named: Any) -> Encoded:
        asked.append(list(texts))
        return encode(texts, *others, **named)

    monkeypatch.setattr(session_module, "prompt_embeds", noted)
    prompts = ["a", ["b", "c"], "d", "a"]
    jobs = [job_of(prompt=prompt, negative_prompt="no") for prompt in prompts]
    results = make(jobs, Sessions(Ranks("cpu")))
    assert asked == [["a", "no", "b", "c", "d"], ["c", "d"], ["a"]]
    first, last = (np.load(results[index]["frames"]) for index in (0, 3))
    assert (first == last).all()


def encoded(texts: list[str], **options: Any) -> Encoded:
    job = job_of()
    files = model_files.locate_for(job.config.models)
    return prompt_embeds.prompt_embeds(texts, files, job.config, Ranks("cpu"), Stopwatch("cpu"), **options)


def test_a_long_list_loads_the_text_encoder_once_and_holds_the_first_texts(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = prompt_embeds.build_umt5
    monkeypatch.setattr(prompt_embeds, "build_umt5", lambda *a, **k: built.append(1) or build(*a, **k))
    texts = [f"line {number}" for number in range(70)]
    assert list(encoded(texts, most=3).embeds) == texts[:3] and len(built) == 1
    again = encoded(texts)
    assert list(again.embeds) == texts and not again.unstored and len(built) == 1


def test_texts_that_are_not_stored_are_returned(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "artifacts").mkdir()
    (workdir / "artifacts/prompt_embeds").write_text("a file, not a folder")
    texts = [f"line {number}" for number in range(40)]
    found = encoded(texts, most=2)
    assert list(found.embeds) == texts and found.unstored == {*texts}
    assert capsys.readouterr().err.count("40 of 40 texts are not stored") == 1


def test_a_session_that_stores_no_texts_encodes_each_once_and_uses_stored_ones(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(held_texts, "MOST", 4)
    encoded(["negative"])
    before = sorted((workdir / "artifacts/prompt_embeds").rglob("*"))
    made: list[str] = []
    encode = prompt_embeds._encode
    monkeypatch.setattr(prompt_embeds, "_encode", lambda tokens, *a: made.extend(tokens) or encode(tokens, *a))
    sessions = Sessions(Ranks("cpu"), stores_texts=False)
    texts = [f"line {number}" for number in range(6)]
    make([job_of(prompt=text, negative_prompt="negative") for text in texts], sessions)
    make([job_of(prompt=texts[-1], negative_prompt="negative")], sessions)  # is still held
    assert made == texts
    assert sorted((workdir / "artifacts/prompt_embeds").rglob("*")) == before
    assert "not stored" not in capsys.readouterr().err


def test_a_text_that_is_not_finite_costs_no_other_text(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = prompt_embeds._encode

    def spoiled(tokens: dict[str, Any], *others: Any) -> dict[str, torch.Tensor]:
        return {text: embeds / (text != "bad") for text, embeds in encode(tokens, *others).items()}

    monkeypatch.setattr(prompt_embeds, "_encode", spoiled)
    session = Session.open(job_of().config, Ranks("cpu"))
    clips = [("one", "no"), ("two", "no"), ("bad", "no"), ("three", "no")]
    with pytest.raises(NotFiniteError, match="of the text 'bad'"):
        session.encode(clips)
    session._texts._held.clear()
    loads: list[int] = []
    build = prompt_embeds.build_umt5
    monkeypatch.setattr(prompt_embeds, "build_umt5", lambda *a, **k: loads.append(1) or build(*a, **k))
    for prompt, negative in clips[:2]:
        session.text_of(session.config.replace(prompt=prompt, negative_prompt=negative))
    assert not loads  # the others are stored, and the clips before it do not encode it again
    with pytest.raises(NotFiniteError, match="of the text 'bad'"):
        session.text_of(session.config.replace(prompt="bad", negative_prompt="no"))
    session.text_of(session.config.replace(prompt="three", negative_prompt="no"))
    assert len(loads) == 1


@pytest.mark.parametrize(("error", "loads"), [(NotFiniteError, 1), (torch.OutOfMemoryError, 2)])
def test_a_text_that_fails_leaves_the_models_loaded_unless_memory_ran_out(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], loads: int
) -> None:
    loaded: list[int] = []
    load, encode = session_module.load_models, session_module.prompt_embeds
    monkeypatch.setattr(session_module, "load_models", lambda *a: loaded.append(1) or load(*a))

    def failing(texts: list[str], *others: Any, **named: Any) -> Encoded:
        if "bad" in texts:
            raise error("no embedding")
        return encode(texts, *others, **named)

    monkeypatch.setattr(session_module, "prompt_embeds", failing)
    sessions = Sessions(Ranks("cpu"))
    results = [make([job_of(prompt=prompt)], sessions)[0] for prompt in ("a cat", "bad", "a cat")]
    assert ["error" in result for result in results] == [False, True, False] and len(loaded) == loads


@pytest.mark.parametrize("option", ["image", "continue_from"])
def test_the_clips_of_a_video_decode_each_source_once(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """The next video decodes it again, because its file may be another one."""
    old = write(Path("old.mp4"), 64, 48, num_frames=6, fps=12)
    given: dict[str, Any] = {"continue_from": str(old), "image": None, "size": None} if option != "image" else {}
    job = job_of(prompt=["a", "b", "c"], **given)
    decoded: list[str] = []
    for module, name in ((images, "load_image"), (earlier_video, "load_earlier")):
        load = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, load=load: decoded.append(Path(a[0]).name) or load(*a))
    sessions = Sessions(Ranks("cpu"))
    (result,) = make([job], sessions)
    assert decoded == ["cat.png" if option == "image" else "old.mp4"]
    assert len(np.load(result["frames"])) == (13 if option == "image" else 6 + 3 * 4)
    make([job], sessions)
    assert len(decoded) == 2


def test_a_file_that_is_both_images_is_decoded_once(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(last_image="cat.png")
    decoded: list[str] = []
    load = images.load_image
    monkeypatch.setattr(images, "load_image", lambda *a: decoded.append(a[1]) or load(*a))
    make([job], Sessions(Ranks("cpu")))
    assert decoded == ["--image"]
