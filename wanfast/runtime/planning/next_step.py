"""Finds the command that the user should type next, to get a video on this machine.

If nothing is missing, the command makes a video. Otherwise, it solves the first problem: for example, it downloads the
weights. The image and the prompt of the video ship with the package, so that the user need not change the command.
This module does not import torch.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.config import OPTIONS, EffectiveConfig, ModelsConfig, Options, default_artifacts_dir
from wanfast.runtime.config.option import words
from wanfast.runtime.facts.memory import CARDS, gb
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.planning.memory_fit import Fit, Way, fit
from wanfast.runtime.store.model_files import DOWNLOADED, TINY

_EXAMPLES = TINY.parent / "examples"
_EXAMPLE_OF_TINY = ("star.png", "The big orange star goes right on a wavy background.")
_OTHER_EXAMPLE = ("cat.jpg", "The cat looks up and blinks.")
_EXAMPLE_OF_TEXT = "A cat on a windowsill looks up and blinks."
_SMALLER = "832x480"
_OPTIONS_OF_MODE: dict[str, dict[str, str]] = {
    "resident": {},
    "evicting": {},
    "sharded": {"dit_fsdp": "on"},
    "offloaded": {"expert_offload": "on"},
}


@dataclass(frozen=True)
class NextStep:
    """This class holds a command line that the user can type next, and the reason for this command."""

    command: str
    why: str


def example(spec: ModelSpec) -> dict[str, str]:
    """Returns the options of an example video for a model: a prompt, and an image if the model takes images."""
    if not spec.takes_images:
        return {"prompt": _EXAMPLE_OF_TEXT}
    return _example_with_image(*(_OTHER_EXAMPLE if spec.needs_gpu else _EXAMPLE_OF_TINY))


def _example_with_image(image: str, prompt: str) -> dict[str, str]:
    path, here = _EXAMPLES / image, Path.cwd()
    return {"image": str(path.relative_to(here) if path.is_relative_to(here) else path), "prompt": prompt}


def next_step(
    given: Options,
    fitted: Fit,
    *,
    no_torch: str | None,
    no_weights: str | None,
    layout: str | None,
    quantize_step: NextStep | None,
) -> NextStep:
    """Returns the command that the user should type next, and the reason for this command.

    `given`: the options that the user gave. `fitted`: the result of `fit` for these options.
    `no_torch`: what is wrong with torch, or None. `no_weights`: what is wrong with the weights, or None. `layout`:
    "original" or "diffusers", the layout of the weights that were found, or None if none were found. `quantize_step`:
    the command that stores the quantized experts, or None if no quantized expert is missing.
    """
    if not fitted.found and not fitted.spec.needs_gpu:
        return NextStep(_tiny(device="cpu"), "nothing is missing: this model runs on a CPU")
    if not fitted.found:
        why = f"no GPU is visible here, but the tiny model runs on a CPU; {_smallest_cards(fitted)}"
        return NextStep(_tiny(device="cpu"), why)
    if no_torch is not None:
        why = f"torch cannot use the GPU that the driver shows ({no_torch})"
        return NextStep("pip install --force-reinstall torch", why)
    way = fitted.best()
    if way is None:
        return _what_would_fit(given, fitted)
    if no_weights is not None and given.get("model", ModelsConfig.model) in DOWNLOADED:
        other = {"layout": layout} if layout == "diffusers" else {}
        return NextStep(
            _line("download", _changed(given, "model") | other | _changed(given, "artifacts_dir")), no_weights
        )
    if no_weights is not None:
        return NextStep(_line("doctor", _changed(given, "model")), f"{no_weights}; then run this command again")
    if quantize_step is not None:
        return quantize_step
    return NextStep(_generate(given, way, fitted), f"nothing is missing: {_in_words(way)}")


def warmup_command(config: EffectiveConfig) -> str:
    """Returns the `wanfast warmup` command that compiles in advance what one rank group needs for this config."""
    ranks = config.ranks.mesh.group_size
    chosen = config.options() | {"num_gpus": ranks, "recipe": None}  # the options hold all that a recipe chose
    if ranks == 1:
        chosen |= {"cfg_parallel": None, "ulysses": None, "dit_fsdp": "auto"}
    if chosen["expert_offload"] == "off":
        chosen["expert_offload"] = "auto"
    chosen["image"] = chosen["image"] or None
    if chosen["continue_from"]:
        chosen["fit"] = "crop"  # exactly the size of that video
    names = [name for name, option in OPTIONS.items() if "warmup" in option.option.also]
    chosen |= {"artifacts_dir": None} if chosen["artifacts_dir"] == default_artifacts_dir() else {}
    return _line("warmup", {name: chosen[name] for name in names if chosen[name] not in (OPTIONS[name].default, None)})


def _what_would_fit(given: Options, fitted: Fit) -> NextStep:
    """Returns a command that fits on these GPUs in bf16 or at a smaller size, or else runs the tiny model.

    For the tiny model, the reason names the GPUs that would be needed.
    """
    short = f"{fitted.spec.name} does not fit here"
    trials: tuple[dict[str, Any], ...] = (
        {"precision": "bf16"},
        {"size": _SMALLER},
        {"precision": "bf16", "size": _SMALLER},
    )
    for changes in trials:
        smaller = {**given, **changes}
        if way := fit(smaller, fitted.spec, fitted.found).best():
            options = " ".join(f"--{name} {value}" for name, value in changes.items())
            return NextStep(_generate(smaller, way, fitted), f"{short}; it fits with {options}: {_in_words(way)}")
    why = f"{short}; {_smallest_cards(fit(given, fitted.spec, []))}"
    return NextStep(_tiny(), why)


def _smallest_cards(on_cards: Fit) -> str:
    """Returns in words the fewest and smallest cards on which the model fits."""
    best = min(
        ((way.num_gpus, CARDS[card], card, way) for way in on_cards.ways for card, fits in way.fits.items() if fits),
        key=lambda found: found[:2],
        default=None,
    )
    subject = f"{on_cards.spec.name} at {on_cards.size}"
    if best is None:
        return f"{subject} fits on none of the known cards: use a smaller --size or fewer --frames"
    count, _, card, way = best
    return f"{subject} needs {count} GPU{'s'[: count - 1]} of {card}: {_in_words(way)}"


def _in_words(way: Way) -> str:
    host = f" and {gb(way.host_bytes)} of host memory" if way.host_bytes else ""
    return f"experts {way.mode}, {gb(way.gpu_bytes)} a GPU{host}"


def _tiny(**options: str) -> str:
    video = _example_with_image(*_EXAMPLE_OF_TINY)
    return _line("generate", {"model": "tiny", **options, **video, "output": _output(video)})


def _generate(given: Options, way: Way, fitted: Fit) -> str:
    count = "auto" if way.num_gpus == len(fitted.found) else way.num_gpus
    ranks = {} if way.num_gpus == 1 else {"num_gpus": count}
    output = {"output": _output(given)}
    return _line("generate", {**_changed(given, *given), **ranks, **_OPTIONS_OF_MODE[way.mode], **output})


def _output(video: Options) -> str:
    return f"{Path(video.get('image', 'video')).stem}.mp4"


def _changed(given: Options, *names: str) -> dict[str, Any]:
    """Returns the options among `names` whose values are not the defaults."""
    return {name: given[name] for name in names if name in given and given[name] != OPTIONS[name].default}


def _line(verb: str, options: dict[str, Any]) -> str:
    return shlex.join(["wanfast", verb, *(word for name, value in options.items() for word in words(name, value))])
