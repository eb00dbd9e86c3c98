"""`wanfast warmup`: compiles an expert's block as `generate --compile` does, and stores the code for later runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import typer
from rich.console import Console

from wanfast.commands import dispatch, options
from wanfast.runtime.config import NO_VIDEO, EffectiveConfig, of_command, parse_size
from wanfast.runtime.config.option import flag
from wanfast.runtime.errors import ConfigError, from_failure
from wanfast.runtime.media import images
from wanfast.runtime.planning.completed import effective, model_of
from wanfast.runtime.planning.devices import require_attention_of
from wanfast.runtime.planning.image_inputs import refuse_image_options
from wanfast.runtime.planning.placement import is_cpu_for_want_of_a_gpu, place
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.attention_plans import densities_of_any_run
from wanfast.runtime.store.model_files import ModelFiles

# Options with which the call that is compiled is lossy; which calls of a video are lossy changes no graph or kernel.
EVERY_CALL: dict[str, dict[str, Any]] = {
    "sparse": {"dense_share": 0.0, "dense_layers": 0},
    "fa3-fp8": {"fp8_steps": "0:1"},
}


@options.takes_options("warmup")
def warmup(
    context: typer.Context,
    json_: options.Json = False,
) -> None:
    """Compile an expert's block for a size and a number of GPUs, so that `generate --compile` need not compile it.

    The compiled code is stored in the folder `inductor/` of the artifacts. No weights are needed.
    The folder may be copied to machines with the same GPUs and the same versions of the software.
    On a CPU, this command saves little time, because `generate` builds the C++ code again.
    """
    given = of_command(options.given(context), "warmup")
    plan, image_size = planned(given)
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    job = dataclasses.replace(plan.job(), image_size=image_size)
    (result,) = dispatch.run_jobs("warmup", [job], [plan], of_list=False, on_result=lambda index, result: None)
    if "error" in result:
        raise from_failure(result)
    console.print(describe(result), markup=False)
    if json_:
        print(json.dumps(result))


def planned(given: dict[str, Any]) -> tuple[Plan, tuple[int, int]]:
    """Returns the plan of a video with the `given` options, and the (width, height) of the image.

    If no image is given, the width and height of --size are returned. Raises WanFastError.
    """
    own = EVERY_CALL.get(given.get("attention", "auto"), {})
    wanted = {**NO_VIDEO, **given, **own, "compile": True}
    files = model_of(wanted)
    refuse_image_options((flag(name) for name in ("image", "fit") if name in given), files.spec)
    config = _effective(wanted, files)
    image_size = images.load_image(given["image"]).size if "image" in given else parse_size(config.video.size)
    densities = densities_of_any_run(config, files.spec.dit)
    plan = dataclasses.replace(Plan.of(config, files.spec, image_size, densities=densities), requested=given)
    require_attention_of(plan)
    if is_cpu_for_want_of_a_gpu(plan):
        raise ConfigError(
            "no GPU was found: run this command on the machine that makes the videos, or add --device cpu (slow)"
        )
    (plan,) = place([plan], must_fit=False)  # one block fits where the experts do not
    return plan, image_size


def _effective(wanted: dict[str, Any], files: ModelFiles) -> EffectiveConfig:
    """Completes the options. Any plan of attention fits, because plans for other weights compile the same code."""
    key = wanted.get("attention_plan")
    if key is None:
        return effective(wanted, files)
    config = effective({**wanted, "attention_plan": None, "density": 1.0}, files)
    return config.replace(attention_plan=key, density=None)


def describe(result: dict[str, Any]) -> str:
    """Returns a line of text about the result of a warmup.

    The line names the folder of the compiled code, and the seconds of each forward of one transformer block.
    """
    seconds = result["seconds"]
    shape = f"{result['width']}x{result['height']}, {result['frames']} frames, {result['attention']} attention"
    first, second = (f"{seconds[name]:.1f} s" for name in ("first", "second"))
    regrouped = f", without guidance {seconds['regrouped']:.1f} s" if "regrouped" in seconds else ""
    lossy = f", forwards with lossy attention {seconds['lossy']:.1f} s" if "lossy" in seconds else ""
    what = "was made in an earlier run, and can be loaded" if result["was_there"] else f"{result['bytes'] / 1e6:.1f} MB"
    return f"{result['output']}: {what}; {shape}; first forward of a block {first}, second {second}{regrouped}{lossy}"
