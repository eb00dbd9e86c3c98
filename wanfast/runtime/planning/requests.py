"""Makes requests from the command line and from its files, and plans one video for each request.

The command line may name three files: a prompt (--prompt-file), an earlier video's JSON (--from), and a list of videos
(--jobs). A line of the list overrides the command line, and the command line overrides the earlier run.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanfast.runtime.config import OPTIONS, EffectiveConfig, OutputConfig, RanksConfig
from wanfast.runtime.config.option import absolute, flag, options_of
from wanfast.runtime.config.precedence import repeated, without_overridden
from wanfast.runtime.config.skipping import spelled_out
from wanfast.runtime.errors import ConfigError, WanFastError, failure, foreign
from wanfast.runtime.facts.choices import EXPERTS
from wanfast.runtime.machine.packages import require_attention, require_fp8
from wanfast.runtime.planning.effective_config import model_of
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.placement import check_skips, place, placement_notes
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store.identity import is_old
from wanfast.runtime.store.loras import loras_of
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert, require_experts

_SIDECAR = "give the .json that wanfast writes beside a video"  # for --from
_FEW_LINES = 5  # more bad lines than these are reported together, if no line is good
# The options that are the same for all lines of a list, because one mesh makes all of them.
_EXPERTS = [f"{expert}_expert" for expert in EXPERTS]
_LORAS = [name for name, option in OPTIONS.items() if option.is_repeatable and option.option.path]
_SOURCES = {  # of a video, with the words by which an error names them
    "image": "image",
    "last_image": "last image",
    "continue_from": "continued video",
}
_LAUNCH_OPTIONS = [name for name in options_of(RanksConfig) if name != "device"]


class _NotAnObjectError(ConfigError):
    """This error means that a line of a list is no JSON object."""


@dataclass(frozen=True)
class Request:
    """A request holds the options of one video, and the files from which these options were read."""

    options: dict[str, Any]
    line: int | None = None  # its number in the jobs file
    sources: tuple[Path, ...] = ()  # files that the options came from; never overwritten
    written: tuple[str, ...] = ()  # the prompts that the run of --from extended
    sha256: dict[str, str] = field(default_factory=dict)  # of the images that --from needs, by their option
    weights: dict[str, str] | None = None  # fingerprints of the weights of the run that --from names
    expert_sha256: tuple[str, ...] | None = None  # of the experts that options of that run name
    lora_sha256: tuple[str, ...] | None = None  # of the LoRAs of that run
    engines: str | None = None  # the name of cuDNN's engines in that run, if this one makes the same video
    asked: dict[str, Any] | None = None  # the options that were given, now or for the run of --from; None: all
    error: ConfigError | None = None  # the line could not be read


@dataclass(frozen=True)
class Planned:
    """This class holds a request and its plan.

    If `plan` is None, either `error` says why, or `existing` names the files of a video that exists already.
    """

    request: Request
    plan: Plan | None = None
    error: WanFastError | None = None
    existing: tuple[Path, ...] = ()  # all files of the video, which `--skip-existing` leaves as they are

    def job(self) -> Job:
        """Returns the job of a request that has a plan."""
        assert self.plan is not None
        return self.plan.job()

    def outcome(self) -> dict[str, Any]:
        """Returns the result of a request without a plan: its error, or a note that the video exists."""
        if self.error is None:
            return {"output": str(self.existing[0]), "skipped": "the video exists"}
        return failure(self.error)


def plan_requests(requests: list[Request], *, needs_weights: bool) -> list[Planned]:
    """Plans all requests, and decides one mesh and one placement for all plans.

    For a bad line of a list, the error is returned in place of a plan. If there is no list, the error of the single
    request is raised. `needs_weights`: whether the plans will be run. If false, missing weights, artifacts and packages
    give notes instead of errors.
    """
    taken: dict[Path, int | None] = {}
    required: set[tuple[QuantizedExpert, bool]] = set()
    planned = [_plan(request, taken, required, needs_weights) for request in requests]
    planned = _refuse_lost_sources(planned)
    if first := next((item.plan for item in planned if item.plan), None):
        planned = [_like(item, first) for item in planned]
        ready = [item for item in planned if item.plan]
        plans = place([item.plan for item in ready if item.plan], must_fit=needs_weights)
        plans[0] = dataclasses.replace(plans[0], notes=(*plans[0].notes, *placement_notes(plans)))
        placed = iter(plans)
        planned = [_checked(item.request, next(placed)) if item.plan else item for item in planned]
    return planned


def _checked(request: Request, plan: Plan) -> Planned:
    """Checks the skips of a line again, because they may be impossible on the ranks of the whole list."""
    try:
        check_skips(plan)
    except ConfigError as error:
        if request.line is None:
            raise
        return Planned(request, error=error)
    return Planned(request, plan if request.asked is None else dataclasses.replace(plan, requested=request.asked))


def _like(item: Planned, first: Plan) -> Planned:
    """Adds an error if a line needs another device than the first."""
    if item.plan is None:
        return item
    if item.plan.config.ranks.device != first.config.ranks.device:
        return Planned(item.request, error=_shared_by_all("device"))
    return item


def _shared_by_all(name: str) -> ConfigError:
    return ConfigError(
        f"{flag(name)} must be the same for the whole list: give it on the command line, or make a second list"
    )


def _plan(
    request: Request, taken: dict[Path, int | None], required: set[tuple[QuantizedExpert, bool]], needs_weights: bool
) -> Planned:
    """Plans one request. `taken` and `required` hold earlier lines' outputs and quantized experts; adds its own."""
    try:
        if request.error is not None:
            raise request.error
        output = _output_of(request)
        if output.skip_existing and all(map(os.path.exists, output.paths)):
            return Planned(request, existing=output.paths)
        if request.sha256 and not model_of(request.options).spec.takes_images:
            raise ConfigError(
                f"--from: the earlier video starts from an image, but --model {request.options['model']} makes videos "
                "from text alone: drop --model, or write a command without --from"
            )
        plan, files = resolve(request.options, runs=needs_weights)
        if request.written:
            plan = dataclasses.replace(plan, config=plan.config.replace(written_prompts=request.written))
        (separate,) = place([plan], must_fit=needs_weights)  # `plan_requests` places all lines together
        check_skips(separate)
        for path in (path.resolve() for path in plan.outputs):
            if path in taken:
                raise ConfigError(f"--output: line {taken[path]} writes {path} too: give another file")
        _refuse_other_sources(request, plan)
        if request.expert_sha256 not in (None, plan.config.models.expert_sha256):
            raise ConfigError(
                "--from: an expert's file is not that of the earlier run: restore the earlier file, or give "
                f"experts by {' and '.join(map(flag, _EXPERTS))}"
            )
        if request.lora_sha256 not in (None, plan.config.models.lora_sha256):
            raise ConfigError(
                "--from: a LoRA file is not that of the earlier run: restore the earlier file, or give LoRAs by --lora"
            )
        if needs_weights:
            require_attention_of(plan)
            files.require()
            files.identify()
            require_experts(files, plan.config.models, required)
        else:
            plan = dataclasses.replace(plan, notes=(*plan.notes, *_missing_notes(plan, files)))
        plan = dataclasses.replace(plan, notes=(*plan.notes, *_weights_notes(request, files)))
        taken.update(dict.fromkeys((path.resolve() for path in plan.outputs), request.line))
        return Planned(request, plan)
    except WanFastError as error:
        if request.line is None:
            raise
        return Planned(request, error=error)


