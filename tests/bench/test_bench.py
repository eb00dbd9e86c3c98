"""Tests `wanfast bench`: which cells are planned, that a bench continues, and what its report holds."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import lora_files
from tests.bench.results import of_published_size, program, results_of_two
from tests.conftest import Machine, Outcome
from wanfast.bench import cells as cells_module
from wanfast.bench import figures
from wanfast.bench import measure as measure_module
from wanfast.bench.cells import ANOTHER_SEED, Bench, Row, planned, recipes_of
from wanfast.bench.compare import compared
from wanfast.bench.frames import read_frames, write_frames
from wanfast.bench.published import PUBLISHED_S
from wanfast.bench.work import WORKS
from wanfast.commands import bench as bench_command
from wanfast.commands.bench import remarks_of, table_of
from wanfast.magcache_calib.clips import read_set
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.errors import ConfigError, NeedsGpuError
from wanfast.runtime.facts.flop import bf16_peak, forward_flop
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.planning.past_runs import fp8_share
from wanfast.runtime.planning.plan_json import plan_json
from wanfast.runtime.planning.shortened import least_steps
from wanfast.runtime.processes.handle import Handle, Video
from wanfast.runtime.store import lora_pairs, model_files

Wanfast = Callable[..., Outcome]
ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
SMALL: dict[str, Any] = {"model": "tiny", "device": "cpu", "size": "64x64", "frames": 5, "steps": 3}
SHAPE = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
BENCH = ("bench", *SHAPE, "--set", "set", "--json")


@pytest.fixture
def clips(workdir: Path) -> Path:
    """Writes a set of two clips; the second one is a caption of the tiny model's world."""
    (workdir / "set").mkdir()
    shutil.copy("cat.png", "set/a.png")
    prompts = ("a cat", "The red star goes up.")
    lines = [json.dumps({"image": "a.png", "prompt": prompt}) for prompt in prompts]
    (workdir / "set/clips.jsonl").write_text("\n".join(lines))
    return workdir / "set"


