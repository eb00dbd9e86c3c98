"""Runs the jobs of `wanfast calibrate-attention` on a rank: denoises each clip, and measures errors of attention.

Each clip is denoised with dense attention. In each call of self-attention, some queries are also computed with lossy
attention, and the error of their outputs is measured. Sparse attention is measured for each density of `LADDER`. Here,
as in `wanfast generate`, a router chooses which blocks of keys sparse attention computes. The chosen blocks are used
for several steps, and then the router chooses again. Float8 attention is measured if its kernel runs on all ranks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from wanfast.runtime.engine import attention_probe
from wanfast.runtime.engine.session import Session
from wanfast.runtime.engine.sparse_attention import SparseAttention
from wanfast.runtime.facts.densities import LADDER, Densities, bands_of
from wanfast.runtime.facts.sparsity import list_length
from wanfast.runtime.jobs.loop import by_step, measuring
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.progress import ProgressFn


def measure(index: int, job: Job, session: Session, progress: ProgressFn) -> dict[str, Any]:
    """Denoises the clip of `job` with dense attention, and returns the errors that lossy attention would cause.

    After each step, `progress` is called with `index`, the number of the job. Returns a dict:

    * "errors" [band][layer][head][choice]: the mean of the relative errors in the calls of a band. The choices are the
      densities of `LADDER`, in order. If float8 attention runs on all ranks, the last choice is float8.
    * "seconds": the seconds of denoising.

    Raises ConfigError if --fp8 was given, but float8 attention does not run on all ranks.
    """
    ranks, precision, head_dim = session.ranks, job.config.models.precision, session.files.spec.dit.head_dim
    if job.requested.get("fp8"):
        attention_probe.require_fp8(ranks, precision, head_dim, "--fp8")
    plan, images = session.plan(job)
    dit, bands, steps = plan.spec.dit, bands_of(plan.experts), len(plan.schedule)
    plan = dataclasses.replace(plan, densities=Densities.uniform(1.0, dit.num_layers, dit.num_heads, bands))
    attention = session.load().lossy
    assert isinstance(attention, SparseAttention) and plan.sparsity is not None
    has_fp8 = all(ranks.gather(attention_probe.runs_fp8(ranks.device, precision, head_dim)))
    grid, has_last = plan.geometry.token_grid, plan.config.video.last_image is not None
    attention.measure([list_length(density, grid, has_last=has_last) for density in LADDER], fp8=has_fp8)

    session.latent(plan, images, by_step(partial(progress, index), steps), plan.residuals())
    of_band: dict[int, dict[int, list[Any]]] = {}
    for (step, _, layer), errors in attention.errors().items():
        of_band.setdefault(plan.sparsity.band(step), {}).setdefault(layer, []).append(errors)
    means = [[np.mean(calls, axis=0) for _, calls in sorted(layers.items())] for _, layers in sorted(of_band.items())]
    return {"errors": np.array(means).round(6).tolist(), "seconds": round(session.watch.seconds["denoise"], 3)}


run = measuring(measure)
