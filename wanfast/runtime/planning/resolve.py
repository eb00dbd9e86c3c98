"""Turns a request into a plan: every option has a value and every file is checked, but no video is made.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses

from wanfast.runtime.config import EffectiveConfig, Options, OutputConfig
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.media import video_file
from wanfast.runtime.media.tokenizer import clean_prompt
from wanfast.runtime.planning.completed import effective
from wanfast.runtime.planning.image_inputs import check_images, earlier_facts, image_facts
from wanfast.runtime.planning.notes import notes_of
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.prompt_extension import extended
from wanfast.runtime.store import model_files
from wanfast.runtime.store.attention_plans import densities_of
from wanfast.runtime.store.curves import curve_of
from wanfast.runtime.store.lora_pairs import require_distilled
from wanfast.runtime.store.model_files import ModelFiles

_MP4_BYTES_PER_PIXEL = 0.25  # an upper estimate at CRF 10: a video with much detail needs about half


def resolve(
    given: Options, *, writes: bool = True, runs: bool = True, files: ModelFiles | None = None
) -> tuple[Plan, ModelFiles]:
    """Decides the options of a request and checks the files that the options name; `place` decides the mesh later.

    This function runs the program of --extend-prompt. The function writes no output file, but may store hashes of files
    in the artifacts folder. Raises WanFastError if an option or a file cannot be used.
    `writes`: whether the run writes output files. If false, the plan has no output files, and the ranks return the
    frames.
    `runs`: whether the plan will be run. If false, an output file that exists gets a note instead of an error.
    `files`: the model's files, if the caller has already located them.
    """
    asked = EffectiveConfig.of(given, A14B)  # refuses values that are wrong for every model
    files = files or model_files.locate_for(asked.models)
    spec = files.spec
    if not all(map(clean_prompt, asked.video.prompts)):
        raise ConfigError("--prompt holds only control characters or spaces: describe what should happen in the video")
    check_images(asked, spec)
    require_distilled(asked.models, spec, files.root)
    earlier = earlier_facts(asked.video.continue_from) if asked.video.continue_from else None
    image, last = (image_facts(asked.video.images.get(option), option) for option in ("--image", "--last-image"))
    image = earlier or image
    config = effective(given, files, image.sha256, last.sha256, earlier)
    plan = Plan.of(config, spec, image.size, curve=curve_of(config, files), densities=densities_of(config, files))
    if writes:
        _check_outputs(plan, overwrite=config.output.overwrite or not runs)
    else:
        plan = dataclasses.replace(plan, config=dataclasses.replace(config, output=OutputConfig(output=None)))
    plan = _with_extended_prompts(plan)  # last, because the program may take minutes
    return dataclasses.replace(plan, requested=given, notes=notes_of(plan, files, image, last)), files


def _check_outputs(plan: Plan, *, overwrite: bool) -> None:
    """Raises ConfigError if a file cannot be written."""
    g, num_frames = plan.geometry, plan.config.video.total_frames
    needed_bytes = (1 << 20) + int(g.width * g.height * num_frames * _MP4_BYTES_PER_PIXEL)
    output = str(plan.config.output.output)
    video_file.check_outputs(output, *plan.outputs[1:], overwrite=overwrite, needed_bytes=needed_bytes)


def _with_extended_prompts(plan: Plan) -> Plan:
    """Returns a plan with the prompts that --extend-prompt gives; without it, the same plan. Raises ConfigError.

    The program gets the image of the first clip only, because the other clips start from frames that do not exist yet.
    It runs on the first machine only, because all machines make the first one's video.
    """
    video = plan.config.video
    command, image = video.extend_prompt, next(iter(video.images.values()), None)
    if command is None or plan.config.ranks.node_rank > 0:
        return plan
    first, *others = video.prompts
    prompts = (extended(command, first, image), *(extended(command, other, None) for other in others))
    return dataclasses.replace(plan, config=plan.config.replace(prompt=prompts, written_prompts=video.prompts))
