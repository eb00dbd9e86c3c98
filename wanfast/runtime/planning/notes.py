"""Writes the notes of a plan: what could surprise a user in the video or in the run.

This module does not import torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from wanfast.runtime.config import RanksConfig, VideoConfig, parse_size
from wanfast.runtime.facts.choices import ImageFit
from wanfast.runtime.facts.flop import forward_flop
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.facts.shapes import Geometry, geometry_of, inner_size, middle_box
from wanfast.runtime.facts.sparsity import BLOCK
from wanfast.runtime.machine import host
from wanfast.runtime.machine.once import remembered
from wanfast.runtime.media.tokenizer import PromptTokenizer
from wanfast.runtime.planning.image_inputs import ImageFacts
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.curves import magcache_notes
from wanfast.runtime.store.expert_files import expert_notes
from wanfast.runtime.store.loras import lora_notes
from wanfast.runtime.store.model_files import ModelFiles

# The tiny model's forwards, on one core with AVX-512, computed 65e9 to 80e9 FLOP/s; slow cores compute less.
_FLOP_S_OF_A_CORE = 100e9
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60}  # the seconds in each
_MOST_STRETCH = 0.05  # of a last image relative to the first, without a note


def notes_of(plan: Plan, files: ModelFiles, image: ImageFacts, last: ImageFacts) -> tuple[str, ...]:
    """Returns all notes of a plan, in the order in which they are printed.

    `image`: the image or the earlier video that the video starts from; `last`: the last image.
    """
    config, spec = plan.config, plan.spec
    return (
        *image.notes, *_geometry_notes(plan, image), *_last_image_notes(plan, image, last), *_prompt_notes(plan, files),
        *magcache_notes(config, files), *expert_notes(config.models), *lora_notes(config.models, files.root),
        *_sparsity_notes(plan), *_fp8_notes(plan), *_clip_notes(config.video, spec),
        *_extension_notes(config.video, config.ranks), *_output_notes(plan), *_cpu_notes(plan),
        *_thread_notes(config.ranks, spec), *([spec.weights_note] if spec.weights_note else []),
    )  # fmt: skip


def _geometry_notes(plan: Plan, image: ImageFacts) -> list[str]:
    g, spec, (image_width, image_height) = plan.geometry, plan.spec, image.size
    width, height = parse_size(plan.config.video.size)
    notes = _fit_notes(plan.config.video.fit, g, image.size, (width, height)) if spec.takes_images else []
    if image_width * image_height > 16 * g.width * g.height:
        notes.append(
            "the image has over 16 times as many pixels as the video: if the video shimmers, shrink the image first"
        )
    if spec.shift_480p and width * height <= 832 * 480 and plan.config.video.shift == spec.shift:
        notes.append(
            f"at 480p the model's publisher advises --shift {spec.shift_480p}; this run uses {plan.config.video.shift}"
        )
    if spec.trained_frames and g.frames > spec.trained_frames:
        notes.append(
            f"the model was trained on {spec.trained_frames} frames: a longer video may repeat itself or lose quality; "
            f"--frames {spec.trained_frames} avoids this"
        )
    return notes


def _last_image_notes(plan: Plan, image: ImageFacts, last: ImageFacts) -> list[str]:
    """Returns the notes on the last image, such as that it is stretched to the shape of the first."""
    notes = [f"--last-image: {note}" for note in last.notes]
    video, g = plan.config.video, plan.geometry
    if video.last_image is None:
        return notes
    if video.fit != "area":
        return notes + [f"--last-image: {note}" for note in _fit_notes(video.fit, g, last.size, (g.width, g.height))]
    width, height = inner_size(last.size, *image.size)
    if image.size[0] * image.size[1] - width * height > _MOST_STRETCH * image.size[0] * image.size[1]:
        notes.append(
            f"--last-image: the {last.size[0]}x{last.size[1]} image is stretched to {g.width}x{g.height}, because its "
            "shape is not the first image's: add --fit crop or --fit pad"
        )
    return notes


def _fit_notes(fit: ImageFit, g: Geometry, image_size: tuple[int, int], size: tuple[int, int]) -> list[str]:
    (image_width, image_height), (width, height) = image_size, size
    if fit == "area" and (g.width, g.height) != size:
        return [
            f"the video is {g.width}x{g.height}, not {width}x{height}: --size gives only the area, and the shape "
            f"follows the {image_width}x{image_height} image, in multiples of 16; for exactly {width}x{height} add "
            "--fit crop or --fit pad"
        ]
    left, top, right, bottom = middle_box(image_size, width, height)
    if fit == "crop" and (right - left, bottom - top) != image_size:
        return [
            f"--fit crop: the video shows the middle {right - left}x{bottom - top} of the "
            f"{image_width}x{image_height} image"
        ]
    inner_width, inner_height = inner_size(image_size, width, height)
    if fit == "pad" and (inner_width, inner_height) != size:
        return [
            f"--fit pad: the image fills {inner_width}x{inner_height} of the {width}x{height} video; the rest is black"
        ]
    return []


def _prompt_notes(plan: Plan, files: ModelFiles) -> list[str]:
    if not files.exists:
        return ["the weights are missing, so the prompt's tokens were not counted"]
    tokenizer = _tokenizer(files.tokenizer, plan.spec.dit.text_len)
    notes = []
    prompts = [("--prompt", prompt) for prompt in plan.config.video.prompts]
    for option, text in (*prompts, ("--negative-prompt", plan.config.video.negative_prompt)):
        tokens = tokenizer.encode(text)
        if tokens.truncated:
            notes.append(
                f"{option} is {tokens.num_tokens_before_truncation} tokens long: "
                f"the model reads the first {plan.spec.dit.text_len}; the rest has no effect"
            )
    return notes


@remembered
def _tokenizer(file: Path, max_tokens: int) -> PromptTokenizer:
    return PromptTokenizer(file, max_tokens)


def _sparsity_notes(plan: Plan) -> list[str]:
    """Returns a note if sparse attention computes all blocks, or more than the density that was asked for."""
    sparsity, asked = plan.sparsity, plan.config.models.density
    if sparsity is None:
        return []
    blocks = f"--attention sparse: the video has {sparsity.num_blocks} blocks of {BLOCK} tokens"
    if sparsity.density == 1:
        return [f"{blocks}, and all of them are computed: this saves no time"]
    if asked is not None and sparsity.density > asked + 1 / sparsity.num_blocks:
        number = sparsity.first_blocks + sparsity.last_blocks + 1
        whose = "the first and last frame's" if sparsity.last_blocks else "the first frame's"
        kept = f"each list must hold at least {number} of them ({whose} and one more)"
        return [f"{blocks}, and {kept}: the density is {sparsity.density:.2f}, not {asked:g}"]
    return []


def _fp8_notes(plan: Plan) -> list[str]:
    """Returns a note if a recipe's attention in float8 leaves all steps exact, because the video has few steps."""
    if plan.fp8 is None or plan.fp8.steps:
        return []
    steps = len(plan.schedule)
    return [
        f"--recipe {plan.config.models.recipe}: no step computes attention in float8, because the first and last steps "
        f"stay exact, and the video has only {steps}: for float8 in all of them, add --fp8-steps 0:{steps}"
    ]