def _refuse_other_sources(request: Request, plan: Plan) -> None:
    """Raises ConfigError if an image or video that --from names has other content than in the earlier run."""
    video = plan.config.video
    for name, wanted in request.sha256.items():
        if wanted != getattr(video, f"{name}_sha256"):
            raise ConfigError(
                f"--from: {getattr(video, name)} is not the {_SOURCES[name]} of the earlier run: restore the earlier "
                f"file, or give {flag(name)}"
            )


def _output_of(request: Request) -> OutputConfig:
    own = {name: value for name, value in request.options.items() if name in options_of(OutputConfig)}
    return OutputConfig(**{name: value for name, value in own.items() if OPTIONS[name].accept(value) is not None})


def _refuse_lost_sources(planned: list[Planned]) -> list[Planned]:
    """Replaces the plans that would overwrite a file that any line of the list is made from, by errors."""
    plans = [(item.request, item.plan) for item in planned if item.plan]
    sources = {Path(image).resolve() for _, plan in plans for image in plan.config.video.images.values()}
    sources |= {lora.file.resolve() for _, plan in plans for lora in loras_of(plan.config.models)}
    sources |= {source.resolve() for request, _ in plans for source in request.sources}
    checked = []
    for item in planned:
        lost = next((path for path in (item.plan.outputs if item.plan else ()) if path.resolve() in sources), None)
        error = ConfigError(f"--output: {lost} would overwrite a file that a video is made from: give another file")
        if lost is not None and item.request.line is None:
            raise error
        checked.append(item if lost is None else Planned(item.request, error=error))
    return checked


