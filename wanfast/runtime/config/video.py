"""Defines the options that say what a video shows, how it is sampled, and which files are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

from wanfast.runtime.config.option import ALL, FILES, MAKE, MEASURE, SAMPLING, Option, Part, between
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import Device, ImageFit, Solver

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
    near = max(1, (frames + 1) // 4 * 4 + 1)
    return None if frames >= 1 and frames % 4 == 1 else f"a video has 4n+1 frames: try {near}"


def _output_fix(path: str) -> str | None:
    if not path.strip():
        return "is empty: name an .mp4 file"
    return None if PurePath(path).name else "is a folder: name an .mp4 file"


def _size_fix(size: str) -> str | None:
    parse_size(size)  # raises ConfigError
    return None


@dataclass(frozen=True, kw_only=True)
class VideoConfig(Part):
    """This part of a config says what the video shows, and how it is sampled."""

    image: Annotated[str, Option("The image that the video starts from.", MAKE, also=("warmup",), path=True)]
    image_sha256: str = ""
    prompt: Annotated[str, Option("What happens in the video.", MAKE)]
    negative_prompt: Annotated[str, Option("What the video must not show.", MAKE, own=True, also=("bench", "serve"))]
    size: Annotated[
        str,
        Option(
            "Area of the video, as WIDTHxHEIGHT. With --fit crop or pad, this is its exact size.",
            MAKE,
            own=True,
            also=ALL,
            check=_size_fix,
        ),
    ]
    fit: Annotated[
        ImageFit,
        Option(
            "How the image fits --size: area keeps the aspect ratio, crop cuts the longer side, pad adds black bars.",
            MAKE,
            also=("bench", "warmup"),
        ),
    ] = "area"
    frames: Annotated[int, Option("Number of frames, 4n+1, such as 81.", MAKE, own=True, also=ALL, check=_frames_fix)]
    fps: Annotated[
        int,
        Option(
            "Frames per second of the file.",
            MAKE,
            own=True,
            also=("serve",),
            check=between(1, 240, "use 1 to 240; 16 is the model's own"),
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
        int,
        Option(
            "Number of denoising steps.",
            SAMPLING,
            own=True,
            also=MEASURE,
            check=between(1, 1000, "use 1 to 1000; 40 is the model's own"),
        ),
    ]
    shift: Annotated[
        float,
        Option(
            "Larger values move the steps toward high noise. The model's publisher advises 3.0 for 480p.",
            SAMPLING,
            own=True,
            also=MEASURE,
            check=between(0.001, 1000, "use 0.001 to 1000; 5.0 is the model's own"),
        ),
    ]
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
    solver: Annotated[Solver, Option("Flow-matching solver.", SAMPLING, also=MEASURE)] = "unipc"
    noise_device: Annotated[
        Device, Option("Device that draws the noise; the reference uses cuda.", SAMPLING, also=("bench",))
    ] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image:
            raise ConfigError("--image is missing: give the image that the video starts from")
        if not self.prompt:
            raise ConfigError("--prompt is missing: describe what should happen in the video")
        if not self.prompt.strip():
            raise ConfigError("--prompt is empty: describe what should happen in the video")
        if self.noise_device == "cpu" and self.seed >= CPU_SEEDS:
            raise ConfigError(
                f"--seed {self.seed}: noise drawn on the CPU uses only 32 bits of a seed: use 0 to {CPU_SEEDS - 1} "
                f"({self.seed % CPU_SEEDS} gives the same noise), or --noise-device cuda"
            )


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
