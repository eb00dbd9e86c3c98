"""`wanfast bench`: measures recipes over a set of clips, and reports their speed and quality side by side."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from wanfast.bench.cells import Bench, Cells, check_options, planned, recipes_of
from wanfast.bench.figures import report_of
from wanfast.bench.measure import measure, missing
from wanfast.bench.output import check_folder, with_random_weights, write_report
from wanfast.commands import options
from wanfast.magcache_calib.clips import Clip, read_set
from wanfast.runtime.config import NO_VIDEO, Options, accepted
from wanfast.runtime.config.option import FILES, MAKE, absolute
from wanfast.runtime.errors import ConfigError, JobsFailedError
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.machine.launchers import refuse_launchers
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.machine.packages import install
from wanfast.runtime.planning.completed import model_of
from wanfast.runtime.planning.devices import default_device
from wanfast.runtime.store.artifacts import writing_to
from wanfast.runtime.store.model_files import ModelFiles

_EXAMPLES = Path(__file__).parents[1] / "assets/examples"
_EXAMPLES_LIST, _TEXTS_LIST = "jobs.jsonl", "texts.jsonl"


@options.takes_options("bench")
def bench(
    context: typer.Context,
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes to measure, separated by commas. The names ours, published and few-steps are groups "
            "of recipes. Each recipe is compared with the first recipe.",
            rich_help_panel=MAKE,
        ),
    ] = "ours,published",
    set_: Annotated[Path | None, options.clip_set("the examples that ship")] = None,
    seed: options.SeedOfClips = 0,
    repeats: Annotated[
        int,
        typer.Option(
            help="How many times each recipe makes each clip. All recipes finish one repeat before the next begins.",
            rich_help_panel=MAKE,
        ),
    ] = 2,
    steps_measured: Annotated[
        int | None,
        typer.Option(
            help="Denoise only this number of steps, without skips. The seconds of the whole video are then an "
            "estimate, and the quality is not measured.",
            show_default="all",
            rich_help_panel=MAKE,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Measure only speed, with random weights instead of the model's weights.",
            rich_help_panel=MAKE,
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for the report: HTML, JSON and pictures.", rich_help_panel=FILES)
    ] = Path("bench"),
    json_: options.Json = False,
) -> None:
    """Measure recipes side by side: seconds, memory, TFLOP/s, and quality compared with the first recipe.

    If a recipe can use an option that you give, your value overrides the recipe's own value.
    If this machine cannot run a recipe, the recipe's row states the reason.
    Every video is stored when it is done, so that an interrupted run continues with the next video.
    """
    given = accepted({**options.given(context), "seed": None, "output": None})
    del given["seed"], given["output"]  # of this command, and not of a video
    if given.get("attention") == "sparse":
        raise ConfigError(
            "--attention sparse: `wanfast bench` does not take this value, because its TFLOP/s count all blocks, and "
            "sparse attention leaves some out: use --attention auto"
        )
    for option, value in (("--repeats", repeats), ("--steps-measured", steps_measured)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: use 1 or more")
    refuse_launchers("this command", "type `wanfast bench`", "--num-gpus ")
    console = Console(stderr=json_, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    folder = Path(absolute(str(output), "--output"))
    with asked_once():
        names = recipes_of(recipes)
        of_model: dict[str, Any] = {name: given[name] for name in ("model", "artifacts_dir") if name in given}
        files = model_of({**NO_VIDEO, **of_model})
        clips = _clips(set_, seed, files.spec)
        no_quality = _no_quality(random_weights, steps_measured)
        asked = Bench(names, clips, given, files, repeats, steps_measured, no_quality)
        check_options(asked)
        check_folder(folder)
        for package in ("matplotlib", "jinja2"):
            if find_spec(package) is None:
                raise ConfigError(f"the report needs {package}: run `{install('bench')}`")
        if random_weights:
            _require_gpu(given, files)
            given, files = with_random_weights(given, files, say)
            asked = dataclasses.replace(asked, given=given, files=files)
        files.require()
        rows = planned(asked, say)
    cells = Cells(Path(next(row.opened for row in rows if row.opened).placed.config.models.artifacts_dir))
    with writing_to(cells.root):
        cells.root.mkdir(parents=True, exist_ok=True)
    num_videos = sum(len(row.cells) for row in rows)
    if stored := num_videos - missing(rows, cells):
        again = shlex.join(["rm", "-r", str(cells.folder)])
        say(f"note: {stored} of {num_videos} videos were measured by an earlier run; to measure again, run `{again}`")
    try:
        errors = measure(asked, rows, cells, say)
    except (KeyboardInterrupt, SystemExit):
        say(f"note: videos stored: {num_videos - missing(rows, cells)}; {options.to_continue()}")
        raise
    report = report_of(asked, rows, cells, errors)
    write_report(report, rows, cells, folder)
    console.print(table_of(report))
    for line in remarks_of(report):
        console.print(line, markup=False)
    console.print(f"{folder}/report.html: the report as a page for a browser", markup=False)
    if json_:
        print(json.dumps(report))
    if errors:
        raise JobsFailedError(f"--recipes: {', '.join(errors)} failed: fix the errors that are printed above")


def _require_gpu(given: Options, files: ModelFiles) -> None:
    """Raises ConfigError, before random weights are written, if they need a GPU and this machine shows none."""
    if "device" not in given and files.spec.needs_gpu and default_device() == "cpu":
        raise ConfigError(
            f"--random-weights: no GPU was found, and {files.spec.name} needs one: run this command on the "
            "machine with the GPUs, or add --model tiny"
        )


def _no_quality(random_weights: bool, steps_measured: int | None) -> str:
    """Returns why the videos are not compared; returns "" if they are compared."""
    if random_weights:
        return "the weights are random"
    return "" if steps_measured is None else f"--steps-measured {steps_measured}: the videos have few steps"


def _clips(folder: Path | None, seed: int, spec: ModelSpec) -> tuple[Clip, ...]:
    if folder is not None:
        return tuple(read_set(Path(absolute(str(folder), "--set")), seed, takes_images=spec.takes_images))
    examples = _EXAMPLES_LIST if spec.takes_images else _TEXTS_LIST
    return tuple(read_set(_EXAMPLES, seed, examples, takes_images=spec.takes_images))


def table_of(report: dict[str, Any]) -> Table:
    """Returns the report's rows as a table for the terminal."""
    table = Table("recipe", "seconds", "ratio", "forwards", "memory", "PSNR", box=None, padding=(0, 2, 0, 0))
    for row in report["rows"]:
        if row["status"] != "measured":
            table.add_row(row["recipe"], row["status"])
            continue
        quality, seconds, forwards = row["quality"], row["video_s"], row["forwards"]
        psnr = "" if quality is None else "identical" if quality["identical"] else f"{quality['psnr']:.1f} dB"
        table.add_row(
            row["recipe"],
            f"{seconds['median']:.2f}"
            + (f" ± {seconds['spread']:.2f}" if seconds["of"] > 1 else "")
            + (" (estimated)" if row["estimated"] else ""),
            (f"{row['ratio']:.3f}" if row["ratio"] else "") + (" ?" if row["ratio_unclear"] else ""),
            f"{forwards['computed']:g} of {forwards['of']}",
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            psnr,
        )
    return table


def remarks_of(report: dict[str, Any]) -> list[str]:
    """Returns the lines below the table: what its marks mean, what ran in place of a recipe's options, and reasons."""
    rows, lines = report["rows"], []
    if any(row["ratio_unclear"] for row in rows):
        lines.append(f"?: unclear, because the seconds differ from those of {report['base']} by less than their spread")
    changed: dict[str, list[str]] = {}
    for row in rows:
        if row["overridden"] and row["status"] == "measured":
            chose = f" (attention: {row['attention']})" if "--attention" in row["overridden"] else ""
            changed.setdefault(f"{' '.join(row['overridden'])}{chose}", []).append(row["recipe"])
    lines += [f"with {options}: {', '.join(names)}" for options, names in changed.items()]
    return lines + [f"{row['recipe']}: {row['reason']}" for row in rows if row["reason"]]
