"""Defines the options that say what a video shows, how it is sampled, and which files are written."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

from wanfast.runtime.config.option import ALL, FILES, MAKE, MEASURE, SAMPLING, Option, Part, at_least, between
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Device, ImageFit, Solver
from wanfast.runtime.facts.model_spec import A14B

_MOST_STEPS = 1000
_LEAST_LEVEL = 0.001  # of noise: a training timestep
_LEAST_STEP = 1e-6  # between two levels, which are float32 numbers later
CPU_SEEDS = 1 << 32  # torch's generator on the CPU ignores the higher bits of a seed; a GPU's takes all


def parse_size(size: str) -> tuple[int, int]:
    """Returns (width, height) of a size like '1280x720', or '1280*720' as the reference writes it.

    Raises ConfigError for any other form, or if a side is not a positive multiple of 16.
    """
    match = re.fullmatch(r"(\d{1,4})[xX*](\d{1,4})", size.strip())
    if match is None:
        raise ConfigError(f"--size {size!r} is not WIDTHxHEIGHT, both up to 9999: write it as 1280x720, for example")
    width, height = int(match[1]), int(match[2])
    if width % 16 or height % 16 or not (width and height):
        near = "x".join(str(max(16, round(n / 16) * 16)) for n in (width, height))
        raise ConfigError(f"--size {size}: width and height must be positive multiples of 16: try {near}")
    return width, height


def _frames_fix(frames: int) -> str | None:
    below = max(1, (frames - 1) // 4 * 4 + 1)
    return None if frames == below else f"a video has 4n+1 frames: try {below} or {below + 4}"


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Returns the noise levels of a list such as '1,0.9375,0.625'. Raises ValueError if a level is not a number."""
    return tuple(map(float, text.split(",")))


def _sigmas_fix(text: str) -> str | None:
    try:
        sigmas = parse_sigmas(text)
    except ValueError:
        return "write numbers separated by commas, such as 1,0.9375,0.8333,0.625"
    if sigmas[-1] == 0:
        return "leave out the 0 at the end: the last step always goes to 0"
    if not all(_LEAST_LEVEL <= sigma <= 1 for sigma in sigmas):
        return f"a noise level is {_LEAST_LEVEL:g} to 1"
    if any(before - after < _LEAST_STEP for before, after in itertools.pairwise(sigmas)):
        return f"each noise level must be less than the one before, by {_LEAST_STEP:f} or more"
    return None if len(sigmas) <= _MOST_STEPS else f"use {_MOST_STEPS} levels at most"


def _command_fix(command: str) -> str | None:
    try:
        return None if shlex.split(command) else "has an empty value: give a program and its arguments"
    except ValueError:
        return "has a quote that is not closed: write the command as for a shell"


def _output_fix(path: str) -> str | None:
    if not path.strip():
        return "has an empty value: give an .mp4 file"
    return None if PurePath(path).name and not path.endswith("/") else "names a folder: give an .mp4 file"


def _size_fix(size: str) -> str | None:
    parse_size(size)  # raises ConfigError
    return None


