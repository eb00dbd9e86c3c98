"""Tests videos of several clips, and videos that continue an earlier one, with the tiny model."""

from __future__ import annotations

import json
import shlex
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

import wanfast as api
from tests.conftest import Outcome
from tests.media.test_earlier_video import write
from tests.server.running import until
from wanfast.commands import dispatch, warmup
from wanfast.runtime.config import EffectiveConfig
from wanfast.runtime.engine import pixels
from wanfast.runtime.engine import session as session_module
from wanfast.runtime.engine.pipeline import VideoPipeline
from wanfast.runtime.engine.pixels import fit_image, of_frame
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import ImageFit
from wanfast.runtime.jobs.generate import FramesFile, Joined, figures_of
from wanfast.runtime.media.earlier_video import earlier_frames
from wanfast.runtime.planning import past_runs
from wanfast.runtime.planning.next_step import warmup_command
from wanfast.runtime.planning.placement import FreeMemory, place
from wanfast.runtime.planning.progress import LOADING, share_done
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.planning.sidecar import Recording
from wanfast.runtime.processes import handle as handle_module

Wanfast = Callable[..., Outcome]
SHAPE = ("generate", "--model", "tiny", "--device", "cpu", "--frames", "5", "--steps", "2", "--seed", "1")
TWO = (*SHAPE, "--size", "64x64", "--image", "cat.png", "--prompt", "a cat", "--prompt", "a dog")
MORE = (*SHAPE, "--continue-from", "old.mp4", "--prompt", "a dog", "--output", "new.mp4")


@pytest.fixture
def old() -> Path:
    """Writes the video that is continued: six different frames of 64x48 pixels, 12 a second."""
    return write(Path("old.mp4"), 64, 48, num_frames=6, fps=12)


def frames_of(video: str) -> np.ndarray:
    return np.stack([*earlier_frames(video)])


