"""Completes a request's options: the model, its files and this machine supply the values that the user did not give.

The module `placement` decides the mesh of ranks later, when the sizes of all videos are known.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from wanfast.runtime.config import EffectiveConfig, Options, VideoConfig, parse_size
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.planning.devices import default_device, num_gpus_of, require_capable
from wanfast.runtime.planning.image_inputs import EarlierFacts
from wanfast.runtime.store import attention_plans, model_files
from wanfast.runtime.store.curves import settle
from wanfast.runtime.store.expert_files import identified
from wanfast.runtime.store.lora_pairs import own_loras
from wanfast.runtime.store.model_files import ModelFiles


def model_of(given: Options) -> ModelFiles:
    """Returns the files of the model that the options name.

    Raises ConfigError if an option has a value that no model accepts, and WanFastError if the model cannot be located.
    """
    return model_files.locate_for(EffectiveConfig.of(given, A14B).models)


def effective(
    given: Options,
    files: ModelFiles,
    image_sha256: str = "",
    last_image_sha256: str = "",
    earlier: EarlierFacts | None = None,
) -> EffectiveConfig:
    """Returns the effective config of the given options. The module `placement` adds the mesh of ranks later.

    Options that are not given get values from the model, from its files and from this machine.
    `image_sha256`, `last_image_sha256`: the hash of each image, "" for no image. `earlier`: what is known about the
    video that this video continues; None if it continues no video.
    Raises ConfigError if an option does not fit the other options, the model, the device or the earlier video.
    """
    device = given.get("device") or default_device()
    answers: dict[str, Any] = {"device": device, "seed": secrets.randbelow(2**31)}
    answers |= {"last_image_sha256": last_image_sha256}
    answers |= _continuing(given, earlier) if earlier else {"image_sha256": image_sha256}
    given = {**given, "num_gpus": num_gpus_of(given.get("num_gpus", 1), device, asked="device" in given)}
    config = EffectiveConfig.of(given, files.spec, **answers)
    config = config.replace(**own_loras(config.models, files.root))
    models, size = config.models, "{}x{}".format(*parse_size(config.video.size))
    config = dataclasses.replace(config, models=identified(models), video=dataclasses.replace(config.video, size=size))
    require_capable(models, device)
    return attention_plans.settle(settle(config, files), files)


def _continuing(given: Options, earlier: EarlierFacts) -> dict[str, Any]:
    """Returns the answers that follow from the earlier video. Raises ConfigError if a given option says otherwise."""
    width, height = earlier.size
    size, fps, fit = given.get("size"), given.get("fps") or earlier.fps, given.get("fit") or VideoConfig.fit
    if size is not None and parse_size(size) != earlier.size:
        raise ConfigError(
            f"--size {size}: the video of --continue-from has {width}x{height} pixels, and its continuation must "
            f"have the same size: use --size {width}x{height}, or drop --size"
        )
    if fps != earlier.fps:
        raise ConfigError(
            f"--fps {fps}: the video of --continue-from has {earlier.fps} frames per second, and its "
            f"continuation must have the same rate: use --fps {earlier.fps}, or drop --fps"
        )
    if fit != VideoConfig.fit and not given.get("last_image"):
        raise ConfigError(
            f"--fit {fit}: with --continue-from, only a last image can be fitted: drop --fit, or add --last-image"
        )
    facts = {"continue_from_sha256": earlier.sha256, "continue_from_frames": earlier.num_frames}
    return {"size": f"{width}x{height}", "fps": earlier.fps, **facts}
