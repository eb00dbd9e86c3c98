"""The Python API: a handle that starts ranks, keeps them, cancels, and starts dead ones again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import wanfast
from tests.forked import ForkedPopen
from wanfast.runtime.errors import CancelledError, ConfigError, RankFailedError, WanFastError
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.processes import handle as handle_module
from wanfast.runtime.processes import launch
from wanfast.runtime.processes.handle import Handle
from wanfast.runtime.store.model_files import TINY

ROOT = Path(wanfast.__file__).parents[1]
SMALL = {"image": "star.png", "prompt": "The star goes right.", "size": "64x64", "frames": 5, "steps": 2, "seed": 1}
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python-api.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def star(workdir: Path) -> Path:
    """A working folder with the examples' image in it, under the path of the repository too."""
    Path("wanfast/assets").mkdir(parents=True)
    Path("wanfast/assets/examples").symlink_to(TINY.parent / "examples")
    (workdir / "star.png").write_bytes((TINY.parent / "examples/star.png").read_bytes())
    return workdir


def python(code: str, folder: Path) -> str:
    """What a program of its own prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_one_video_runs_and_repeats(star: Path, request: pytest.FixtureRequest) -> None:
    (star / "python.mp4").touch()  # as an earlier run of the example leaves it
    out = python(EXAMPLES[0] + "import sys\nprint('torch' in sys.modules)", star)
    assert out.splitlines() == ["(5, 128, 128, 3)", "8", "False"]
    first = (star / "python.mp4").read_bytes()
    wanfast = request.getfixturevalue("wanfast")  # not sooner, because programs are forks with it
    outcome = wanfast("generate", "--from", "python.json", "--output", "again.mp4")
    assert outcome.exit_code == 0, outcome.err
    assert (star / "again.mp4").read_bytes() == first


def test_the_example_of_three_prompts_loads_the_models_once(star: Path, forked: None) -> None:
    python(EXAMPLES[1], star)
    assert sorted(path.name for path in star.glob("*.mp4")) == ["left.mp4", "right.mp4", "up.mp4"]
    loads = [json.loads((star / f"{name}.json").read_text())["loading"].keys() for name in ("right", "left", "up")]
    assert "high_noise" in loads[0] and all("high_noise" not in of_later for of_later in loads[1:])


def test_the_example_of_a_session_runs(star: Path, forked: None) -> None:
    assert python(EXAMPLES[2], star).startswith("(5, 128, 128, 3)")


def ranks_of(handle: Handle) -> list[psutil.Process]:
    """Returns the ranks: torchrun's agent starts each in a session of its own, unlike a launcher's other children."""
    launchers = [psutil.Process(launcher.pid) for launcher in handle._ranks._launchers.values()]
    return [child for launcher in launchers for child in launcher.children() if os.getsid(child.pid) == child.pid]


@pytest.fixture(scope="module")
def handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Handle]:
    """Two CPU ranks, opened by a thread that ends: they must not end with it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(launch.subprocess, "Popen", ForkedPopen)
    folder, opened = tmp_path_factory.mktemp("handle"), []
    options = {"model": "tiny", "device": "cpu", "num_gpus": 2, "artifacts_dir": str(folder)}

    def open_and_leave() -> None:
        opened.append(wanfast.open(**options))
        while not ranks_of(opened[0]):
            time.sleep(0.05)

    thread = threading.Thread(target=open_and_leave)
    thread.start()
    thread.join()
    with opened[0] as made:
        yield made
    patch.undo()


def test_any_thread_makes_videos_and_hears_of_steps(star: Path, handle: Handle) -> None:
    stages: list[tuple[str, int, int]] = []
    videos = [handle.make(**SMALL, on_progress=lambda *state: stages.append(state))]
    thread = threading.Thread(target=lambda: videos.append(handle.make(**SMALL)))
    thread.start()
    thread.join()
    first, second = (video.frames for video in videos)
    assert first.shape == (5, 64, 64, 3) and first.dtype == np.uint8 and np.array_equal(first, second)
    assert stages and all(done <= total for _, done, total in stages)
    assert not list(handle._folder.glob("frames/*"))
    assert videos[0].plan["mesh"]["ulysses"] * videos[0].plan["mesh"]["cfg"] == 2
    assert handle._ranks._numbers == {0: 0}  # no group died with the thread that opened the handle


def test_frames_arrive_in_order_while_a_later_clip_is_denoised(star: Path, handle: Handle) -> None:
    pieces: list[np.ndarray] = []
    stages: list[str] = []
    before: list[int] = []  # the number of reports before each piece

    def arrive(plan: Plan, frames: np.ndarray) -> None:
        assert plan.config.video.total_frames == 9
        pieces.append(frames)
        before.append(len(stages))

    clips = {"prompt": ["The star goes right."] * 2, "steps": 20}
    video = handle.make(**SMALL | clips, on_frames=arrive, on_progress=lambda stage, done, total: stages.append(stage))
    assert np.array_equal(np.concatenate(pieces), video.frames)
    assert before[0] < len(stages)


def in_the_middle(handle: Handle) -> tuple[threading.Thread, list[WanFastError]]:
    """Lets a thread make a long video, waits for its second step, and returns the thread and its error to come."""
    errors: list[WanFastError] = []
    begun = threading.Event()

    def endless() -> None:
        try:
            handle.make(**SMALL | {"steps": 1000}, on_progress=lambda stage, done, total: done > 1 and begun.set())
        except WanFastError as error:
            errors.append(error)

    thread = threading.Thread(target=endless)
    thread.start()
    assert begun.wait(60)
    return thread, errors


