"""Plans one video for each request, and decides one mesh and one placement for all of them.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.runtime.config import OPTIONS, OutputConfig
from wanfast.runtime.config.option import flag, options_of
from wanfast.runtime.errors import ConfigError, WanFastError, failure
from wanfast.runtime.planning.completed import model_of
from wanfast.runtime.planning.devices import require_attention_of
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.placement import check_skips, place, placement_notes
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.request_files import EXPERT_OPTIONS, SOURCES, Request, shared_by_all
from wanfast.runtime.planning.resolve import resolve
from wanfast.runtime.store.identity import is_old
from wanfast.runtime.store.loras import loras_of
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import QuantizedExpert, require_experts


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
        return Planned(item.request, error=shared_by_all("device"))
    return item


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
                "--from: an expert's file has changed since the earlier run: restore the file, or give experts by "
                f"{' and '.join(map(flag, EXPERT_OPTIONS))}"
            )
        if request.lora_sha256 not in (None, plan.config.models.lora_sha256):
            raise ConfigError(
                "--from: a LoRA file has changed since the earlier run: restore the file, or give LoRAs by --lora"
            )
        if needs_weights:
            require_attention_of(plan)
            files.require()
            files.identify()
            require_experts(files, plan.config.models, required)
        else:
            plan = dataclasses.replace(plan, notes=(*plan.notes, *_missing_notes(plan, files)))
        plan = dataclasses.replace(plan, notes=(*plan.notes, *request.notes, *_weights_notes(request, files)))
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
                f"--from: {getattr(video, name)} is not the {SOURCES[name]} of the earlier run: restore the earlier "
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
