"""What a person typed, and the files of options behind it, as requests and their plans: one video each. Torch-free.

Three files may stand behind the command line: a prompt (--prompt-file), an earlier video's JSON (--from), and a list of
videos (--jobs). The nearer to the video wins: a line of the list over what was typed, that over the earlier run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.config import EffectiveConfig, GenerateConfig, from_options
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.model_files import ModelFiles
from wanfast.runtime.packages import require_attention
from wanfast.runtime.placement import LAUNCH_OPTIONS, check_skips, place, placement_notes
from wanfast.runtime.plan import Job, Plan, resolve
from wanfast.runtime.quantized_artifacts import QuantizedExpert, require_experts

_OPTIONS = {field.name for field in dataclasses.fields(GenerateConfig)}


@dataclass(frozen=True)
class Request:
    """The options of one video, and where they came from."""

    options: dict[str, Any]
    line: int | None = None  # of the jobs file
    sources: tuple[Path, ...] = ()  # files that the options came from: never to be overwritten
    image_sha256: str | None = None  # what the image must be, when an earlier run is repeated
    weights: dict[str, str] | None = None  # what the weights were then
    error: ConfigError | None = None  # the line could not be read


@dataclass(frozen=True)
class Planned:
    """A request with its plan, or with the error for which it has none."""

    request: Request
    plan: Plan | None = None
    error: WanFastError | None = None

    def job(self) -> Job:
        """The job of a request that has a plan."""
        assert self.plan is not None
        return self.plan.job(self.request.options)

    def failure(self) -> dict[str, Any]:
        """The result document of a request without a plan."""
        assert self.error is not None
        return failure(self.error)


def plan_requests(requests: list[Request], *, needs_weights: bool) -> list[Planned]:
    """A bad line of a jobs file keeps its error, so that the rest still run; a bad single request raises it."""
    taken: dict[Path, int | None] = {}
    required: set[tuple[QuantizedExpert, bool]] = set()
    planned = [_plan(request, taken, required, needs_weights) for request in requests]
    if first := next((item.plan for item in planned if item.plan), None):
        planned = [_like(item, first) for item in planned]
        ready = [item for item in planned if item.plan]
        configs = [from_options(GenerateConfig, item.request.options) for item in ready]
        plans = place(configs, [item.plan for item in ready if item.plan])
        plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, *placement_notes(configs[0], plans)))
        placed = iter(plans)
        planned = [_checked(item.request, next(placed)) if item.plan else item for item in planned]
    return planned


def _checked(request: Request, plan: Plan) -> Planned:
    """What a line skips, alone possible, may not be on the ranks of the whole list."""
    try:
        check_skips(plan)
    except ConfigError as error:
        if request.line is None:
            raise
        return Planned(request, error=error)
    return Planned(request, plan)


def _like(item: Planned, first: Plan) -> Planned:
    """Unchanged, or with an error where its line wants another device, or other weights on several ranks."""
    shared = ("device", "model") if first.mesh.size > 1 else ("device",)
    for name in shared if item.plan else ():
        if getattr(item.plan.config, name) != getattr(first.config, name):  # type: ignore[union-attr]
            return Planned(item.request, error=_shared_by_all(name))
    return item


def _shared_by_all(name: str) -> ConfigError:
    option = f"--{name.replace('_', '-')}"
    return ConfigError(f"{option} is one for the whole list: give it on the command line, or make a list of its own")


def own_share(planned: list[Planned]) -> list[Planned]:
    """What this machine makes of a list, where machines do not work on one video together: every nnodes-th of it."""
    ready = [item for item in planned if item.plan]
    config = ready[0].plan.config if ready and ready[0].plan else None
    if config is None or config.cfg_parallel * config.ulysses > config.num_gpus:
        return planned
    return planned[config.node_rank :: config.nnodes]


def _plan(
    request: Request, taken: dict[Path, int | None], required: set[tuple[QuantizedExpert, bool]], needs_weights: bool
) -> Planned:
    """`taken`, `required`: outputs and quantized experts of the lines before, to which this one's are added."""
    try:
        if request.error is not None:
            raise request.error
        config = from_options(GenerateConfig, request.options)
        plan, files = resolve(config)
        (plan,) = place([config], [plan])  # alone; all lines together come after
        check_skips(plan)
        for path in (path.resolve() for path in plan.outputs):
            if path in (source.resolve() for source in (Path(plan.config.image), *request.sources)):
                raise ConfigError(f"--output: {path} would replace a file that the video is made from: name another")
            if path in taken:
                raise ConfigError(f"--output: {path} is written by line {taken[path]} too: name another")
        if request.image_sha256 not in (None, plan.config.image_sha256):
            raise ConfigError(f"--from: {plan.config.image} is not the image of that run: put that one back")
        if needs_weights:
            require_attention(plan.config.attention, plan.config.device)
            files.require()
            require_experts(files, plan.config, required)
        else:
            plan = dataclasses.replace(plan, notes=(*plan.notes, *_missing_notes(plan, files)))
        if request.weights is not None and files.exists and request.weights != files.fingerprints:
            plan = dataclasses.replace(plan, notes=(*plan.notes, "--from: the weights changed since that run"))
        taken.update(dict.fromkeys((path.resolve() for path in plan.outputs), request.line))
        return Planned(request, plan)
    except WanFastError as error:
        if request.line is None:
            raise
        return Planned(request, error=error)