def test_each_clip_starts_from_the_last_frame_of_the_one_before(
    forked: None, workdir: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clips are those that are made one by one, from the last frame as a lossless image; so is a continuation.

    An image has no values between the levels, so here a decoded frame has none either. The next test has them.
    """
    monkeypatch.setattr(pixels, "of_decoded", of_frame)  # in the ranks too, because they are forks
    shape: dict[str, Any] = {"frames": 5, "steps": 2}

    def single(frame: np.ndarray, prompt: str, seed: int) -> np.ndarray:
        Image.fromarray(frame).save("start.png")
        exact = {"size": f"{frame.shape[1]}x{frame.shape[0]}", "fit": "crop"}
        return handle.make(image="start.png", prompt=prompt, seed=seed, **exact, **shape).frames

    with api.open(model="tiny", device="cpu", num_gpus=2, size="64x64", frames=5) as handle:
        first = handle.make(image="cat.png", prompt="a cat", seed=1, **shape).frames
        second = single(first[-1], "a dog", 2)
        two = handle.make(image="cat.png", prompt=["a cat", "a dog"], seed=1, **shape)
        assert (two.frames == np.concatenate([first, second[1:]])).all()

        before = frames_of("old.mp4")
        after = single(before[-1], "a dog", 3)
        last = single(after[-1], "a cat", 4)
        more = handle.make(continue_from=old, prompt=["a dog", "a cat"], seed=3, **shape)
        assert (more.frames == np.concatenate([before, after[1:], last[1:]])).all()
    assert (more.plan["clips"], more.plan["frames"], more.plan["total_frames"]) == (2, 5, 14) and more.plan["fps"] == 12
    assert two.document["effective"]["video"]["prompt"] == ["a cat", "a dog"] and two.plan["seed"] == 1


def test_a_clip_starts_from_values_that_truncation_did_not_lower(
    wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[np.ndarray | None] = []
    given: list[torch.Tensor] = []
    begin_clip, latent = Joined.begin_clip, VideoPipeline.latent
    monkeypatch.setattr(Joined, "begin_clip", lambda self: starts.append(begin_clip(self)) or starts[-1])

    def recorded(self: VideoPipeline, plan: Any, images: torch.Tensor, *others: Any) -> torch.Tensor:
        given.append(images[0].clone())
        return latent(self, plan, images, *others)

    monkeypatch.setattr(VideoPipeline, "latent", recorded)
    assert wanfast(*TWO).exit_code == 0
    assert starts[0] is None and starts[1] is not None and torch.equal(given[1], pixels.of_decoded(starts[1]))
    assert float((given[1] - of_frame(starts[1])).mean()) == pytest.approx(1 / 255, rel=0.1)


def test_a_run_of_several_clips_loads_the_models_once_and_is_repeated(
    wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    load_models = session_module.load_models
    monkeypatch.setattr(session_module, "load_models", lambda *args: loads.append(1) or load_models(*args))
    made = wanfast(*TWO, "--json", "--contact-sheet").document
    assert len(loads) == 1
    frames = frames_of("out.mp4")
    assert len(frames) == made["plan"]["total_frames"] == 9 and Path("out.png").exists()
    assert made["plan"]["duration_s"] == round(9 / 16, 3)
    again = wanfast("generate", "--from", "out.json", "--output", "again.mp4", "--json").document
    assert again["output_sha256"] == made["output_sha256"]
    one = wanfast(*TWO[:-2], "--output", "one.mp4", "--json", "--contact-sheet").document
    assert len(made["step_s"]) == 2 * sum(made["plan"]["steps"].values()) and made["step_s"][0] == made["first_step_s"]
    assert (
        made["seconds"]["denoise"] >= sum(made["step_s"]) - 0.01 > made["first_step_s"]
        and one["effective"]["video"]["prompt"] == "a cat"
    )
    first, alone = (np.asarray(Image.open(sheet))[:48, :64] for sheet in ("out.png", "one.png"))
    assert (first == alone).all() and first.std() > 1  # an mp4 is lossy, and its first frame depends on later ones


def test_several_prompts_leave_out_the_last_image_of_the_run_of_from(
    wanfast: Wanfast, workdir: Path, old: Path
) -> None:
    """A last image is for a single clip, and the command has no other way to leave it out."""
    both = (*TWO[:-2], "--fit", "crop", "--last-image", "cat.png")
    assert wanfast(*both, "--output", "last.mp4").exit_code == 0
    two = wanfast(*TWO, "--fit", "crop", "--output", "two.mp4", "--json").document
    repeat = ("generate", "--from", "last.json", "--prompt", "a cat", "--prompt", "a dog", "--json")
    again = wanfast(*repeat, "--output", "again.mp4").document
    assert again["output_sha256"] == two["output_sha256"] and list(again["plan"]["images"]) == ["--image"]
    words = f"--prompt is given 2 times, so the last image {workdir / 'cat.png'} is left out: a last image is for a"
    assert any(note.startswith(words) for note in again["plan"]["notes"])
    assert f"note: {words}" in wanfast(*repeat[:-1], "--dry-run").err
    assert "left out" not in wanfast("generate", "--from", "last.json", "--prompt", "a cat", "--dry-run").err
    given = wanfast(*repeat, "--last-image", "cat.png", "--dry-run")
    assert given.exit_code == 2 and "give --prompt once, or drop --last-image" in given.err

    (workdir / "jobs.jsonl").write_text('{"prompt": ["a", "b"]}\n{"prompt": ["a"]}')
    lines = wanfast(*both, "--jobs", "jobs.jsonl", "--dry-run", "--json").document["results"]
    assert [list(line["plan"]["images"]) for line in lines] == [["--image"], ["--image", "--last-image"]]
    assert [any("is left out" in note for note in line["plan"]["notes"]) for line in lines] == [True, False]

    continued = wanfast(*MORE, "--last-image", "cat.png", "--fit", "crop", "--dry-run", "--json").document
    Path("more.json").write_text(json.dumps({**continued, "weights": None}))
    more = ("generate", "--from", "more.json", "--prompt", "a", "--prompt", "b", "--dry-run", "--json")
    video = wanfast(*more).document["effective"]["video"]
    assert (video["continue_from"], video["fit"]) == (str(workdir / "old.mp4"), "area")


def test_the_progress_is_told_clip_by_clip(wanfast: Wanfast, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the names of the stages, the share of the whole video follows."""
    told: list[tuple[str, int, int]] = []
    shown = lambda names, on_result: nullcontext((lambda job, *state: told.append(state), on_result))  # noqa: E731
    monkeypatch.setattr(dispatch, "job_progress", shown)
    assert wanfast(*TWO).exit_code == 0
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    of_a_clip = ["encoding the image", "high noise", "low noise", "decoding"]
    assert stages == [LOADING, *(f"clip {clip} of 2, {stage}" for clip in (1, 2) for stage in of_a_clip)]
    shares = [share_done(*state) for state in told]
    assert shares == sorted(shares) and {0, 0.25, 0.5, 0.75, 1} == set(shares)


def test_a_continuation_holds_the_old_video_and_from_repeats_it(wanfast: Wanfast, workdir: Path, old: Path) -> None:
    before = frames_of("old.mp4")
    made = wanfast(*MORE, "--json").document
    frames = frames_of("new.mp4")
    assert len(frames) == 10 and np.abs(frames[:6].astype(int) - before).mean() < 3
    video = made["effective"]["video"]
    assert (video["size"], video["fps"], video["continue_from_frames"]) == ("64x48", 12, 6)
    assert video["continue_from"] == str(workdir / "old.mp4") and len(video["continue_from_sha256"]) == 64
    assert made["plan"]["images"] == {"--continue-from": str(workdir / "old.mp4")}
    repeat = ("generate", "--from", "new.json", "--output", "again.mp4", "--json")
    assert wanfast(*repeat).document["output_sha256"] == made["output_sha256"]

    write(old, 64, 48, num_frames=5, fps=12)
    refused = wanfast(*repeat, "--overwrite")
    assert refused.exit_code == 2 and len(refused.err.splitlines()) == 1
    assert (
        "old.mp4 is not the continued video of the earlier run: restore the earlier file, or give --cont" in refused.err
    )
    assert wanfast(*repeat, "--dry-run", "--continue-from", "old.mp4").document["plan"]["total_frames"] == 9
    write(Path("large.mp4"), 96, 64, num_frames=2, fps=16)
    other = wanfast(*repeat, "--dry-run", "--continue-from", "large.mp4").document["plan"]
    assert (other["width"], other["height"], other["fps"]) == (96, 64, 16)
    image = wanfast(*repeat, "--dry-run", "--image", "cat.png").document["plan"]
    assert (image["images"], image["total_frames"]) == ({"--image": str(workdir / "cat.png")}, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "64x64"], "--size 64x64: the video of --continue-from has 64x48 pixels, and its continuation must"),
        (["--fps", "16"], "--fps 16: the video of --continue-from has 12 frames per second, and its continuation must"),
        (["--fit", "pad"], "--fit pad: with --continue-from, only a last image can be fitted: drop --fit"),
        (["--image", "cat.png"], "--image and --continue-from both say where the video starts: drop one of the two"),
        (["--continue-from", ""], "--continue-from : has an empty value: give an mp4 file"),
        (["--frames", "1"], "--continue-from: a clip begins with the last frame of the clip or video before"),
        (["--output", "old.mp4", "--overwrite"], "old.mp4 would overwrite a file that a video is made from"),
        (["--prompt", " "], "--prompt has no words"),
        (["--prompt", ""], "--prompt is missing or empty"),
        (["--prompt", "x", "--last-image", "cat.png"], "--prompt is given 2 times, but --last-image is for a single c"),
        (["--prompt", "x", "--seed", "4294967295"], "--prompt is given 2 times, and the seed grows by 1 "),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(wanfast: Wanfast, old: Path, options: list[str], words: str) -> None:
    outcome = wanfast(*MORE, *options, "--dry-run")
    assert outcome.exit_code == 2 and words in outcome.err.replace(f"{Path.cwd()}/", ""), outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_the_size_is_exactly_that_of_the_earlier_video(wanfast: Wanfast) -> None:
    """For an image of this size, --size 832x480 gives a video of 832x464."""
    write(Path("old.mp4"), 832, 480, num_frames=1)
    plan = wanfast(*MORE, "--dry-run", "--json").document["plan"]
    assert (plan["width"], plan["height"]) == (832, 480)