@dataclass(frozen=True, kw_only=True)
class VideoConfig(Part):
    """This part of a config says what the video shows, and how it is sampled."""

    image: Annotated[str, Option("The image that the video starts from.", MAKE, also=("warmup",), path=True)]
    image_sha256: str = ""
    continue_from: Annotated[
        str | None,
        Option(
            "An mp4 to continue: the output holds the mp4's frames, then the new clip. The new clip starts from the "
            "mp4's last frame. Size and frames per second are those of the mp4.",
            MAKE,
            asked=str,
            path=True,
            check=lambda path: None if path.strip() else "has an empty value: give an mp4 file",
        ),
    ] = None
    continue_from_sha256: str = ""
    continue_from_frames: int = 0
    last_image: Annotated[
        str | None,
        Option(
            "The image that the video ends with. This image is fitted to the video in the same way as --image.",
            MAKE,
            asked=str,
            path=True,
            check=lambda path: None if path.strip() else "has an empty value: give an image file",
        ),
    ] = None
    last_image_sha256: str = ""
    prompt: Annotated[
        str | tuple[str, ...],
        Option(
            "What happens in the video. If you give this option several times, the file has several clips: each clip "
            "starts from the last frame of the previous clip.",
            MAKE,
            asked=tuple[str, ...],
        ),
    ]  # a tuple if there are several clips
    extend_prompt: Annotated[
        str | None,
        Option(
            "A program of yours that extends each prompt: it gets the prompt on stdin, and the path of the image in "
            "the environment variable WANFAST_IMAGE. It prints the new prompt on one line.",
            MAKE,
            asked=str,
            metavar="<command>",
            of_this_run=True,
            check=_command_fix,
        ),
    ] = None
    written_prompts: tuple[str, ...] = ()  # before --extend-prompt extended them
    negative_prompt: Annotated[str, Option("What the video must not show.", MAKE, own=True, also=("bench", "serve"))]
    size: Annotated[
        str,
        Option(
            "Size of the video, as WIDTHxHEIGHT. With an image and --fit area, only the area is about this large, and "
            "the shape is the image's.",
            MAKE,
            own=True,
            also=ALL,
            check=_size_fix,
        ),
    ]
    fit: Annotated[
        ImageFit,
        Option(
            "How the image fits --size: area keeps the image's shape, crop cuts off what does not fit, pad adds black "
            "bars.",
            MAKE,
            also=("bench", "warmup"),
        ),
    ] = "area"
    frames: Annotated[
        int, Option("Number of frames of a clip, 4n+1, such as 81.", MAKE, own=True, also=ALL, check=_frames_fix)
    ]
    fps: Annotated[
        int,
        Option(
            "Frames per second of the file.",
            MAKE,
            own=True,
            also=("serve",),
            check=between(1, 240, "use 1 to 240, such as 16"),
        ),
    ]
    seed: Annotated[
        int,
        Option(
            "Seed of the noise. With --noise-device cpu, a seed gives the same noise on every machine.",
            MAKE,
            default="a random one",
            check=between(0, 2**63 - 1, "use 0 to 2^63 - 1, or leave it out for a random one"),
        ),
    ]
    steps: Annotated[
        int | None,
        Option(
            "Number of denoising steps.",
            SAMPLING,
            asked=int,
            own=True,
            also=MEASURE,
            check=between(1, _MOST_STEPS, "use 1 to 1000, such as 40"),
        ),
    ]  # None: --sigmas says it
    shift: Annotated[
        float | None,
        Option(
            "Shift of the noise levels. Larger values move the steps toward high noise. For a14b at 480p, the "
            "publisher advises 3.0.",
            SAMPLING,
            asked=float,
            own=True,
            also=MEASURE,
            check=between(0.001, 1000, "use 0.001 to 1000, such as 5.0"),
        ),
    ]  # None: the levels of --sigmas are shifted already
    sigmas: Annotated[
        str | None,
        Option(
            "Noise levels, one for each step: falling numbers of at most 1, separated by commas. They replace --steps "
            "and --shift. The last step goes to 0.",
            SAMPLING,
            metavar="<s,s,...>",
            check=_sigmas_fix,
        ),
    ] = None
    switch_step: Annotated[
        int | None,
        Option(
            "Number of steps of --sigmas that the high-noise expert runs.",
            SAMPLING,
            default=f"the steps whose level is at least the model's boundary; a14b: {A14B.boundary}",
            check=at_least(0, "use a number of steps, 0 or more"),
        ),
    ] = None
    guidance_high_noise: Annotated[
        float,
        Option(
            "Guidance scale of the high-noise expert. 1 turns guidance off.",
            SAMPLING,
            own=True,
            also=MEASURE,
            check=between(0, 100, "use 0 to 100; 1 is no guidance"),
        ),
    ]
    guidance_low_noise: Annotated[
        float,
        Option(
            "Guidance scale of the low-noise expert. 1 turns guidance off.",
            SAMPLING,
            own=True,
            also=MEASURE,
            check=between(0, 100, "use 0 to 100; 1 is no guidance"),
        ),
    ]
    guidance_gate: Annotated[
        float,
        Option(
            "Share of each expert's steps that run the negative prompt's branch, counted from the expert's first step. "
            "The expert's later steps reuse the last difference between the two predictions.",
            SAMPLING,
            also=("bench",),
            default="1",
            check=lambda x: (
                None
                if 0 < x <= 1
                else "use a share over 0, up to 1; --guidance-high-noise 1 and --guidance-low-noise 1 turn guidance off"
            ),
        ),
    ] = 1.0
    solver: Annotated[
        Solver,
        Option(
            "Flow-matching solver. unipc-euler is UniPC for the high-noise expert and Euler for the low-noise expert. "
            "rcm adds fresh noise in each step.",
            SAMPLING,
            also=MEASURE,
        ),
    ] = "unipc"
    noise_device: Annotated[
        Device,
        Option("Device that draws the noise. The reference program of Wan2.2 uses cuda.", SAMPLING, also=("bench",)),
    ] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "written_prompts", tuple(self.written_prompts))  # JSON has a list
        if len(self.prompts) == 1:
            object.__setattr__(self, "prompt", self.prompts[0])
        if not all(self.prompts or ("",)):
            raise ConfigError("--prompt is missing or empty: describe what should happen in the video")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("--prompt has no words: describe what should happen in the video")
        self._check_clips()
        if self.last_image is not None and self.frames == 1:
            raise ConfigError(
                "--last-image needs a first and a last frame: use --frames 5 or more, or drop --last-image"
            )
        self._check_schedule()
        if self.noise_device == "cpu" and self.seed >= CPU_SEEDS:
            raise ConfigError(
                f"--seed {self.seed}: noise drawn on the CPU uses only 32 bits of a seed: use 0 to {CPU_SEEDS - 1} "
                f"({self.seed % CPU_SEEDS} gives the same noise), or --noise-device cuda"
            )

    def _check_clips(self) -> None:
        if self.image and self.continue_from:
            raise ConfigError("--image and --continue-from both say where the video starts: drop one of the two")
        num_clips, seeds = len(self.prompts), CPU_SEEDS if self.noise_device == "cpu" else 1 << 63
        many = f"--prompt is given {num_clips} times" if num_clips > 1 else None
        if many and seeds - num_clips < self.seed < seeds:
            raise ConfigError(
                f"{many}, and the seed grows by 1 from clip to clip, but the largest seed is {seeds - 1}: use --seed "
                f"{seeds - num_clips} or less"
            )
        if many and self.last_image is not None:
            raise ConfigError(
                f"{many}, but --last-image is for a single clip: give --prompt once, or drop --last-image"
            )
        if self.frames == 1 and (why := many or (self.continue_from and "--continue-from")):
            raise ConfigError(
                f"{why}: a clip begins with the last frame of the clip or video before it, so a clip of one frame adds "
                "nothing: use --frames 5 or more"
            )

    def _check_schedule(self) -> None:
        for option, value in (("--steps", self.steps), ("--shift", self.shift)):
            if value is None and self.sigmas is None:
                raise ConfigError(f"{option} is missing: give {option}, or give noise levels by --sigmas")
            if value is not None and self.sigmas is not None:
                raise ConfigError(
                    f"{option} {value:g} and --sigmas exclude each other, because the list of noise levels "
                    f"already determines the steps and the shift: drop {option}, or drop --sigmas"
                )
        if self.switch_step is not None and self.sigmas is None:
            raise ConfigError(
                f"--switch-step {self.switch_step} is only for the list of --sigmas: drop --switch-step, or give noise "
                "levels by --sigmas instead of --steps and --shift"
            )
        if self.switch_step is not None and self.switch_step > self.num_steps:
            raise ConfigError(
                f"--switch-step {self.switch_step}: --sigmas has {self.num_steps} steps: use 0 to {self.num_steps}"
            )
        if self.guidance_gate != 1 and self.guidance_high_noise == self.guidance_low_noise == 1:
            raise ConfigError(
                f"--guidance-gate {self.guidance_gate:g} needs guidance, but both guidance scales are 1: drop "
                "--guidance-gate, or give another scale by --guidance-high-noise or --guidance-low-noise"
            )

    @property
    def images(self) -> dict[str, str]:
        """Returns {flag: path} of the images that are given, such as {"--image": "cat.jpg", "--last-image": "end.jpg"}.

        With --continue-from, the first frame comes from an earlier video, and the result holds {"--continue-from": path
        of that video} instead of an entry for --image. The entry of --last-image always comes last.
        """
        found = {"--image": self.image, "--continue-from": self.continue_from, "--last-image": self.last_image}
        return {option: path for option, path in found.items() if path}

    def with_images(self, images: Mapping[str, str]) -> VideoConfig:
        """Returns a copy of the config with other image paths; `images` is {flag of an image's option: path}."""
        paths: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): path for flag, path in images.items()}
        return replace(self, **paths)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Returns the prompt of each clip, in order."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Returns (prompt, negative prompt) of each clip, in order."""
        return [(prompt, self.negative_prompt) for prompt in self.prompts]

    def clips(self) -> list[VideoConfig]:
        """Returns the config of each clip, in order: the seeds of the clips are `seed`, `seed` + 1, and so on."""
        return [replace(self, prompt=prompt, seed=self.seed + index) for index, prompt in enumerate(self.prompts)]

    @property
    def total_frames(self) -> int:
        """Returns the number of frames of the file, including those of an earlier video that this video continues.

        Two clips that follow each other share one frame, and the file holds this frame only once.
        """
        shared = len(self.prompts) - (0 if self.continue_from else 1)
        return self.continue_from_frames + len(self.prompts) * self.frames - shared

    @property
    def levels(self) -> tuple[float, ...] | None:
        """Returns the noise levels of --sigmas, or None if --steps and --shift determine the noise levels."""
        return None if self.sigmas is None else parse_sigmas(self.sigmas)

    @property
    def num_steps(self) -> int:
        """Returns the number of denoising steps."""
        return self.steps or len(self.levels or ())


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Part):
    """This part of a config says which files are written."""

    output: Annotated[
        str | None,
        Option(
            "The .mp4 file to write. A .json that records the run is written beside it.",
            FILES,
            asked=str,
            path=True,
            check=_output_fix,
        ),
    ] = "out.mp4"  # None: the frames are returned instead
    overwrite: Annotated[bool, Option("Replace existing files.", FILES, of_this_run=True)] = False
    skip_existing: Annotated[
        bool,
        Option("Skip videos whose files exist already, so that a --jobs list can be resumed.", FILES, of_this_run=True),
    ] = False
    contact_sheet: Annotated[bool, Option("Also write a .png of evenly spaced frames.", FILES)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overwrite and self.skip_existing:
            raise ConfigError("--overwrite and --skip-existing exclude each other: drop one of the two")

    @property
    def paths(self) -> tuple[Path, ...]:
        """Returns the paths of the .mp4, its .json and, if requested, its .png.

        The tuple is empty if the frames are returned to the caller and no file is written.
        """
        if self.output is None:
            return ()
        video = Path(self.output)
        suffixes = (".json", ".png") if self.contact_sheet else (".json",)
        return video, *(video.with_suffix(suffix) for suffix in suffixes)
