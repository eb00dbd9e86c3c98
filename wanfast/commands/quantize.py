"""`wanfast quantize`: quantizes the experts with a scheme, and stores them for all later runs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import typer
from rich.console import Console

from wanfast.commands import options
from wanfast.commands.progress import byte_progress
from wanfast.runtime.config import OPTIONS, QuantizeConfig
from wanfast.runtime.config.option import GPUS, LOSSY, MAKE
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Device, Scheme


def _refuse_recipe(value: str | None) -> None:
    if value is not None:
        raise ConfigError(f"--recipe is now --scheme: write --scheme {value}")


def quantize(
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="int8-weight-only stores weights in 8 bits; int8-dynamic and fp8-rowwise also multiply in 8 bits; "
            "bf16 only casts the weights.",
            rich_help_panel=LOSSY,
        ),
    ],
    model: options.Model = "a14b",
    expert: Annotated[
        Literal["both", "high", "low"], typer.Option(help="Which expert to quantize.", rich_help_panel=MAKE)
    ] = "both",
    high_noise_expert: Annotated[str | None, options.files("high_noise_expert")] = None,
    low_noise_expert: Annotated[str | None, options.files("low_noise_expert")] = None,
    lora: Annotated[list[str], options.files("lora")] = (),  # type: ignore[assignment]
    lora_high_noise: Annotated[list[str], options.files("lora_high_noise")] = (),  # type: ignore[assignment]
    lora_low_noise: Annotated[list[str], options.files("lora_low_noise")] = (),  # type: ignore[assignment]
    device: Annotated[
        Device | None,
        typer.Option(
            help="The device that quantizes.",
            rich_help_panel=GPUS,
            show_default=str(OPTIONS["device"].option.default),
        ),
    ] = None,
    artifacts_dir: options.ArtifactsDir = "artifacts",
    recipe: Annotated[str | None, typer.Option(hidden=True, is_eager=True, callback=_refuse_recipe)] = None,
    json_: options.Json = False,
) -> None:
    """Quantize the experts and store them for `generate --quantize`.

    The 8-bit experts take a quarter of the bytes of the published float32 weights.
    After a failure, run the command again: stored experts are not quantized again.
    """
    from wanfast.runtime.jobs import quantize as worker  # torch begins here

    config = QuantizeConfig(
        scheme=scheme,
        model=model,
        expert=expert,
        high_noise_expert=high_noise_expert,
        low_noise_expert=low_noise_expert,
        lora=tuple(lora),
        lora_high_noise=tuple(lora_high_noise),
        lora_low_noise=tuple(lora_low_noise),
        device=device,
        artifacts_dir=artifacts_dir,
    )
    with byte_progress() as progress:
        results = worker.run(config, progress, say=lambda line: print(line, file=sys.stderr))
    console = Console(stderr=json_, highlight=False, soft_wrap=True)
    for line in worker.describe(results):
        console.print(line, markup=False)
    if json_:
        print(json.dumps({"results": results}))
