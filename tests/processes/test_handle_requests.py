"""What a handle asks of its ranks, and when: options, paths, threads and the end, with ranks that do nothing."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import wanfast
from tests import lora_files
from tests.attention_plan import store_a_plan
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import CancelledError, ConfigError, MissingArtifactError, RankFailedError
from wanfast.runtime.processes import handle as handle_module
from wanfast.runtime.processes.handle import Opened, Video
from wanfast.runtime.store import model_files
from wanfast.runtime.store.model_files import TINY

TINY_ON_CPU = {"model": "tiny", "device": "cpu"}
VIDEO = {"image": "cat.png", "prompt": "a cat", "size": "64x64", "frames": 5, "steps": 2}


class Ranks:
    """Ranks that record their jobs and fail each of them, after `work`."""

    started: ClassVar[list[Ranks]] = []
    work: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, *arguments: object, **named: object) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.ended: list[str] = []
        self.started.append(self)

    def run(self, worker: str, jobs: list[dict[str, Any]], *rest: object, **named: object) -> list[Any]:
        self.jobs += jobs
        type(self).work()
        return [{"error": "as these ranks do", "exit_code": 5}]

    def cancel(self) -> None:
        pass

    def stop(self) -> None:
        self.ended.append("stop")

    def close(self) -> None:
        self.ended.append("close")


@pytest.fixture(autouse=True)
def ranks(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    """The ranks that were started, all in a working folder with a picture."""
    monkeypatch.setattr(Ranks, "started", [])
    monkeypatch.setattr(handle_module, "RankGroups", Ranks)
    return Ranks.started


def effective_of(ranks: list[Ranks]) -> dict[str, Any]:
    effective: dict[str, Any] = ranks[-1].jobs[-1]["effective"]
    return effective


def test_a_program_that_is_started_once_a_rank_is_refused(ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    expected = (
        r"^torchrun started this program 2 times \(WORLD_SIZE=2\), .*: run it without torchrun, and give num_gpus=2 "
    )
    for call in (lambda: wanfast.open(**TINY_ON_CPU), lambda: wanfast.make(**TINY_ON_CPU, **VIDEO)):
        with pytest.raises(ConfigError, match=expected):
            call()
    assert ranks == []


def test_a_new_working_folder_changes_neither_model_nor_artifacts(
    ranks: list[Ranks], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY, "own")
    with wanfast.open(model="own", device="cpu", artifacts_dir="kept") as handle:
        (workdir / "elsewhere").mkdir()
        shutil.move("cat.png", "elsewhere")
        monkeypatch.chdir("elsewhere")
        with pytest.raises(RankFailedError):
            handle.make(**VIDEO)
    models = effective_of(ranks)["models"]
    assert (models["model"], models["artifacts_dir"]) == (str(workdir / "own"), str(workdir / "kept"))
    assert effective_of(ranks)["video"]["image"] == str(workdir / "elsewhere/cat.png")


def test_the_variable_of_the_artifacts_folder_is_read(
    ranks: list[Ranks], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(workdir / "home"))
    monkeypatch.setenv("WANFAST_ARTIFACTS", "~/kept")
    with wanfast.open(**TINY_ON_CPU) as handle, pytest.raises(RankFailedError):
        handle.make(**VIDEO)
    assert effective_of(ranks)["models"]["artifacts_dir"] == str(workdir / "home/kept")
    with wanfast.open(**TINY_ON_CPU, artifacts_dir="near") as handle, pytest.raises(RankFailedError):
        handle.make(**VIDEO)
    assert effective_of(ranks)["models"]["artifacts_dir"] == str(workdir / "near")


def test_a_path_is_a_text_or_a_path_object(ranks: list[Ranks], workdir: Path) -> None:
    with wanfast.open(model=TINY, device="cpu", artifacts_dir=Path("kept")) as handle:
        with pytest.raises(RankFailedError):
            handle.make(**VIDEO | {"image": Path("cat.png")})
        with pytest.raises(ConfigError, match=r"--prompt .* a text or a list of texts is needed"):
            handle.make(**VIDEO | {"prompt": Path("cat.png")})
    assert ranks[-1].jobs[-1]["requested"]["image"] == "cat.png"
    assert effective_of(ranks)["models"]["model"] == str(TINY)


def test_unknown_options_are_named_with_near_ones() -> None:
    with pytest.raises(ConfigError, match="unknown option 'tint': the options are"):
        wanfast.open(tint=1)
    with pytest.raises(ConfigError, match=r"unknown option 'num_gpu': did you mean num_gpus\?"):
        wanfast.open(num_gpu=1)
    with pytest.raises(ConfigError, match="unknown option 'promt': did you mean prompt"):
        wanfast.make(**TINY_ON_CPU, promt="a cat")


@pytest.mark.parametrize(
    "wrong", [{"image": "nope.png"}, {"prompt": " "}, {"size": "16x16"}, {"steps": 0}, {"output": "a.mp4"}], ids=str
)
def test_a_wrong_request_starts_no_ranks(ranks: list[Ranks], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        wanfast.make(**TINY_ON_CPU, **VIDEO | wrong)
    assert not ranks and not Path("artifacts").exists()


def test_files_are_verified_once_for_all_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for owner, name in ((handle_module, "require_experts"), (model_files.ModelFiles, "require")):
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, work=work: calls.append(name) or work(*a))
    with wanfast.open(**TINY_ON_CPU) as handle:
        for _ in range(2):
            with pytest.raises(RankFailedError):
                handle.make(**VIDEO)
    assert sorted(calls) == ["require", "require_experts"]


def test_weights_are_hashed_again_only_if_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY, "own")
    opened: list[Path] = []
    open_file = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or open_file(self, *a, **k))
    first, again = (model_files.locate(str(Path("own").absolute()), "artifacts").fingerprint("vae") for _ in range(2))
    weights = [path for path in opened if path.suffix == ".safetensors"]
    assert first == again and len(weights) == len(set(weights)) > 0
    weights[0].write_bytes(weights[0].read_bytes() + b" ")
    assert model_files.locate(str(Path("own").absolute()), "artifacts").fingerprint("vae") != first


def test_videos_of_several_threads_are_made_one_at_a_time(ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[int] = []

    def work() -> None:
        assert not at_work
        at_work.append(1)
        time.sleep(0.05)
        at_work.clear()

    monkeypatch.setattr(Ranks, "work", staticmethod(work))
    errors: list[BaseException] = []

    def make() -> None:
        try:
            handle.make(**VIDEO)
        except (RankFailedError, AssertionError) as error:
            errors.append(error)

    with wanfast.open(**TINY_ON_CPU) as handle:
        threads = [threading.Thread(target=make) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [type(error) for error in errors] == [RankFailedError] * 3


def test_a_video_that_waits_for_its_turn_is_cancelled_at_once(
    ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ends = threading.Event(), threading.Event()
    monkeypatch.setattr(Ranks, "work", staticmethod(lambda: (begun.set(), ends.wait(20))))
    errors: list[BaseException] = []

    def make() -> None:
        try:
            handle.make(**VIDEO)
        except (RankFailedError, CancelledError) as error:
            errors.append(error)

    with wanfast.open(**TINY_ON_CPU) as handle:
        threads = [threading.Thread(target=make) for _ in range(2)]
        threads[0].start()
        assert begun.wait(20)
        threads[1].start()
        time.sleep(0.5)
        handle.cancel()
        threads[1].join(5)
        assert [type(error) for error in errors] == [CancelledError]
        ends.set()
        threads[0].join(5)
    assert len(ranks[-1].jobs) == 1


def test_a_handle_that_another_thread_closed_makes_no_video(ranks: list[Ranks]) -> None:
    handle = wanfast.open(**TINY_ON_CPU)
    thread = threading.Thread(target=handle.close)
    thread.start()
    thread.join()
    with pytest.raises(ConfigError, match=r"this handle is closed: call wanfast\.open again"):
        handle.make(**VIDEO)
    handle.cancel()
    handle.close()
    assert ranks[-1].ended == ["close"] and not ranks[-1].jobs


def test_a_handle_that_nobody_closes_stops_its_ranks(ranks: list[Ranks]) -> None:
    wanfast.open(**TINY_ON_CPU)
    gc.collect()
    assert ranks[-1].ended == ["stop"]


def test_a_video_is_saved_where_it_is_asked_for(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workdir))
    image = {"image": str(workdir / "cat.png"), "continue_from": None, "last_image": None}
    document = {"effective": {"video": image}, "plan": {"fps": 16, "seed": 7}, "seconds": {}}
    video = Video(np.zeros((5, 64, 48, 3), np.uint8), document)
    assert repr(video) == "Video(5 frames, 48x64, seed 7)"
    video.save(Path("a.mp4"))
    video.save("~/b.mp4")
    assert Path("a.mp4").exists() and Path("b.json").exists()
    assert video.plan == {"fps": 16, "seed": 7}  # only the files name their outputs
    video.save("a.mp4", overwrite=True)
    for path, sheet, words in (
        ("a.mp4", False, "exists: choose another name"),
        ("no/a.mp4", False, "its folder does not exist"),
        ("cat.mp4", True, "is a file that this video is made from"),
    ):
        with pytest.raises(ConfigError, match=words):
            video.save(path, contact_sheet=sheet, overwrite=sheet)


def test_a_plan_of_attention_is_found_when_a_video_is_planned(ranks: list[Ranks]) -> None:
    """A plan must fit the steps, which belong to a video; the models serve every plan and every density."""
    key = store_a_plan(VIDEO, Path("artifacts"))
    sparse = {"attention": "sparse", "dense_share": 0.0}
    with wanfast.open(**TINY_ON_CPU, **sparse, attention_plan="artifact") as handle:
        for own, expected in (
            ({}, (None, key)),
            ({"density": 0.5}, (0.5, None)),
            ({"attention_plan": key}, (None, key)),
        ):
            with pytest.raises(RankFailedError):
                handle.make(**VIDEO, **own)
            models = effective_of(ranks)["models"]
            assert (models["density"], models["attention_plan"], models["dense_share"]) == (*expected, 0.0)
        with pytest.raises(MissingArtifactError, match=f"the plan {key} has steps 2, this run has 3"):
            handle.make(**{**VIDEO, "steps": 3})
    with wanfast.open(**TINY_ON_CPU, **sparse, density=0.5) as handle, pytest.raises(RankFailedError):
        handle.make(**VIDEO, attention_plan="artifact")
    assert effective_of(ranks)["models"]["attention_plan"] == key and len(ranks) == 2
    with pytest.raises(RankFailedError):
        wanfast.make(**TINY_ON_CPU, **VIDEO, **sparse, attention_plan=key)
    assert effective_of(ranks)["models"]["attention_plan"] == key


def test_a_plan_of_attention_may_need_lists_of_all_blocks() -> None:
    """The memory of a handle is planned before a plan of attention is known."""
    asked = {**TINY_ON_CPU, "attention": "sparse", "size": "256x256", "frames": 33}
    whole, half = (Opened.of({**asked, **own}).placed for own in ({"attention_plan": "artifact"}, {"density": 0.5}))
    assert whole.list_bytes(whole.mesh) == 2 * 5 * 2 * 18 * 19 * 4 > half.list_bytes(half.mesh) > 0


def test_recipes_share_models_if_another_kernel_replaces_their_lossy_attention() -> None:
    """A GPU without the kernel of attention in float8 needs --attention auto."""

    def fitting(**asked: Any) -> list[str]:
        opened = Opened.of({**TINY_ON_CPU, "quantize_on_the_fly": True, **asked})
        return [name for name in RECIPES if opened.has_models_of(name)]

    for asked in ({}, {"attention": "auto"}, {"attention": "fa3-fp8"}):
        assert fitting(recipe="near-exact", **asked) == ["near-exact", "fast"]
    with_auto = Opened.of({**TINY_ON_CPU, "quantize_on_the_fly": True, "recipe": "near-exact", "attention": "auto"})
    plan = with_auto.plan({**VIDEO, "recipe": "fast", "steps": 40})
    assert plan.fp8 is None and plan.curve is not None and plan.config.models.quantize == "fp8-rowwise"
    assert fitting(quantize="fp8-rowwise") == []  # exact attention, which neither recipe has
    assert "near-exact" not in fitting(recipe="exact", quantize="fp8-rowwise", attention="auto")


def test_a_recipe_of_a_video_is_refused_if_the_models_fit_none(ranks: list[Ranks], tmp_path: Path) -> None:
    own = str(lora_files.tiny_without_loras(tmp_path))
    with wanfast.open(**{**TINY_ON_CPU, "model": own}) as handle:
        with pytest.raises(
            ConfigError,
            match=r"^--recipe fast: the loaded models are not those of this recipe: leave out --recipe, or use a "
            r"handle or a server that is started with --recipe fast$",
        ):
            handle.make(**VIDEO, recipe="fast")
        assert ranks[-1].jobs == []


def test_a_video_has_a_recipe_of_its_own_only_if_its_models_are_loaded(ranks: list[Ranks]) -> None:
    of_models = {**RECIPES["near-exact"].options, "quantize_on_the_fly": True}
    with wanfast.open(**TINY_ON_CPU, **of_models) as handle:
        with pytest.raises(
            ConfigError,
            match=r"^--recipe exact: the loaded models are not .*: use a recipe that fits the loaded models "
            r"\(near-exact, fast\)$",
        ):
            handle.make(**VIDEO, recipe="exact")
        assert ranks[-1].jobs == []
        with pytest.raises(RankFailedError):
            handle.make(**VIDEO, recipe="near-exact")
        assert effective_of(ranks)["models"]["recipe"] == "near-exact"