def test_a_video_is_cancelled_between_two_steps_and_the_ranks_stay(star: Path, handle: Handle) -> None:
    before = {process.pid for process in ranks_of(handle)}
    thread, errors = in_the_middle(handle)
    handle.cancel()
    thread.join(30)
    assert [(type(error), str(error)) for error in errors] == [(CancelledError, "cancelled")]
    assert {process.pid for process in ranks_of(handle)} == before
    assert handle.make(**SMALL).frames.shape == (5, 64, 64, 3)


def test_a_cancel_while_a_video_is_planned_ends_that_video_alone(
    star: Path, handle: Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled_meanwhile(*arguments: object, **named: object) -> object:
        handle.cancel()
        return resolve(*arguments, **named)

    resolve = handle_module.resolve
    handle.cancel()  # nothing runs
    with monkeypatch.context() as patch:
        patch.setattr(handle_module, "resolve", cancelled_meanwhile)
        with pytest.raises(CancelledError):
            handle.make(**SMALL)
    assert handle.make(**SMALL).frames.shape == (5, 64, 64, 3)


def test_a_cancel_that_comes_too_late_for_the_ranks_still_ends_the_video(star: Path, handle: Handle) -> None:
    with pytest.raises(CancelledError):
        handle.make(**SMALL, on_progress=lambda stage, done, total: done == total != 0 and handle.cancel())
    assert not list(handle._folder.glob("frames/*"))


@pytest.mark.parametrize(("callback", "steps"), [("on_progress", 1000), ("on_frames", 2)])
def test_an_exception_of_a_callback_ends_the_video_and_the_ranks_stay(
    star: Path, handle: Handle, callback: str, steps: int
) -> None:
    def broken(*state: object) -> None:
        raise ZeroDivisionError

    before = {process.pid for process in ranks_of(handle)}
    with pytest.raises(ZeroDivisionError):
        handle.make(**SMALL | {"steps": steps}, **{callback: broken})
    assert not list(handle._folder.glob("frames/*"))
    assert handle.make(**SMALL).frames.shape == (5, 64, 64, 3)
    assert {process.pid for process in ranks_of(handle)} == before


def test_on_progress_cannot_wait_for_its_own_video(star: Path, handle: Handle) -> None:
    for forbidden in (handle.close, lambda: handle.make(**SMALL)):
        with pytest.raises(ConfigError, match="on_progress cannot"):
            handle.make(**SMALL, on_progress=lambda *state, forbidden=forbidden: forbidden())


def test_a_video_without_guidance_runs_on_the_ranks_of_a_guided_one(star: Path, handle: Handle) -> None:
    assert handle.make(**SMALL).plan["mesh"]["cfg"] == 2
    video = handle.make(**SMALL, guidance_high_noise=1, guidance_low_noise=1)
    assert (video.plan["forwards"], video.plan["mesh"]["cfg"]) == (SMALL["steps"], 2)


def test_ranks_that_died_idle_cost_no_video(star: Path, handle: Handle) -> None:
    handle.make(**SMALL)
    victim = ranks_of(handle)[0]
    victim.send_signal(signal.SIGKILL)
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert handle.make(**SMALL).frames.shape == (5, 64, 64, 3)


def test_dead_ranks_are_started_again(star: Path, handle: Handle) -> None:
    thread, errors = in_the_middle(handle)
    victim = ranks_of(handle)[0]
    victim.send_signal(signal.SIGKILL)
    thread.join(60)
    (error,) = errors
    assert isinstance(error, RankFailedError) and "was killed by SIGKILL" in str(error)
    assert handle.make(**SMALL).frames.shape == (5, 64, 64, 3)
    assert victim.pid not in {process.pid for process in ranks_of(handle)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "--steps 0: use 1 to 1000"),
        ({"precision": "fp32"}, "precision is an option of the handle: pass it to wanfast.open"),
        ({"output": "a.mp4"}, "output is an option of the output file: pass it to Video.save"),
        ({"tint": "red"}, "unknown option 'tint': the options are artifacts_dir"),
        ({"sed": 3}, "unknown option 'sed': did you mean seed"),
        ({"prompt": " "}, "--prompt has no words"),
    ],
    ids=str,
)
def test_wrong_options_are_errors_of_one_line(
    star: Path, handle: Handle, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        handle.make(**SMALL | options)


def test_a_handle_is_refused_what_it_cannot_keep(star: Path, handle: Handle) -> None:
    with pytest.raises(ConfigError, match="prompt is an option of a video"):
        wanfast.open(model="tiny", prompt="a")
    with pytest.raises(ConfigError, match="a handle uses one machine"):
        wanfast.open(model="tiny", device="cpu", nnodes=2, rdzv_endpoint="a:1")
    with pytest.raises(ConfigError, match="one video at a time: use num_gpus=1"):
        wanfast.open(model="tiny", device="cpu", num_gpus=2, cfg_parallel=1, ulysses=1)
    video = handle.make(**SMALL)
    video.save("a.mp4")
    with pytest.raises(ConfigError, match=r"a\.mp4 exists"):
        video.save("a.mp4")


def test_a_closed_handle_leaves_no_process(star: Path) -> None:
    opened = wanfast.open(model="tiny", device="cpu", artifacts_dir=str(star / "artifacts"))
    while not ranks_of(opened):
        time.sleep(0.05)
    ranks = ranks_of(opened)
    opened.close()
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    with pytest.raises(ConfigError, match="closed"):
        opened.make(**SMALL)
    opened.close()