def _weights_notes(request: Request, files: ModelFiles) -> list[str]:
    """Returns a note if the weights are not those of the run that --from names, or if that cannot be known."""
    if request.weights is None or not files.exists or request.weights == files.fingerprints:
        return []
    if any(map(is_old, request.weights.values())):
        return [
            "--from: the earlier run did not hash all of its weights, so a change of the weights would not be noticed"
        ]
    return ["--from: the weights changed since the earlier run"]


def require_attention_of(plan: Plan) -> None:
    """Raises ConfigError if the plan's device cannot run its attention, for example because a package is missing."""
    models, device = plan.config.models, plan.config.ranks.device
    require_attention(models.attention, device)
    if plan.sparsity and plan.sparsity.has_fp8:
        require_fp8(device, f"--attention-plan {models.attention_plan}")


def _missing_notes(plan: Plan, files: ModelFiles) -> list[str]:
    """Returns the errors that a run of this plan would raise because something is missing."""
    notes = []
    try:
        require_attention_of(plan)
    except ConfigError as error:
        notes.append(str(error))
    try:
        if files.exists:
            require_experts(files, plan.config.models)
    except WanFastError as error:
        notes.append(str(error))
    return notes


def read_requests(
    typed: dict[str, Any], prompt_file: Path | None, from_file: Path | None, jobs_file: Path | None
) -> list[Request]:
    """Returns one request for each line of `jobs_file`, or a single request if `jobs_file` is None.

    A bad line of `jobs_file` becomes a request that holds an error. Any other fault raises ConfigError.
    """
    prompt_file, from_file = _whole(prompt_file, "--prompt-file"), _whole(from_file, "--from")
    jobs_file = _whole(jobs_file, "--jobs")
    if prompt_file is not None:
        if "prompt" in typed:
            raise ConfigError("--prompt and --prompt-file both give the prompt: drop one of the two")
        typed = {**typed, "prompt": _read(prompt_file, "--prompt-file").strip()}
    for name, value in typed.items():  # before they are given to each line
        OPTIONS[name].accept(value)
    earlier = Request({}) if from_file is None else _read_earlier(from_file, typed)
    base = dataclasses.replace(
        earlier,
        options={**earlier.options, **typed},
        asked={**(earlier.asked or {}), **typed},
        sources=tuple(file for file in (prompt_file, jobs_file) if file is not None),
        written=() if typed.keys() & {"prompt", "extend_prompt"} else earlier.written,
        sha256={name: sha256 for name, sha256 in earlier.sha256.items() if name in earlier.options.keys() - typed},
        weights=None if {"model", *_EXPERTS} & typed.keys() else earlier.weights,
        expert_sha256=None if {*_EXPERTS} & typed.keys() else earlier.expert_sha256,
        lora_sha256=earlier.lora_sha256,
        engines=earlier.engines if typed.keys() <= {*options_of(OutputConfig), "artifacts_dir"} else None,
    )
    if jobs_file is None:
        return [base]
    if from_file is not None:
        raise ConfigError(
            "--from and --jobs exclude each other: write the options of the earlier run into the lines of --jobs"
        )
    requests = list(_read_jobs(jobs_file, base))
    if not requests:
        raise ConfigError(f"--jobs {jobs_file} has no lines: write a JSON object of options on each line")
    first = requests[0]
    if len(requests) > _FEW_LINES and all(isinstance(request.error, _NotAnObjectError) for request in requests):
        raise ConfigError(
            f"--jobs {jobs_file}: none of its {len(requests)} lines is a JSON object of options (line {first.line}: "
            f"{first.error}): give a file with such lines"
        )
    return requests


