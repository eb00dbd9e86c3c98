"""What was asked for, and what will run: two frozen dataclasses of the same field names.

`GenerateConfig` is the request: its fields are the options of `wanfast generate`, with the same names and defaults, and
None means "the model's own". `EffectiveConfig` answers every question; it is what the worker reads, what `out.json`
records, and what `--from` runs again. Both refuse what cannot be right whatever the model, naming the option.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, TypeVar

from wanfast.runtime.errors import ConfigError

Solver = Literal["unipc", "dpm++", "euler"]
Precision = Literal["bf16", "fp32"]
Device = Literal["cpu", "cuda"]
Expert = Literal["high_noise", "low_noise"]
Branch = Literal["prompt", "negative_prompt"]  # of guidance
BRANCHES: tuple[Branch, ...] = ("prompt", "negative_prompt")
MagCacheRule = Literal["low-noise-only", "both-experts"]
Switch = Literal["on", "off", "auto"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs", "max-autotune"]
Scheme = Literal["int8-weight-only", "int8-dynamic", "fp8-rowwise", "bf16"]
Attention = Literal["auto", "fa3", "fa4", "fa2", "cudnn", "flash", "efficient", "math"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A request for one video. Raises ConfigError on construction."""

    model: str = "a14b"
    image: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    size: str | None = None
    frames: int | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_high_noise: float | None = None
    guidance_low_noise: float | None = None
    solver: Solver = "unipc"
    seed: int | None = None
    noise_device: Device = "cpu"
    fps: int | None = None
    precision: Precision = "bf16"
    attention: Attention = "auto"
    quantize: Scheme | None = None
    quantize_on_the_fly: bool = False
    verify: bool = False
    tf32: bool | None = None
    compile: bool = False
    compile_mode: CompileMode = "default"
    magcache: str = "off"
    magcache_thresh: float | None = None
    magcache_k: int | None = None
    retention_ratio: float | None = None
    magcache_rule: MagCacheRule | None = None
    magcache_joint: Switch = "auto"
    magcache_budget: float | None = None
    magcache_skip: int | None = None
    magcache_interpolate: bool = False
    device: Device | None = None
    num_gpus: int | Literal["auto"] = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    cfg_parallel: int | None = None
    ulysses: int | None = None
    dit_fsdp: Switch = "auto"
    t5_fsdp: Switch = "auto"
    expert_offload: Switch = "auto"
    rank_timeout: float = 600.0
    output: str = "out.mp4"
    overwrite: bool = False
    contact_sheet: bool = False
    artifacts_dir: str = "artifacts"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_text(field.name, getattr(self, field.name))
        _check_places(self)
        if not self.image:
            raise ConfigError("--image is missing: give the picture that the video starts from")
        if not (self.prompt or "").strip():
            raise ConfigError("--prompt is empty: say what should happen in the video")
        if self.size is not None:
            parse_size(self.size)
        _check(self.frames, "--frames", lambda n: n >= 1 and n % 4 == 1, _frames_fix)
        _check(self.steps, "--steps", lambda n: 1 <= n <= 1000, lambda n: "take 1 to 1000; 40 is the model's own")
        _check(
            self.shift, "--shift", lambda x: 0.001 <= x <= 1000, lambda x: "take 0.001 to 1000; 5.0 is the model's own"
        )
        for option, scale in (
            ("--guidance-high-noise", self.guidance_high_noise),
            ("--guidance-low-noise", self.guidance_low_noise),
        ):
            _check(scale, option, lambda x: 0 <= x <= 100, lambda x: "take 0 to 100; 1 is no guidance")
        _check(
            self.seed,
            "--seed",
            lambda n: 0 <= n < 2**63,
            lambda n: "take 0 to 2^63 - 1, or leave it out for a random one",
        )
        _check(self.fps, "--fps", lambda n: 1 <= n <= 240, lambda n: "take 1 to 240; 16 is the model's own")
        if self.noise_device == "cuda" and self.device == "cpu":
            raise ConfigError("--noise-device cuda needs --device cuda: drop one of the two")
        if self.compile_mode != GenerateConfig.compile_mode and not self.compile:
            raise ConfigError(f"--compile-mode {self.compile_mode} needs --compile: add it, or drop the mode")
        _check_quantization(self)
        _check_magcache(self)
        _check_ranks(self)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What `wanfast quantize` is to do: its options."""

    scheme: Scheme
    model: str = "a14b"
    expert: Literal["both", "high", "low"] = "both"
    device: Device | None = None
    artifacts_dir: str = "artifacts"

    def __post_init__(self) -> None:
        for name in ("model", "artifacts_dir"):
            _check_text(name, getattr(self, name))
        _check_places(self)


@dataclass(frozen=True, kw_only=True)
class EffectiveConfig:
    """One video, every question answered. Paths are absolute, so that it runs again from any folder."""

    model: str
    image: str
    image_sha256: str
    prompt: str
    negative_prompt: str
    size: str
    frames: int
    steps: int
    shift: float
    guidance_high_noise: float
    guidance_low_noise: float
    solver: Solver
    seed: int
    noise_device: Device
    fps: int
    precision: Precision
    device: Device
    output: str
    overwrite: bool
    contact_sheet: bool
    artifacts_dir: str
    attention: Attention = "auto"  # the worker writes the one that it took
    quantize: Scheme | None = None
    quantize_on_the_fly: bool = False
    verify: bool = False  # by hashes, what is kept quantized
    tf32: bool | None = None  # None: as the reference, in the convolutions of a bf16 run alone
    compile: bool = False
    compile_mode: CompileMode = "default"
    magcache: str = "off"  # or preset, or the key of a calibrated curve
    magcache_thresh: float | None = None  # by which all but a budget is planned
    magcache_k: int | None = None
    retention_ratio: float | None = None
    magcache_rule: MagCacheRule | None = None
    magcache_joint: Switch = "auto"
    magcache_budget: float | None = None
    magcache_skip: int | None = None
    magcache_interpolate: bool = False
    # who does it: one process, unless `placement` says otherwise
    num_gpus: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    cfg_parallel: int = 1
    ulysses: int = 1
    dit_fsdp: Switch = "off"
    t5_fsdp: Switch = "off"
    expert_offload: Switch = "off"
    rank_timeout: float = 600.0


def in_8_bits(scheme: Scheme | None) -> TypeGuard[Scheme]:
    """Whether a scheme quantizes anything: `bf16` only casts."""
    return scheme not in (None, "bf16")


def _check_quantization(config: GenerateConfig) -> None:
    if config.quantize_on_the_fly and not in_8_bits(config.quantize):
        raise ConfigError("--quantize-on-the-fly needs --quantize with a scheme of 8 bits: add one, or drop it")
    if config.verify and config.quantize is None:
        raise ConfigError("--verify is of what `wanfast quantize` keeps: add --quantize, or drop it")
    if config.verify and config.quantize_on_the_fly:
        raise ConfigError(
            "--verify and --quantize-on-the-fly exclude each other: nothing kept is read; drop one of them"
        )
    if config.quantize and config.precision != "bf16":
        raise ConfigError(f"--quantize {config.quantize} needs --precision bf16: drop one of the two")
    if in_8_bits(config.quantize) and config.dit_fsdp == "on":
        raise ConfigError(
            f"--dit-fsdp on with --quantize {config.quantize}: quantized experts are not sharded, as they fit whole: "
            "drop one of the two"
        )


_MAGCACHE_NAME = re.compile(r"E(\d)(\d{2,})K(\d+)R(\d{2})")
_CURVE_KEY = re.compile(r"[0-9a-f]{12}")


def magcache_settings(name: str) -> tuple[float, int, float] | None:
    """(threshold, skips in a row, share retained) of a short name: E012K2R20 is 0.12, 2, 0.2."""
    match = _MAGCACHE_NAME.fullmatch(name)
    if match is None:
        return None
    whole, rest, skips, retention = match.groups()
    return float(f"{whole}.{rest}"), int(skips), int(retention) / 100


def _check_magcache(config: GenerateConfig) -> None:
    """The options that say which forwards are skipped."""
    name, short = config.magcache, magcache_settings(config.magcache)
    if name not in ("off", "preset", "artifact") and not _CURVE_KEY.fullmatch(name) and not short:
        raise ConfigError(
            f"--magcache {name!r:.40}: take off, preset, artifact, a key of magcache/, or settings such as E012K2R20"
        )
    greedy = {"--magcache-thresh": config.magcache_thresh}
    limits = {"--magcache-k": config.magcache_k, "--retention-ratio": config.retention_ratio}
    sizes = {"--magcache-budget": config.magcache_budget, "--magcache-skip": config.magcache_skip}
    others = {
        "--magcache-rule": config.magcache_rule,
        "--magcache-joint": config.magcache_joint != "auto",
        "--magcache-interpolate": config.magcache_interpolate,
    }
    given = [option for option, value in {**greedy, **limits, **sizes}.items() if value is not None]
    if name == "off" and (idle := [*given, *(option for option, value in others.items() if value)]):
        raise ConfigError(f"{idle[0]} needs --magcache: add it, with preset for example, or drop the option")
    if short and given:
        raise ConfigError(f"--magcache {name} says what {given[0]} would: write --magcache preset, or drop {given[0]}")
    if sum(value is not None for value in sizes.values()) + (config.magcache_thresh is not None) > 1:
        raise ConfigError("--magcache-thresh, --magcache-budget and --magcache-skip exclude each other: keep one")
    spelt = f"--magcache {name}: " if short else ""
    threshold, max_skips, retention = short or (config.magcache_thresh, config.magcache_k, config.retention_ratio)
    _check(threshold, f"{spelt}--magcache-thresh", lambda x: 0 < x <= 10, lambda x: "take 0.01 to 10")
    _check(max_skips, f"{spelt}--magcache-k", lambda n: 1 <= n <= 1000, lambda n: "take 1 to 1000 skips in a row")
    _check(retention, f"{spelt}--retention-ratio", lambda x: 0 <= x <= 1, lambda x: "take a share, 0 to 1")
    _check(
        config.magcache_budget,
        "--magcache-budget",
        lambda x: 0 < x <= 1,
        lambda x: "take the share of forwards to compute, over 0 to 1",
    )
    _check(config.magcache_skip, "--magcache-skip", lambda n: n >= 0, lambda n: "take the forwards to skip, from 0")


def _check_ranks(config: GenerateConfig) -> None:
    """The options that say how many ranks work on a video, and on how many machines."""
    if isinstance(config.num_gpus, int) and not 1 <= config.num_gpus <= 1024:
        raise ConfigError(f"--num-gpus {config.num_gpus!s:.20}: take 1 to 1024, or auto")
    _check(config.nnodes, "--nnodes", lambda n: 1 <= n <= 1024, lambda n: "take the number of machines, 1 to 1024")
    _check(
        config.node_rank,
        "--node-rank",
        lambda n: 0 <= n < config.nnodes,
        lambda n: f"number the --nnodes {config.nnodes} machines from 0",
    )
    for option, degree in (("--cfg-parallel", config.cfg_parallel), ("--ulysses", config.ulysses)):
        _check(degree, option, lambda n: n >= 1, lambda n: "take 1 or more, or leave it out")
    _check(config.rank_timeout, "--rank-timeout", lambda x: 1 <= x <= 86400, lambda x: "take 1 to 86400 seconds")
    if config.nnodes > 1 and config.rdzv_endpoint is None:
        raise ConfigError("--nnodes needs --rdzv-endpoint: HOST:PORT of the first machine, the same on all")
    if config.rdzv_endpoint is not None:
        if config.nnodes == 1:
            raise ConfigError("--rdzv-endpoint is for several machines: add --nnodes, or drop it")
        if not re.fullmatch(r"[^\s:]+:\d{1,5}", config.rdzv_endpoint):
            raise ConfigError(f"--rdzv-endpoint {config.rdzv_endpoint!r} is not HOST:PORT: write it as node0:29500")
    if config.dit_fsdp == "on" and config.expert_offload == "on":
        raise ConfigError("--dit-fsdp on and --expert-offload on exclude each other: shards stay on their GPUs")


def parse_size(size: str) -> tuple[int, int]:
    """(width, height) of '1280x720' (or the reference's '1280*720'): the area for a video of the image's shape."""
    match = re.fullmatch(r"(\d{1,4})[xX*](\d{1,4})", size.strip())
    if match is None:
        raise ConfigError(f"--size {size!r} is not WIDTHxHEIGHT, up to 9999 each: write 1280x720 or 832x480")
    width, height = int(match[1]), int(match[2])
    if width % 16 or height % 16 or not (width and height):
        near = "x".join(str(max(16, round(n / 16) * 16)) for n in (width, height))
        raise ConfigError(f"--size {size} must be multiples of 16: try {near}")
    return width, height


def from_options(kind: type[T], options: dict[str, Any]) -> T:
    """`kind(**options)` for options that come from a file: unknown names and wrong types are ConfigErrors too."""
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(options.keys() - fields):
        raise ConfigError(f"there is no option {unknown[0]!r}; the options are {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(kind)
    for name, value in options.items():
        if not _is_instance(value, hints[name]):
            raise ConfigError(f"--{name.replace('_', '-')} {value!r:.60}: {_describe(hints[name])} is needed")
    return kind(**options)


def _is_instance(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_is_instance(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _describe(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(choices)
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "nothing"}
    return " or ".join(_describe(choice) for choice in choices if choice is not types.NoneType) or names[hint]


def _check(value: T | None, option: str, is_fine: typing.Callable[[T], bool], fix: typing.Callable[[T], str]) -> None:
    if value is not None and not is_fine(value):
        raise ConfigError(f"{option} {value!s:.20}: {fix(value)}")


def _frames_fix(frames: int) -> str:
    near = max(1, (frames + 1) // 4 * 4 + 1)
    return f"a clip has 4n+1 frames: try {near}"


def _check_places(config: GenerateConfig | QuantizeConfig) -> None:
    """An empty path would be the current folder."""
    if not config.model.strip():
        raise ConfigError("--model is empty: take tiny, a14b or a folder of weights")
    if not config.artifacts_dir.strip():
        raise ConfigError("--artifacts-dir is empty: name a folder, or leave it out")


def _check_text(name: str, value: object) -> None:
    """A text that no file and no path can hold is refused before it meets one."""
    if not isinstance(value, str):
        return
    option = f"--{name.replace('_', '-')}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{option} {value!a:.60} is not valid text: write it as UTF-8") from None
    if "\0" in value and "prompt" not in name:
        raise ConfigError(f"{option} {value!a:.60} holds a NUL character: name it without")