def test_the_figures_of_clips_are_summed_or_the_largest() -> None:
    def clip(seconds: dict[str, float], peaks: list[int], anew: int, check: dict[str, float] | None) -> Any:
        memory = {"peak_memory_bytes": max(peaks), "peak_memory_bytes_by_rank": peaks}
        figures = {"seconds": seconds, "compiled_anew": anew, "attention_check": check, "first_step_s": anew + 1}
        return SimpleNamespace(figures={**figures, **memory, "step_s": [anew + 1, 0.5]})

    first = clip({"load": 4.0, "decode": 1.0}, [5, 2], 3, {"largest": 0.1})
    found = figures_of([first, clip({"decode": 2.0, "text": 0.5}, [4, 3], 1, {"largest": 0.2})])
    assert found["seconds"] == {"load": 4.0, "decode": 3.0, "text": 0.5}
    assert (found["peak_memory_bytes"], found["peak_memory_bytes_by_rank"]) == (5, [5, 3])
    assert (found["compiled_anew"], found["attention_check"], found["first_step_s"]) == (4, {"largest": 0.2}, 4)
    assert found["step_s"] == [4, 0.5, 2, 0.5]
    assert figures_of([clip({"load": 4.0}, [5], 0, None)])["attention_check"] is None


def test_values_that_the_earlier_video_has_are_taken(wanfast: Wanfast, old: Path) -> None:
    outcome = wanfast(*MORE, "--size", "64x48", "--fps", "12", "--fit", "pad", "--last-image", "cat.png", "--dry-run")
    assert outcome.exit_code == 0, outcome.err