def _read_earlier(file: Path, typed: dict[str, Any]) -> Request:
    """Reads the effective options of an earlier run, so that no default and no random seed changes the video."""
    text = _read(file, "--from")
    try:
        document = json.loads(text)
        effective = EffectiveConfig.from_json(document["effective"])
        weights, engines = document["weights"], document.get("cudnn_engines")
        if not isinstance(weights, dict | None) or not isinstance(engines, str | None):
            raise TypeError(weights, engines)
        asked = _asked(document["requested"])
    except ConfigError as error:
        raise ConfigError(
            f"--from {file} holds an option that cannot be used: {error}; correct this option in the file, or use the "
            ".json of another video"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--from {file} is not the .json of a video: {_SIDECAR}") from None
    same_ranks = effective.ranks.nnodes == 1 and not {"num_gpus", "nnodes"} & typed.keys()
    reused = {
        name
        for name, field in OPTIONS.items()
        if not field.option.of_this_run and (same_ranks or not field.option.of_these_ranks)
    }
    ran = {name: value for name, value in effective.options().items() if name in reused}
    asked = {name: ran[name] if OPTIONS[name].option.path else asked[name] for name in asked.keys() & reused}
    options, asked = repeated(ran, asked, typed)  # with paths as in `ran`, which are absolute
    has_its_loras = all(name in options and options[name] == ran[name] for name in _LORAS)
    if "extend_prompt" in typed and effective.video.written_prompts:
        options["prompt"] = effective.video.written_prompts
    return Request(
        options,
        asked=asked,
        written=effective.video.written_prompts,
        sha256={name: sha256 for name in _SOURCES if (sha256 := getattr(effective.video, f"{name}_sha256"))},
        weights=weights,
        expert_sha256=effective.models.expert_sha256,
        lora_sha256=effective.models.lora_sha256 if has_its_loras else None,
        engines=engines,
    )


def _asked(requested: dict[str, Any]) -> dict[str, Any]:
    """Returns the options in `requested` of an earlier run's .json that this version has. Raises ConfigError."""
    known = {name: value for name, value in requested.items() if name in OPTIONS and value is not None}
    for name, value in known.items():
        OPTIONS[name].accept(value)
    return known | spelled_out(known.get("magcache", ""))


def _read_jobs(file: Path, base: Request) -> Iterator[Request]:
    """Yields a request for each line, except blank lines and # lines. Line 7 writes out-0007.mp4 by default."""
    stem = Path(base.options.get("output", "out.mp4"))
    for number, line in enumerate(_read(file, "--jobs").split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            own = _read_line(line, file.parent, base)
        except ConfigError as error:
            yield Request({}, number, error=error)
            continue
        own_name = str(stem.with_stem(f"{stem.stem}-{number:04d}"))
        yield dataclasses.replace(
            base,
            options={**without_overridden(base.options, own), "output": own_name, **own},
            asked=None,
            line=number,
        )


def _read_line(line: str, folder: Path, base: Request) -> dict[str, Any]:
    """Returns the options of a line; null leaves an option as the command line has it. Raises ConfigError.

    The paths of a line's images, experts and LoRAs are relative to the list's own folder, because they move together
    with the list.
    """
    try:
        own = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _NotAnObjectError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _NotAnObjectError(f"not JSON: {error!s:.80}") from None
    if not isinstance(own, dict):
        raise _NotAnObjectError('not a JSON object: write one, such as {"prompt": ...}')
    own = {name: value for name, value in own.items() if value is not None}
    if other := [name for name in _LAUNCH_OPTIONS if name in own and own[name] != base.options.get(name)]:
        raise _shared_by_all(other[0])
    for name in own.keys() & {*_SOURCES, *_EXPERTS}:
        if isinstance(path := own[name], str) and path and not path.startswith("~"):
            own[name] = str(folder / path)
    for name in own.keys() & _LORAS:
        given = OPTIONS[name].accept(own[name])
        own[name] = tuple(each if each.startswith("~") else str(folder / each) for each in given)
    return own


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON. Raises ConfigError if it has one key twice, of which one would be lost."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{twice!r:.60} is given twice in the line: keep one")
    return dict(pairs)


def _whole(file: Path | None, option: str) -> Path | None:
    return None if file is None else Path(absolute(str(file), option))


def _read(file: Path, option: str) -> str:
    named, fix = f"{option} {file}", _SIDECAR if option == "--from" else "give a UTF-8 text file that can be read"
    with foreign(named, fix):
        is_missing = not file.exists()
    if is_missing:
        raise ConfigError(f"{named}: no such file; check the path")
    with foreign(named, fix):
        return file.read_text(encoding="utf-8-sig")