@pytest.fixture
def videos(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Returns a list of the options of each video that is made, the warm-up videos among them."""
    made: list[dict[str, Any]] = []
    make = Handle.make

    def noted(handle: Handle, **options: Any) -> Video:
        made.append(options)
        return make(handle, **options)

    monkeypatch.setattr(Handle, "make", noted)
    return made


def bench_of(folder: Path, *recipes: Any, **named: Any) -> Bench:
    given = named.pop("given", SMALL)
    files = model_files.locate(given["model"], "artifacts")
    return Bench(recipes, tuple(read_set(folder, 0)), given, files, **named)


def test_groups_of_recipes_and_single_ones() -> None:
    assert recipes_of("ours") == ("exact", "near-exact", "fast")
    assert set(recipes_of("published,ours,few-steps")) == set(RECIPES) and recipes_of("published,ours")[0] == "baseline"
    assert recipes_of("fast, ours") == ("fast", "exact", "near-exact")
    with pytest.raises(ConfigError, match="--recipes fasst: no such recipe: did you mean fast"):
        recipes_of("exact,fasst")
    with pytest.raises(ConfigError, match="--recipes has an empty value"):
        recipes_of(",")


def test_each_video_has_a_key_of_its_own_and_the_same_one_again(clips: Path) -> None:
    def keys(*recipes: Any, **named: Any) -> list[str]:
        return [cell.key for row in planned(bench_of(clips, *recipes, **named)) for cell in row.cells]

    found = keys("exact", "baseline")
    assert len(found) == len(set(found)) == 2 * 2 * 2 + 2  # recipes, repeats, clips; the base's with another seed
    assert keys("exact", "baseline") == found
    assert keys("exact", "baseline", repeats=3)[:4] == found[:4]
    for given in ({"steps": 4}, {"frames": 1}, {"attention": "math"}):
        assert not set(found) & set(keys("exact", "baseline", given=SMALL | given))
    shutil.copy("set/a.png", "set/b.png")
    Path("set/clips.jsonl").write_text(Path("set/clips.jsonl").read_text().replace("a.png", "b.png"))
    assert keys("exact", "baseline") == found  # the picture's bytes count, and not its name


def test_the_code_counts_in_a_key(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(bench_of(clips, "exact"))[0].cells[0].key
    monkeypatch.setattr(cells_module, "digest_of_code", lambda *patterns: "other")
    assert planned(bench_of(clips, "exact"))[0].cells[0].key != before


def test_a_recipe_of_two_images_needs_a_set_with_last_images(clips: Path) -> None:
    """Without them, its row has the reason; with them, the warm-up and the measured videos have both images."""
    _, row = planned(bench_of(clips, "exact", "first-last-4"))
    assert str(row.error).startswith(
        "--recipes first-last-4 needs a last image in each line of the set: add --set FOLDER with such lines, or use"
    )
    lines = Path("set/clips.jsonl").read_text().splitlines()
    Path("set/clips.jsonl").write_text("\n".join(json.dumps({**json.loads(x), "last_image": "a.png"}) for x in lines))
    lora = str(lora_files.write(clips / "a.safetensors", {"blocks.0.ffn.0.diff_b": torch.full((640,), 0.1)}))
    of_both = {name: value for name, value in SMALL.items() if name != "steps"} | {"lora": [lora]}
    rows = planned(bench_of(clips, "exact", "first-last-4", given=of_both))
    assert [row.error for row in rows] == [None, None]
    assert all(Path(cell.options["last_image"]).name == "a.png" for row in rows for cell in row.cells)
    assert all("last_image" in video for row in rows for video in row.warm_ups)
    assert {len(plan.schedule) for plan in rows[1].plans} == {4}


def test_missing_experts_are_quantized_with_their_loras(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cells_module, "apart", lambda work, **arguments: WORKS[work](**json.loads(json.dumps(arguments)))
    )
    lora = lora_files.write(clips / "a.safetensors", {"blocks.0.ffn.0.diff_b": torch.full((640,), 0.1)})
    (row,) = planned(bench_of(clips, "exact", given=SMALL | {"quantize": "int8-weight-only", "lora": [str(lora)]}))
    assert row.error is None and len(list(Path("artifacts/quantized").glob("*/manifest.json"))) == 2


def test_a_recipe_without_its_kernel_is_a_row_with_the_reason(clips: Path) -> None:
    rows = planned(bench_of(clips, "exact", "fa3", "fastest-original"))
    assert [type(row.error) for row in rows] == [type(None), NeedsGpuError, NeedsGpuError]
    assert str(rows[1].error).startswith("--attention fa3 needs a GPU") and not rows[1].cells
    with pytest.raises(NeedsGpuError):
        planned(bench_of(clips, "fa3"))


def test_several_gpus_share_the_videos_of_published_recipes(clips: Path, machine: Machine) -> None:
    machine(2, 85)
    rows = planned(bench_of(clips, "baseline", "fa3", "exact", given=SMALL | {"device": "cuda", "num_gpus": 2}))
    baseline, fa3, exact = rows
    assert "fa3-fwd is not installed" in str(fa3.error) and not isinstance(fa3.error, NeedsGpuError)
    assert [plan.mesh.ulysses for plan in (*baseline.plans, *exact.plans)] == [2, 2, 1, 1]
    assert baseline.plans[0].config.ranks.dit_fsdp == "on" and exact.plans[0].mesh.cfg == 2
    assert baseline.cells[0].inputs["hardware"]["gpus"] == ["NVIDIA H100"] * 2


def test_an_option_reaches_only_the_recipes_that_can_use_it(clips: Path) -> None:
    given = SMALL | {"attention": "auto", "magcache_interpolate": True, "verify": True}
    bench = bench_of(clips, "exact", "magcache", "int8", given=given)
    assert "magcache_interpolate" not in bench.options_of("exact") and "verify" not in bench.options_of("exact")
    assert bench.options_of("magcache")["magcache_interpolate"] and bench.options_of("int8")["verify"]
    few = bench_of(clips, "hybrid", "lightning-4", given=SMALL | {"steps": 9, "guidance_gate": 0.5})
    assert {"steps", "guidance_gate"} & few.options_of("hybrid").keys() == {"guidance_gate"}
    assert not {"steps", "guidance_gate"} & few.options_of("lightning-4").keys()
    (_, row) = planned(bench_of(clips, "exact", "magcache", given=given))
    assert plan_json(row.plans[0])["overridden"] == {"attention": "auto", "magcache_interpolate": True}


def test_few_steps_run_both_experts_and_skip_nothing(clips: Path) -> None:
    given = SMALL | {"steps": 12, "attention": "auto", "magcache_interpolate": True}
    rows = planned(bench_of(clips, "magcache", given=given, steps_measured=6, no_quality="few steps"))
    measured = [rows[0].opened.plan(cell.options) for cell in rows[0].cells if rows[0].opened]
    assert all(len(plan.schedule) == 6 and plan.curve is None for plan in measured)
    assert len(rows[0].cells) == 4 and not any(cell.inputs["has_frames"] for cell in rows[0].cells)
    least = least_steps(rows[0].plans[0].config.video, rows[0].plans[0].spec)
    warm_up = rows[0].opened.plan(rows[0].warm_ups[0]) if rows[0].opened else None
    assert warm_up and len(warm_up.schedule) == least and set(warm_up.experts) == {"high_noise", "low_noise"}
    with pytest.raises(ConfigError, match=f"--steps-measured 13: .* use {least} to 12"):
        planned(bench_of(clips, "magcache", given=given, steps_measured=13))


def test_few_steps_have_the_share_of_float8_of_the_whole_video(clips: Path) -> None:
    given = SMALL | {"steps": 40, "quantize_on_the_fly": True}
    rows = planned(bench_of(clips, "near-exact", "fast", given=given, steps_measured=4, no_quality="few steps"))
    for row in rows:
        assert row.opened is not None, row.error
        (whole, *_), measured, warm_up = (
            row.plans, row.opened.plan(row.cells[0].options), row.opened.plan(row.warm_ups[0])
        )  # fmt: skip
        assert [len(plan.fp8.steps) for plan in (whole, measured, warm_up) if plan.fp8] == [30, 3, 1]
    near_exact, fast = (fp8_share(row.plans[0]) for row in rows)
    assert near_exact == 0.75 and 0.65 < fast < 0.75  # more forwards are skipped in the middle
    short = planned(bench_of(clips, "near-exact", given=given | {"steps": 2}, steps_measured=2, no_quality="few"))
    assert short[0].opened and short[0].error is None
    assert not short[0].opened.plan(short[0].cells[0].options).fp8.steps  # as in the whole video


def test_a_bench_takes_attention_in_float8(wanfast: Wanfast, clips: Path) -> None:
    few = ("--random-weights", "--steps-measured", "2", "--repeats", "1")
    outcome = wanfast(*BENCH, "--recipes", "exact", "--attention", "fa3-fp8", *few)
    assert outcome.exit_code == 0, outcome.err
    (row,) = outcome.document["rows"]
    assert row["attention"] == "fa3-fp8" and row["overridden"] == ["--attention", "fa3-fp8"]
    assert row["estimated"].endswith("; attention in float8: 1 of 2 steps, 33 % of the whole video")


def test_random_weights_of_a_large_model_are_not_written_without_a_gpu(
    wanfast: Wanfast, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are 40 GB, and only then a plan would say that they do not fit; with --device the user decides."""
    monkeypatch.setattr(bench_command, "with_random_weights", lambda *given: pytest.fail("were written"))
    outcome = wanfast("bench", "--set", str(clips), "--recipes", "exact", "--random-weights")
    assert outcome.exit_code == 2
    assert "error: --random-weights: no GPU was found, and Wan2.2-I2V-A14B needs one: " in outcome.err


def test_a_distilled_recipe_without_weights_is_a_row_with_the_reason(clips: Path, tmp_path: Path) -> None:
    given = SMALL | {"model": str(lora_files.tiny_without_loras(tmp_path))}
    bench = bench_of(clips, "exact", "lightning-4", given=given)
    _, row = planned(bench)
    fix = f"put LoRAs into {bench.files.root}/loras/lightning-4/EXPERT.safetensors, or use another recipe"
    assert row.opened is None and str(row.error) == f"--recipes lightning-4 needs distilled weights: {fix}"


def test_a_downloaded_pair_of_loras_is_taken(clips: Path, tmp_path: Path) -> None:
    """For the experts that the recipe distils; LoRAs of the model's own folder come first."""
    files: Any = SimpleNamespace(root=tmp_path / "model", spec=A14B, artifacts=tmp_path / "artifacts")
    bench = dataclasses.replace(bench_of(clips, "hybrid", given=SMALL), files=files, given={})
    name = lora_pairs.PAIRS["lightning-seko-v1"].files["low_noise"]
    of_low_noise = lora_pairs.folder_of("lightning-seko-v1", files.artifacts) / name
    assert bench.options_of("hybrid") == {"recipe": "hybrid"}
    of_low_noise.parent.mkdir(parents=True)
    of_low_noise.touch()
    assert bench.options_of("hybrid") == {"recipe": "hybrid", "lora_low_noise": (str(of_low_noise),)}
    assert bench.options_of("lightning-4") == {"recipe": "lightning-4"}  # its other file is missing
    assert bench.options_of("exact") == {"recipe": "exact"}
    (files.root / "loras/hybrid").mkdir(parents=True)
    assert bench.options_of("hybrid") == {"recipe": "hybrid"}


def test_what_to_download_is_named(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_module, "pair_for", lambda recipe, spec: "lightning-seko-v1")
    given = SMALL | {"model": str(lora_files.tiny_without_loras(tmp_path))}
    _, row = planned(bench_of(clips, "exact", "lightning-4", given=given))
    assert "needs distilled weights: run `wanfast download --lora lightning-seko-v1`, or" in str(row.error)


class _Page(HTMLParser):
    """Collects the addresses and the cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "poster", "srcset")]
        if tag not in ("meta", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_a_report_holds_rows_pictures_and_videos(
    wanfast: Wanfast, clips: Path, videos: list[dict[str, Any]], machine: Machine
) -> None:
    outcome = wanfast(*BENCH, "--recipes", "exact,baseline,fa3-tf32")
    assert outcome.exit_code == 0 and "earlier run" not in outcome.err, outcome.err
    report, folder = outcome.document, Path("bench")
    assert json.loads((folder / "report.json").read_text()) == report
    assert [row["status"] for row in report["rows"]] == ["measured", "measured", "needs CUDA"]
    exact, baseline, other = report["rows"]
    assert exact["ratio"] == 1.0 and baseline["ratio"] > 0 and other["reason"].startswith("--tf32 needs a GPU")
    assert exact["quality"]["identical"] and exact["quality"]["psnr"] is None
    assert baseline["quality"]["psnr"] > 30  # the decoder in bf16 instead of float32
    assert exact["quality"]["prompt_following"]["of"] == 1  # one of two prompts is a caption
    floor = report["noise_floor"]
    assert floor["again, the same seed"]["identical"] and floor["another seed"]["psnr"] < 60
    assert exact["forwards"] == {"computed": 6.0, "of": 6} and exact["peak_share"] is None
    assert exact["seconds"].keys() == {"encode", "denoise", "decode"} and exact["video_s"]["of"] == 2
    assert exact["start"]["warm_up_videos"] == 2 and exact["attention"] == "flash"
    assert {"hardware", "versions", "commit", "options"} <= report.keys()
    made = json.loads((Path("artifacts/bench") / exact["cells"][0] / "cell.json").read_text())["plan"]
    assert [clip["video_size"] for clip in report["clips"]] == [f"{made['width']}x{made['height']}"] * 2
    assert report["clips"][0]["video_size"] != report["size"]  # which gives only the area
    results = results_of_two(Path("copy"))
    (results / "bench-4xh100.json").write_text(json.dumps(report | of_published_size()))
    of_table = {name: row["on"]["4"] for name, row in program("readme_table").table(results)["rows"].items()}
    assert of_table["exact"]["video_s"] == exact["video_s"]["median"] and of_table["fa3-tf32"]["why"] == "needs CUDA"
    for name in ("waterfall.png", "quality.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert not page.open and len(page.links) == 2 + 2  # pictures, and a video of each measured row
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|url\(", re.sub(r"data:[^\"]*", "", text))
    order = [options["seed"] for options in videos]
    assert order == [0, 1, 0, 1, ANOTHER_SEED, ANOTHER_SEED + 1, 0, 1, 0, 1, *[0, 1, 0, 1, 0, 1, 0, 1]]

    videos.clear()
    shutil.rmtree(Path("artifacts/bench") / baseline["cells"][3])
    outcome = wanfast(*BENCH, "--recipes", "exact,baseline")
    again = outcome.document["rows"]
    assert [options["seed"] for options in videos] == [1, 1]  # a warm-up video and the missing one
    remove = f"rm -r {Path('artifacts/bench').absolute()}"
    assert f"note: 9 of 10 videos were measured by an earlier run; to measure again, run `{remove}`" in outcome.err
    assert again[0] == exact and again[1]["cells"] == baseline["cells"]


def test_a_ratio_within_the_spread_is_unclear() -> None:
    def of(median: float, spread: float) -> dict[str, float]:
        return {"median": median, "spread": spread, "of": 2}

    assert figures._is_unclear(of(9.8, 0.1), of(10.0, 0.3)) and figures._is_unclear(of(9.8, 0.3), of(10.0, 0.1))
    assert not figures._is_unclear(of(9.0, 0.3), of(10.0, 0.3)) and not figures._is_unclear(
        of(10.1, 0.0), of(10.0, 0.0)
    )


def test_the_terminal_shows_what_replaced_options_and_which_ratios_are_unclear() -> None:
    figures_of = {
        "status": "measured", "video_s": {"median": 10.0, "spread": 0.2, "of": 2}, "ratio": 1.0, "ratio_unclear": False,
        "forwards": {"computed": 6, "of": 6}, "peak_memory_bytes": 1e9, "estimated": None, "quality": None,
        "reason": None, "overridden": [], "attention": "flash",
    }  # fmt: skip
    auto = {"overridden": ["--attention", "auto"], "ratio": 0.99}
    rows = [
        figures_of | {"recipe": "exact"}, figures_of | auto | {"recipe": "fa3", "ratio_unclear": True},
        figures_of | auto | {"recipe": "int8"},
        figures_of | auto | {"recipe": "fa3-tf32", "status": "needs CUDA", "reason": "no GPU", "ratio_unclear": None},
    ]  # fmt: skip
    report = {"base": "exact", "rows": rows}
    assert list(table_of(report).columns[2].cells) == ["1.000", "0.990 ?", "0.990", ""]
    assert list(table_of(report).columns[1].cells) == ["10.00 ± 0.20"] * 3 + ["needs CUDA"]
    one = figures_of | {"recipe": "exact", "video_s": {"median": 10.0, "spread": 0.0, "of": 1}}
    assert list(table_of(report | {"rows": [one]}).columns[1].cells) == ["10.00"]  # one repeat has no spread
    assert remarks_of(report) == [
        "?: unclear, because the seconds differ from those of exact by less than their spread",
        "with --attention auto (attention: flash): fa3, int8",
        "fa3-tf32: no GPU",
    ]
    assert remarks_of({"base": "exact", "rows": rows[:1]}) == []


def test_an_interrupted_bench_says_how_to_go_on(
    wanfast: Wanfast, clips: Path, videos: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = cells_module.Cells.put

    def interrupted(*arguments: Any) -> None:
        put(*arguments)
        raise KeyboardInterrupt

    once = (*BENCH, "--recipes", "exact", "--repeats", "1")
    monkeypatch.setattr(cells_module.Cells, "put", interrupted)
    monkeypatch.setattr(sys, "argv", ["wanfast", *once])
    outcome = wanfast(*once)
    assert outcome.exit_code == 130 and "note: videos stored: 1; to continue, run `wanfast " in outcome.err
    assert not Path("bench").exists()
    monkeypatch.setattr(cells_module.Cells, "put", put)
    videos.clear()
    outcome = wanfast(*once)
    assert outcome.exit_code == 0 and len(videos) == 2 + 3  # of four cells
    assert "again, the same seed" not in outcome.document["noise_floor"]  # which a second repeat would show


def test_a_recipe_that_fails_leaves_the_others(wanfast: Wanfast, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measure_module._measure

    def failing(row: Row, *arguments: Any) -> None:
        if row.recipe == "baseline":
            raise ConfigError("no such luck")
        measure(row, *arguments)

    monkeypatch.setattr(measure_module, "_measure", failing)
    outcome = wanfast(*BENCH, "--recipes", "baseline,exact", "--repeats", "1")
    assert outcome.exit_code == 6 and "--recipes: baseline failed" in outcome.err
    failed, exact = outcome.document["rows"]
    assert (failed["status"], failed["reason"]) == ("failed", "no such luck")
    assert exact["status"] == "measured" and exact["ratio"] is None and exact["quality"] is None
    assert outcome.document["quality_left_out"] == "baseline was not measured"


def test_random_weights_and_few_steps_say_so(wanfast: Wanfast, clips: Path) -> None:
    few = ("--random-weights", "--steps-measured", "2", "--repeats", "1")
    outcome = wanfast(*BENCH, "--recipes", "exact,magcache", "--attention", "auto", *few)
    assert outcome.exit_code == 0, outcome.err
    report = outcome.document
    exact, magcache = report["rows"]
    assert report["quality_left_out"] == "the weights are random" and exact["quality"] is None
    assert exact["estimated"] == "denoising: 4 forwards in 2 steps were measured, times 6/4 for 3 steps"
    assert exact["forwards"] == {"computed": 6.0, "of": 6}
    assert magcache["status"] == "not available" and "no curve ships for these weights" in magcache["reason"]
    text = Path("bench/report.html").read_text()
    assert "No quality is shown: the weights are random." in text and "<video" not in text
    assert not Path("bench/quality.png").exists()
    (cell,) = [folder for folder in Path("artifacts/bench").iterdir() if folder.name == exact["cells"][0]]
    assert sorted(file.name for file in cell.iterdir()) == ["cell.json", "manifest.json"]
    document = json.loads((cell / "cell.json").read_text())
    denoise_s = sum(
        json.loads((cell.parent / key / "cell.json").read_text())["seconds"]["denoise"] for key in exact["cells"]
    )
    assert exact["seconds"]["denoise"]["median"] == pytest.approx(denoise_s / 2 * 6 / 4, abs=2e-3)
    assert len(list(Path("artifacts/checkpoints").glob("random-*/wanfast.json"))) == 1
    assert document["plan"]["steps"] == {"high_noise": 1, "low_noise": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repeats", "0"), "--repeats 0: use 1 or more"),
        (
            ("--steps-measured", "9"),
            "--steps-measured 9: the video has 3 steps, and each of its experts must run at ",
        ),
        (("--steps-measured", "1"), "at least one step: use 2 to 3"),
        (("--recipes", "fa3"), "--attention fa3 needs a GPU"),
        (("--set", "gone"), "--set"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    wanfast: Wanfast, clips: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = wanfast(*BENCH, *arguments)
    assert outcome.exit_code == 2 and message in outcome.err
    assert not Path("bench").exists() and not Path("artifacts/quantized").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repeats", "0"), "--repeats 0: use 1 or more"),
        (("--recipes", "fasst"), "--recipes fasst: no such recipe"),
        (("--recipes", "fa3"), "--attention fa3 needs a GPU"),
        (("--output", "cat.png"), "/cat.png is a file, not a folder); choose another folder or name"),
        ((), "the report needs jinja2: run `pip install 'wanfast[bench]'`"),
        (("--random-weights",), "the report needs jinja2: run `pip install 'wanfast[bench]'`"),
    ],
)
def test_without_the_extra_wrong_options_are_refused_first(
    wanfast: Wanfast, clips: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(bench_command, "find_spec", lambda name: None if name == "jinja2" else name)
    before = sorted(clips.parent.rglob("*"))
    outcome = wanfast(*BENCH, *arguments)
    assert outcome.exit_code == 2 and message in outcome.err and sorted(clips.parent.rglob("*")) == before


def test_frames_are_stored_without_loss(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    write_frames(frames, tmp_path / "frames.mp4", 16)
    assert np.array_equal(read_frames(tmp_path / "frames.mp4"), frames)


def test_one_equal_clip_does_not_make_the_psnr_infinite(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 250, (5, 32, 32, 3), dtype=np.uint8)
    for name, other in {"base": frames, "moved": frames + 5}.items():
        write_frames(other, tmp_path / name, 16)
    base, moved = (str(tmp_path / name) for name in ("base", "moved"))
    found = compared({"base": [base, base], "other": [base, moved]}, "base", ["a", "b"], True, "cpu")
    assert found["base"]["identical"] and found["base"]["psnr"] is None and found["base"]["ssim"] == 1
    expected = -10 * np.log10((5 / 255) ** 2 / 2)
    assert found["other"]["psnr"] == pytest.approx(expected, abs=0.01) and not found["other"]["identical"]
    assert found["other"]["psnr_by_clip"] == [None, pytest.approx(expected - 10 * np.log10(2), abs=0.01)]
    assert found["other"]["prompt_following"] is None


def test_the_published_seconds_are_those_of_the_page() -> None:
    page = (ROOT / "docs/several-gpus.md").read_text()
    rows = re.findall(r"\| ([\d.]+) s \| `wanfast generate [^`]*--recipe ([\w-]+)`", page)
    assert {recipe: float(seconds) for seconds, recipe in rows} == PUBLISHED_S


def test_peaks_and_flop() -> None:
    assert bf16_peak("NVIDIA H100 80GB HBM3") == 989e12 and bf16_peak("NVIDIA H100 PCIe") == 756e12
    assert bf16_peak("x86_64") is None
    assert forward_flop(A14B.dit, 75_600) == pytest.approx(6.5e15, rel=0.01)  # as models/dit.py says
    assert forward_flop(dataclasses.replace(A14B.dit, num_layers=1), 75_600) == pytest.approx(163e12, rel=0.01)
    assert not torch.cuda.is_available() or bf16_peak(torch.cuda.get_device_name())
