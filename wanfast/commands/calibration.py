"""Measures the clips of a calibration on the ranks; clips that an earlier run measured are not measured again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from wanfast.commands import dispatch
from wanfast.magcache_calib.clips import Clip
from wanfast.magcache_calib.measured import read_clip, require_clip, write_clip
from wanfast.runtime.errors import from_failure
from wanfast.runtime.planning.completed import effective
from wanfast.runtime.planning.placement import place
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.store.artifacts import ArtifactStore
from wanfast.runtime.store.model_files import ModelFiles


def plans_of(given: dict[str, Any], clips: list[Clip], files: ModelFiles, **changes: Any) -> list[Plan]:
    """Returns one plan for each clip of a calibration.

    A clip is planned as `wanfast generate` would plan a video with the options `given` and the clip's images, prompt
    and seed. `files`: the model's files. `changes`: fields of `Plan` that get other values, the same in all plans.
    Raises WanFastError.
    """
    plans = []
    for clip in clips:
        config = effective({**given, **clip.options}, files, clip.image_sha256, clip.last_image_sha256)
        plans.append(dataclasses.replace(Plan.of(config, files.spec, clip.image_size), **changes))
    return place(plans)


def measured_clips(
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
