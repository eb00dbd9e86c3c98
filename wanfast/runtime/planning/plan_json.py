"""Writes a plan as JSON, for the file beside a video, for `--json` and for the printed table.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from wanfast.runtime.config.recipes import overridden
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import EXPERTS
from wanfast.runtime.facts.sparsity import Sparsity
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.guidance import guided_steps
from wanfast.runtime.sampling.magcache import accumulated_error
from wanfast.runtime.store.expert_files import named_experts
from wanfast.runtime.store.loras import loras_of


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON; the .json file beside a video contains this JSON."""
    g, config = plan.geometry, plan.config
    return {
        "recipe": config.models.recipe,
        "overridden": overridden(config.options(), plan.spec.magcache_rule),
        "model": plan.spec.name,
        "images": config.video.images,
        "written_prompts": list(config.video.written_prompts),
        "experts": [
            {"option": named.flag, "path": str(named.path), "form": named.header().form, "sha256": sha256}
            for named, sha256 in zip(named_experts(config.models), config.models.expert_sha256, strict=True)
        ],
        "loras": [
            {"option": lora.flag, "file": str(lora.file), "strength": lora.strength, "sha256": lora.sha256}
            for lora in loras_of(config.models)
        ],
        "width": g.width,
        "height": g.height,
        "frames": g.frames,
        "clips": len(config.video.prompts),
        "continued_frames": config.video.continue_from_frames,
        "total_frames": config.video.total_frames,
        "joining_bytes": plan.joining_bytes,
        "fps": config.video.fps,
        "duration_s": round(config.video.total_frames / config.video.fps, 3),
        "latent": [g.latent_frames, g.latent_height, g.latent_width],
        "tokens": g.tokens,
        "solver": config.video.solver,
        "shift": config.video.shift,
        "sigmas": config.video.levels,
        "steps": {expert: len(steps) for expert, steps in plan.timesteps.items()},
        "timesteps": plan.timesteps,
        "guidance": plan.guidance,
        "guidance_gate": config.video.guidance_gate,
        "guided_steps": {
            expert: sum(both for of, both in zip(plan.experts, plan.guided, strict=True) if of == expert)
            for expert in EXPERTS
        },
        "forwards": plan.num_forwards,
        "magcache": magcache_json(plan),
        "precision": config.models.precision,
        "attention": config.models.attention,
        "sparsity": sparsity_json(plan),
        "fp8_attention": plan.fp8.to_json() if plan.fp8 else None,
        "quantize": config.models.quantize,
        "compile": config.models.compile_mode if config.models.compile else None,
        "device": config.ranks.device,
        "mesh": dataclasses.asdict(plan.mesh),
        "unguided_mesh": dataclasses.asdict(plan.unguided_mesh) if plan.regroups else None,
        "dit_fsdp": config.ranks.dit_fsdp,
        "t5_fsdp": config.ranks.t5_fsdp,
        "expert_offload": config.ranks.expert_offload,
        "placement": plan.placement,
        "seed": config.video.seed,
        "outputs": [str(path) for path in plan.outputs],
        "notes": list(plan.notes),
    }


def magcache_json(plan: Plan) -> dict[str, Any] | None:
    """Returns the skips, their settings and their curve as JSON; None if MagCache is off."""
    if plan.curve is None:
        return None
    settings, skipped = plan.config.skipping, sum(map(sum, plan.skips))
    assert settings is not None
    apart = sum(map(sum, plan.skips_if(joint=False))) if plan.is_joint and settings.magcache_skip is None else None
    return {
        "curve": plan.curve.name,
        "interpolated_from": plan.curve.interpolated_from,
        "plan": "greedy" if settings.magcache_thresh is not None else "least error",
        "threshold": settings.magcache_thresh,
        "max_skips": settings.magcache_k,
        "retention": settings.retention_ratio,
        "rule": settings.magcache_rule,
        "joint": plan.is_joint,
        "extrapolates": settings.magcache_extrapolate,
        "total_forwards": plan.num_forwards,
        "skipped_forwards": skipped,
        "skipped_forwards_apart": apart,
        "residual_bytes": plan.num_residuals(plan.mesh)
        * memory.residual_bytes(plan.spec.dit, -(-plan.geometry.tokens // plan.mesh.ulysses)),
        "skipped_share": round(skipped / plan.num_forwards, 4),
        "distilled_steps": len(plan.schedule) - plan.curve.num_steps,
        "always_computed": plan.always_computed,
        "accumulated_error": round(accumulated_error(plan.ratios, plan.skips), 5),
        "skips_prompt": [prompt for prompt, _ in plan.skips],
        "skips_negative_prompt": [negative_prompt for _, negative_prompt in plan.skips],
    }


def sparsity_json(plan: Plan) -> dict[str, Any] | None:
    """Returns the density and the settings of sparse attention as JSON; None without --attention sparse."""
    if plan.sparsity is None:
        return None
    computed = [1 + both - sum(skips) for both, skips in zip(plan.guided, plan.skips, strict=True)]
    ulysses = [(plan.mesh if both else plan.unguided_mesh).ulysses for both in plan.guided]
    return plan.sparsity.to_json() | {
        "mean_density": round(plan.sparsity.mean_density(computed, [1] * len(computed)), 4),
        "slowest_rank_density": round(plan.sparsity.mean_density(computed, ulysses), 4),
        "list_bytes": plan.list_bytes(plan.mesh),
        **_attention_plan_json(plan, plan.sparsity),
    }


def _attention_plan_json(plan: Plan, sparsity: Sparsity) -> dict[str, Any]:
    """Returns the plan of attention as JSON: its measured errors, and the mean densities by band and layer."""
    if plan.densities is None or plan.densities.calibrated is None:
        return {}
    return {"plan": dataclasses.asdict(plan.densities.calibrated) | {"bands": sparsity.bands_json()}}


def read_guided(document: dict[str, Any]) -> list[bool]:
    """Reads a plan's JSON and returns for each step whether the negative prompt's branch runs."""
    experts = [expert for expert in EXPERTS for _ in range(document["steps"][expert])]
    return guided_steps(experts, document["guidance"], document.get("guidance_gate", 1.0))