def _clip_notes(video: VideoConfig, spec: ModelSpec) -> list[str]:
    """Returns notes on the limits of clips that start from the last frame of the one before, and on their rate."""
    if not video.continue_from and len(video.prompts) == 1:
        return []
    notes = [
        "a clip gets only the last frame of what comes before it: motion may change suddenly where clips join, and "
        "colours may drift from clip to clip"
    ]
    if video.continue_from and video.fps != spec.fps:
        notes.append(
            f"--continue-from: the earlier video has {video.fps} frames per second, but the model's motion is for "
            f"{spec.fps}, so that a new clip plays {video.fps / spec.fps:.2g} times as fast: to avoid this, convert "
            f"the file first, for example with `ffmpeg -i OLD.mp4 -r {spec.fps} NEW.mp4`"
        )
    return notes


def _extension_notes(video: VideoConfig, ranks: RanksConfig) -> list[str]:
    if video.extend_prompt and ranks.node_rank > 0:
        return ["--extend-prompt: the program runs on machine 0, and all machines use the prompt that it prints"]
    return [f"--extend-prompt: the prompt is {text!r:.300}" for text in video.prompts if video.extend_prompt]


def _output_notes(plan: Plan) -> list[str]:
    """Returns a note if a run of the plan would be refused because a file exists."""
    existing = [] if plan.config.output.overwrite else [path for path in plan.outputs if os.path.lexists(path)]
    return [f"a run would be refused, because {path} exists: add --overwrite" for path in existing[:1]]


def _cpu_notes(plan: Plan) -> list[str]:
    """Returns a note if denoising takes a CPU two minutes or more, as computed from its FLOP.

    The FLOP are those of all forwards with exact attention. A size under the model's own is not advised.
    """
    spec, video, ranks = plan.spec, plan.config.video, plan.config.ranks
    cores = ranks.num_gpus * host.own_threads(spec.dit.dim, ranks.num_gpus)

    def duration(tokens: int) -> str | None:
        flop = len(video.prompts) * plan.num_forwards * forward_flop(spec.dit, tokens)
        seconds = flop / (_FLOP_S_OF_A_CORE * cores)
        return next((f"{seconds / unit:.0f} {name}" for name, unit in _UNITS.items() if seconds >= 2 * unit), None)

    tokens = plan.geometry.tokens
    if ranks.device != "cpu" or (takes := duration(tokens)) is None:
        return []
    takes = f"this video takes a CPU about {takes} of denoising, at {_FLOP_S_OF_A_CORE / 1e9:.0f} GFLOP/s a core"
    own = geometry_of(spec, "crop", parse_size(spec.size), spec.frames, (0, 0)).tokens
    if duration(own) is not None:  # the model itself is too large
        return [f"{takes}: use a GPU"]
    return [
        f"{takes}: it has {tokens / own:.1f} times the tokens of the model's own size; use --size {spec.size} and "
        f"--frames {spec.frames}, or a GPU"
    ]


def _thread_notes(ranks: RanksConfig, spec: ModelSpec) -> list[str]:
    """Returns a note if OMP_NUM_THREADS gives a process on a CPU more threads than wanfast would, or far fewer."""
    threads, own = os.environ.get(host.THREADS, "").strip(), host.own_threads(spec.dit.dim, ranks.num_gpus)
    if ranks.device != "cpu" or not threads.isdecimal() or own / 2 < int(threads) <= own:
        return []
    why = "threads wait for each other if other programs use the cores too" if int(threads) > own else "cores stay idle"
    return [
        f"{host.THREADS}={threads} sets the threads of a process to {threads} instead of {own}, and {why}: a video may "
        f"take several times as long; unset {host.THREADS} to avoid this"
    ]