def test_a_model_of_text_alone_has_no_clip_to_continue(wanfast: Wanfast, small_text_model: Path, old: Path) -> None:
    of_text = ("generate", "--model", str(small_text_model), "--device", "cpu", "--prompt", "a", "--dry-run")
    several, more = wanfast(*of_text, "--prompt", "b"), wanfast(*of_text, "--continue-from", "old.mp4")
    assert several.exit_code == more.exit_code == 2
    assert "--prompt is given 2 times, but small text makes videos from text alone" in several.err
    assert "--continue-from: small text makes videos from text alone: drop --continue-from" in more.err


def test_the_plan_says_clips_time_and_limits(wanfast: Wanfast, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = (*MORE, "--prompt", "a cat", "--dry-run")
    rows = [" ".join(line.replace("│", "").split()) for line in wanfast(*two).out.splitlines()]
    assert "video 64x48, 14 frames at 12 fps (1.167 s)" in rows
    once = "a frame that two clips share is written once"
    assert f"clips 6 frames of old.mp4, then 2 clips of 5 frames, seeds 1 to 2; {once}" in rows
    outcome = wanfast(*two)
    assert "note: a clip gets only the last frame of what comes before it: motion may change suddenly" in outcome.err
    entry = {"seconds_a_forward": 2.0, "machine": "cpu"}
    plan = wanfast(*two, "--json").document["plan"]
    known = entry | {name: plan[name] for name in (*past_runs._ALIKE, "attention", *past_runs._OF_ATTENTION)}
    monkeypatch.setattr(past_runs, "_entries", lambda index: [known])
    assert wanfast(*two, "--json").document["predicted_s"] == 2.0 * 2 * plan["forwards"]


def test_clips_that_the_host_cannot_join_are_refused(workdir: Path, old: Path) -> None:
    """A caller in Python gets all frames as one array; the frames of a file leave as they come."""
    shape: dict[str, Any] = {"model": "tiny", "device": "cpu", "frames": 5, "steps": 1, "seed": 1}
    prompts = {"image": "cat.png", "size": "64x64", "prompt": ["a", "b"]}
    for options, words in (
        (
            {"continue_from": "old.mp4", "prompt": "a"},
            "--continue-from: joining 10 frames needs 92.2 kB of host memory",
        ),
        (prompts, "--prompt: joining 9 frames needs 82.9 kB of host memory, but only 1.0 kB are free: give fewer pr"),
    ):
        plan, _ = resolve({**shape, **options}, writes=False)
        with pytest.raises(ConfigError, match="of host memory") as refused:
            place([plan], FreeMemory(1 << 40, "free", 1000))
        assert str(refused.value).startswith(words)
        (fits,) = place([plan], FreeMemory(1 << 40, "free", plan.joining_bytes))
        assert fits.notes == plan.notes
        (written,) = place([resolve({**shape, **options})[0]], FreeMemory(1 << 40, "free", 1000))
        assert written.joining_bytes == 0


def clips_of(*lengths: int) -> Iterator[np.ndarray]:
    """Yields clips of frames with one grey each; each clip begins with the last frame of the one before."""
    first = 0
    for length in lengths:
        greys = np.arange(first, first + length, dtype=np.uint8) * 10
        yield np.tile(greys[:, None, None, None], (1, 16, 16, 3)).copy()  # no view, so that it is freed with its pixels
        first += length - 1


def test_frames_of_clips_are_freed_as_soon_as_they_are_written(tmp_path: Path) -> None:
    """Only the last frame of a clip is held, and those of the contact sheet."""
    outputs = tmp_path / "a.mp4", tmp_path / "a.json", tmp_path / "a.png"
    with (
        Recording(outputs, 16, 13, overwrite=True) as recording,
        FramesFile(tmp_path / "frames/0.npy", 13, tmp_path) as file,
    ):
        joined = Joined(lambda frames: (recording.add(frames), file.add(frames)))
        clips: list[weakref.ref[np.ndarray]] = []
        for clip in clips_of(5, 5, 5):
            assert (joined.begin_clip() is None) == (not clips)
            clips.append(weakref.ref(clip))
            joined.add(clip)
            del clip
        until(lambda: all(clip() is None for clip in clips), 5)
        assert not (tmp_path / "a.mp4").exists() and not list(tmp_path.glob("frames/0.npy"))
        recording.finish({"seconds": {}})
        whole = np.load(file.finish({})["frames"])
    assert whole[:, 0, 0, 0].tolist() == [10 * frame for frame in range(13)]
    assert len(frames_of(str(outputs[0]))) == 13
    sheet = np.asarray(Image.open(outputs[2]))
    assert sheet[::16, ::16, 0].ravel().tolist() == [10 * frame for frame in (0, 1, 3, 5, 6, 8, 10, 12)]


def test_an_earlier_video_is_decoded_while_it_is_encoded(tmp_path: Path, old: Path) -> None:
    decoded, all_decoded = [], threading.Event()

    def earlier() -> Iterator[np.ndarray]:
        for frame in earlier_frames(str(old)):
            decoded.append(threading.current_thread())
            yield frame
        all_decoded.set()

    with Recording((tmp_path / "a.mp4", tmp_path / "a.json"), 16, 6, overwrite=True) as recording:
        Joined(recording.add).begin_with(earlier())
        assert all_decoded.wait(20)
        recording.finish({"seconds": {}})
    assert len(frames_of(str(tmp_path / "a.mp4"))) == 6 and threading.main_thread() not in decoded

    old.write_bytes(b"damaged meanwhile")
    with (
        pytest.raises(ConfigError, match="give a complete mp4 file"),
        Recording((tmp_path / "b.mp4", tmp_path / "b.json"), 16, 6, overwrite=True) as recording,
    ):
        Joined(recording.add).begin_with(earlier_frames(str(old)))
        recording.finish({"seconds": {}})
    assert {file.name for file in tmp_path.iterdir() if "b." in file.name} == set()


@pytest.mark.parametrize("fit", get_args(ImageFit))
def test_a_frame_of_the_videos_size_is_fitted_without_a_change(fit: ImageFit) -> None:
    """So the first clip of a continuation starts from the last frame as it was decoded."""
    frame = np.random.default_rng(0).integers(0, 256, (480, 848, 3), dtype=np.uint8)
    assert torch.equal(fit_image(Image.fromarray(frame), 848, 480, fit), of_frame(frame))


def test_frames_of_a_video_that_fails_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), FramesFile(tmp_path / "frames/0.npy", 5, tmp_path) as file:
        file.add(next(clips_of(4)))
        assert len(list((tmp_path / "frames").iterdir())) == 1
        _ = 1 / 0
    assert list((tmp_path / "frames").iterdir()) == []
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"--artifacts-dir .* cannot be written"),
        FramesFile(tmp_path / "file/frames/0.npy", 5, tmp_path) as file,
    ):
        file.add(next(clips_of(5)))


