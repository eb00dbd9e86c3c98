"""Runs the jobs of a command: on one rank in this process, or on ranks that are separate processes."""

from __future__ import annotations

import atexit
import gc
import json
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from wanfast.commands.progress import job_progress
from wanfast.runtime.machine import gpus
from wanfast.runtime.planning import past_runs
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.progress import ProgressFn, ResultFn
from wanfast.runtime.processes import cluster
from wanfast.runtime.processes.launch import RankGroups, num_groups
from wanfast.runtime.processes.run_folder import JOB, RESULT, frames_file, new_run_folder, write_result
from wanfast.runtime.store.artifacts import noting, write_synced
from wanfast.runtime.store.json_files import Document

Verb = Literal["generate", "warmup", "calibrate-magcache", "calibrate-attention"]
VERBS = get_args(Verb)
_WORKERS: dict[Verb, str] = {
    "generate": "wanfast.runtime.jobs.generate",
    "warmup": "wanfast.runtime.jobs.warmup",
    "calibrate-magcache": "wanfast.magcache_calib.calibrate",
    "calibrate-attention": "wanfast.attention_calib.calibrate",
}


def run_jobs(
    verb: Verb,
    jobs: list[Job],
    plans: list[Plan],
    *,
    of_list: bool,
    on_result: ResultFn,
    ray: str | None = None,
) -> list[Document]:
    """Runs the jobs of the command `verb`, and returns one result for each job, in the order of `jobs`.

    `plans`: one plan for each job. All jobs run on the ranks that the first plan describes.
    `of_list`: whether the jobs belong to a list of videos, or to a calibration of several clips. If true, the jobs run
    in separate processes, even if only one job remains to be done. If false, and if there is only one rank, the jobs
    run in this process. A warmup always runs in a separate process.
    `on_result(index, result)` is called as soon as a job is done.
    `ray`: the address of a Ray cluster, or None. In a cluster, the first plan describes the ranks of each machine.
    """
    atexit.register(gc.freeze)  # else the interpreter, before it ends, searches all modules for garbage
    config = plans[0].config
    documents = [job.to_json() for job in jobs]
    folder = new_run_folder(Path(config.models.artifacts_dir), {"verb": verb, "jobs": documents})
    document = {"worker": _WORKERS[verb], "first": 0, "jobs": documents}
    with job_progress(_names(plans), on_result) as (on_progress, on_result):
        if ray is not None:
            _write_job(folder, document)
            with cluster.connected(ray) as module:
                results = cluster.RayList(module, ray, plans, documents).run(on_result, on_progress)
        elif plans[0].mesh.size == 1 and not _needs_a_process(verb, of_list=of_list):
            _write_job(folder, document)
            results = _here(verb, folder, jobs, config.ranks.device, on_result, on_progress)
        else:
            outputs = [output for plan in plans for output in plan.outputs] if verb == "generate" else []
            with RankGroups(folder, config.ranks, num_groups(config.ranks, len(jobs))) as ranks:
                results = ranks.run(
                    _WORKERS[verb],
                    documents,
                    outputs,
                    on_result=on_result,
                    on_progress=on_progress,
                    is_last=True,
                )
    if verb == "generate":
        past_runs.record(config.models.artifacts_dir, results)
    with noting():
        write_synced(folder / RESULT, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _names(plans: list[Plan]) -> list[str]:
    """Returns a name for the job of each plan: the name of the video's file, or the number of the clip."""
    return [plan.outputs[0].name if plan.outputs else f"clip {number}" for number, plan in enumerate(plans, 1)]


def _write_job(folder: Path, document: Document) -> None:
    write_synced(folder / JOB, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _needs_a_process(verb: Verb, *, of_list: bool) -> bool:
    """Returns whether one rank runs in a separate process.

    A warmup does, because on a CPU one matrix product may take minutes, and no signal is handled meanwhile. A list
    does too. If a line's process is killed for its memory, or meets an error of its GPU, this process must still run
    and report the other lines. This holds also for the last line of a list, because this line may have killed an
    earlier run.
    """
    return verb == "warmup" or of_list


def _here(
    verb: Verb, folder: Path, jobs: list[Job], device: str, on_result: ResultFn, on_progress: ProgressFn
) -> list[Document]:
    """Runs the jobs on one rank in this process."""
    if device == "cuda":
        gpus.set_environment()
    from wanfast.runtime.distributed.ranks import Ranks  # torch begins here
    from wanfast.runtime.engine.session import Sessions
    from wanfast.runtime.processes.worker import worker_half

    results: dict[int, Document] = {}
    for index, result in worker_half(_WORKERS[verb])(
        jobs, Sessions(Ranks(device)), progress=on_progress, frames_of=partial(frames_file, folder)
    ):
        results[index] = result
        with noting():  # this process has the result
            write_result(folder, index, result)
        on_result(index, result)
    return [results[index] for index in range(len(jobs))]