def _missing_notes(plan: Plan, files: ModelFiles) -> list[str]:
    """What a run of this plan would be refused for."""
    notes = []
    try:
        require_attention(plan.config.attention, plan.config.device)
    except ConfigError as error:
        notes.append(str(error))
    try:
        if files.exists:
            require_experts(files, plan.config)
    except WanFastError as error:
        notes.append(str(error))
    return notes


def read_requests(
    typed: dict[str, Any], prompt_file: Path | None, from_file: Path | None, jobs_file: Path | None
) -> list[Request]:
    """One request, or one for each line of `jobs_file`; a bad line is kept as such, all else raises ConfigError."""
    if prompt_file is not None:
        if "prompt" in typed:
            raise ConfigError("--prompt and --prompt-file both give the prompt: drop one of the two")
        typed = {**typed, "prompt": _read(prompt_file, "--prompt-file").strip()}
    earlier = Request({}) if from_file is None else _read_earlier(from_file, typed)
    base = dataclasses.replace(
        earlier,
        options={**earlier.options, **typed},
        sources=tuple(file for file in (prompt_file, jobs_file) if file is not None),
        image_sha256=None if "image" in typed else earlier.image_sha256,
        weights=None if "model" in typed else earlier.weights,
    )
    if jobs_file is None:
        return [base]
    if from_file is not None:
        raise ConfigError("--from and --jobs cannot be combined: put the options of the earlier run into the lines")
    requests = list(_read_jobs(jobs_file, base))
    if not requests:
        raise ConfigError(f"--jobs {jobs_file} holds no line: write a JSON object of options on each")
    return requests


def _read_earlier(file: Path, typed: dict[str, Any]) -> Request:
    """The effective options of an earlier run, so that nothing is left to a default or to chance."""
    try:
        document = json.loads(_read(file, "--from"))
        effective = {
            field.name: document["effective"].get(field.name, field.default)
            if field.default is not dataclasses.MISSING
            else document["effective"][field.name]
            for field in dataclasses.fields(EffectiveConfig)
        }
        weights = document["weights"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--from {file} is not the .json that wanfast writes beside a video: name that one") from None
    # where things are kept, and what may be replaced, is this run's own affair
    kept = _OPTIONS - {"overwrite", "verify", "artifacts_dir", "nnodes", "node_rank", "rdzv_endpoint", "rank_timeout"}
    if effective["nnodes"] > 1 or "num_gpus" in typed:  # other ranks than then: their mesh says nothing
        kept -= {"cfg_parallel", "ulysses", "dit_fsdp", "t5_fsdp", "expert_offload"}
    options = _without_overridden({name: value for name, value in effective.items() if name in kept}, typed)
    return Request(options, image_sha256=effective["image_sha256"], weights=weights)


_MAGCACHE_OPTIONS = {name for name in _OPTIONS if name.startswith("magcache_")} | {"retention_ratio"}
_HOW_MUCH = {"magcache_thresh", "magcache_budget", "magcache_skip"}  # is skipped: one of them says it


def _without_overridden(options: dict[str, Any], nearer: dict[str, Any]) -> dict[str, Any]:
    """Without what says otherwise than the options nearer to the video: how to skip forwards, and how many."""
    gone: set[str] = set()
    if "magcache" in nearer:
        gone |= _MAGCACHE_OPTIONS
    if nearer.keys() & _HOW_MUCH:
        gone |= {*_HOW_MUCH, "magcache_rule"}
    return {name: value for name, value in options.items() if name not in gone}


def _read_jobs(file: Path, base: Request) -> Iterator[Request]:
    """Blank lines and # lines are passed over. Without an output of its own, line 7 writes out-0007.mp4."""
    stem = Path(base.options.get("output", GenerateConfig.output))
    for number, line in enumerate(_read(file, "--jobs").split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            own = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Request({}, number, error=ConfigError(f"not JSON: {error!s:.80}"))
            continue
        if not isinstance(own, dict):
            yield Request({}, number, error=ConfigError('not a JSON object of options, such as {"prompt": ...}'))
            continue
        if other := [name for name in LAUNCH_OPTIONS if name in own and own[name] != base.options.get(name)]:
            yield Request({}, number, error=_shared_by_all(other[0]))
            continue
        own_name = str(stem.with_stem(f"{stem.stem}-{number:04d}"))
        yield dataclasses.replace(
            base, options={**_without_overridden(base.options, own), "output": own_name, **own}, line=number
        )


def _read(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {file} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror}: name a text file that can be read") from None