def test_a_continuation_of_a_run_needs_no_fit_of_its_image(wanfast: Wanfast, workdir: Path, old: Path) -> None:
    wanfast(*SHAPE, "--size", "64x64", "--image", "cat.png", "--prompt", "a cat", "--fit", "crop")
    again = ("generate", "--from", "out.json", "--continue-from", "old.mp4", "--dry-run", "--json")
    video = wanfast(*again).document["effective"]["video"]
    assert (video["size"], video["fit"], video["image"]) == ("64x48", "area", "")
    assert wanfast(*again, "--last-image", "cat.png").document["effective"]["video"]["fit"] == "crop"
    assert (
        "--fit crop: with --continue-from, only a last image can be fitted: drop --fit"
        in wanfast(*again, "--fit", "crop").err
    )


def test_python_places_the_models_for_the_size_of_the_earlier_video(
    workdir: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of --model would need another placement, or more memory than there is."""
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(handle_module.Opened, "of", lambda asked: opened.append(asked) or 1 / 0)
    for given in ({}, {"size": "32x32"}):
        with pytest.raises(ZeroDivisionError):
            api.make(model="tiny", device="cpu", continue_from=Path("old.mp4"), prompt="a", **given)
    assert [asked["size"] for asked in opened] == ["64x48", "32x32"]
    with pytest.raises(ConfigError, match="--continue-from 5: a text is needed"):
        api.make(model="tiny", continue_from=5, prompt="a")


@pytest.mark.parametrize("kind", ["continued", "from text"])
def test_the_warmup_that_a_note_names_is_of_the_same_shape(wanfast: Wanfast, small_text_model: Path, kind: str) -> None:
    """Without --fit, --size 832x480 is 832x464 for an image of this size."""
    if kind == "continued":
        write(Path("old.mp4"), 832, 480, num_frames=1)
        given: tuple[str, ...] = ("--model", "tiny", "--continue-from", "old.mp4")
    else:
        given = ("--model", str(small_text_model), "--size", "832x480")
    of_video = ("generate", *given, "--device", "cpu", "--frames", "5", "--steps", "2", "--prompt", "a", "--compile")
    document = wanfast(*of_video, "--dry-run", "--json").document
    words = shlex.split(warmup_command(EffectiveConfig.from_json(document["effective"])))
    parsed = dict(zip(words[2::2], words[3::2], strict=True))
    assert "--image" not in parsed
    given_to_warmup = {name[2:].replace("-", "_"): value for name, value in parsed.items()}
    plan, _ = warmup.planned({**given_to_warmup, "frames": int(given_to_warmup["frames"])})
    assert (plan.geometry.width, plan.geometry.height) == (832, 480) == (document["plan"]["width"], 480)


def test_a_line_of_a_list_names_several_prompts_and_its_video(wanfast: Wanfast, workdir: Path, old: Path) -> None:
    (workdir / "videos").mkdir()
    shutil.move(old, "videos/old.mp4")
    line = {"continue_from": "old.mp4", "prompt": ["a", "b", "c"]}
    Path("videos/jobs.jsonl").write_text(json.dumps(line) + '\n{"image": "../cat.png", "prompt": "a"}')
    found, other = wanfast(*MORE, "--jobs", "videos/jobs.jsonl", "--dry-run", "--json").document["results"]
    assert found["plan"]["images"] == {"--continue-from": str(workdir / "videos/old.mp4")}
    assert (found["plan"]["clips"], found["plan"]["total_frames"]) == (3, 6 + 3 * 4)
    assert list(other["plan"]["images"]) == ["--image"]
