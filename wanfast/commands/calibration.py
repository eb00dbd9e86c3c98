"""Plans the clips of a calibration, measures them on the ranks, and stores the result as an artifact."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfast.commands import dispatch
from wanfast.magcache_calib.clips import Clip, digest_of, read_set, shipped_set
from wanfast.magcache_calib.measured import read_clip, require_clip, write_clip
from wanfast.runtime.config import NO_VIDEO, EffectiveConfig
from wanfast.runtime.config.option import absolute
from wanfast.runtime.errors import from_failure
from wanfast.runtime.machine import packages
from wanfast.runtime.machine.once import asked_once
from wanfast.runtime.planning.completed import effective, model_of
from wanfast.runtime.planning.placement import place
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.model_files import ModelFiles
from wanfast.runtime.store.quantized import require_experts


@dataclass(frozen=True)
class PlannedSet:
    """This class holds the clips of a calibration, and one plan for each clip."""

    files: ModelFiles  # of the model
    clips: list[Clip]
    plans: list[Plan]


def planned_set(given: dict[str, Any], folder: Path | None, seed: int, **changes: Any) -> PlannedSet:
    """Reads a set of clips, and plans each clip. Raises WanFastError.

    A clip is planned as `wanfast generate` would plan a video with the options `given` and the clip's images, prompt
    and seed. `folder`: the folder of the set; if None, the set is the one that ships. `seed`: the seed of clips that
    have none. `changes`: fields of `Plan` that get other values, the same in all plans.
    """
    with asked_once():
        files = model_of({**NO_VIDEO, **given})  # before the clips are read
        files.require()
        place_of_set = shipped_set(files.spec) if folder is None else Path(absolute(str(folder), "--set"))
        clips = read_set(place_of_set, seed, takes_images=files.spec.takes_images)
        plans = []
        for clip in clips:
            config = effective({**given, **clip.options}, files, clip.image_sha256, clip.last_image_sha256)
            plans.append(dataclasses.replace(Plan.of(config, files.spec, clip.image_size), **changes))
        plans = place(plans)
        require_experts(files, plans[0].config.models)
    return PlannedSet(files, clips, plans)


def calibrated(
    verb: dispatch.Verb,
    kind: str,
    planned: PlannedSet,
    inputs_of: Callable[[EffectiveConfig, ModelFiles, str], dict[str, Any]],
    further: dict[str, Any],
    is_whole: Callable[[dict[str, Any]], bool],
    writer: Callable[[list[dict[str, Any]]], Callable[[Path], None]],
) -> dict[str, Any]:
    """Returns a JSON document that describes the artifact of a calibration. Raises WanFastError.

    If the artifact is missing, the clips are measured first, and the artifact is stored.

    `verb`, `kind` and `is_whole` are those of `_measured_clips`. `inputs_of(config, files, digest of clips)`: returns
    everything on which measurements depend. `further`: everything else on which the artifact depends.
    `writer(measurements of all clips)`: returns a function that writes the artifact into a folder.
    """
    config, files = planned.plans[0].config, planned.files
    store = ArtifactStore(Path(config.models.artifacts_dir))
    inputs = inputs_of(config, files, digest_of(planned.clips)) | further
    folder, made_here = store.find(kind, inputs, verify=True), False
    if folder is None:
        pairs = zip(planned.plans, planned.clips, strict=True)
        of_clips = [inputs_of(plan.config, files, digest_of([clip])) for plan, clip in pairs]
        measured = _measured_clips(verb, kind, of_clips, planned.plans, store, is_whole)
        published = store.publish(kind, inputs, writer(measured), packages.versions())
        folder, made_here = published.folder, published.made_here
    return {
        "output": str(folder),
        "key": folder.name,
        "was_there": not made_here,
        "clips": len(planned.clips),
        "inputs": inputs,
        "versions": packages.versions(),
    }


def _measured_clips(
    verb: dispatch.Verb,
    kind: str,
    inputs: list[dict[str, Any]],
    plans: list[Plan],
    store: ArtifactStore,
    is_whole: Callable[[dict[str, Any]], bool],
) -> list[dict[str, Any]]:
    """Returns the measurements of every clip. Clips that an earlier run measured are not measured again.

    As soon as a clip is measured, its measurements are stored. Raises WanFastError.

    `verb`: the command that measures. `kind`: the kind of the artifact for which the clips are measured.
    `inputs`: for each clip, everything on which its measurements depend. `plans`: one plan for each clip.
    `is_whole`: returns whether stored measurements are complete.
    """
    missing = [index for index, of_clip in enumerate(inputs) if read_clip(store, kind, of_clip, is_whole) is None]
    if len(missing) < len(inputs):
        print(
            f"note: {len(inputs) - len(missing)} of {len(inputs)} clips were measured in an earlier run",
            file=sys.stderr,
        )

    def keep(index: int, result: dict[str, Any]) -> None:
        if "error" not in result:
            write_clip(store, kind, inputs[missing[index]], result)

    if missing:
        results = dispatch.run_jobs(
            verb,
            [plans[index].job() for index in missing],
            [plans[index] for index in missing],
            of_list=len(inputs) > 1,
            on_result=keep,
        )
        if failed := next((result for result in results if "error" in result), None):
            raise from_failure(failed)
    return [require_clip(store, kind, of_clip, is_whole) for of_clip in inputs]
