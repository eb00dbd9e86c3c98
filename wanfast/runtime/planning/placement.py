"""Decides the mesh of ranks, and whether the weights are sharded or offloaded, before any rank starts.

An option with the value `auto` is decided from the memory that is free now, and the plan states the reason. There are
four modes, and the first one that fits is taken:
* resident: every rank holds both experts. This mode is preferred, because sharded weights must be gathered for each
  layer of each step.
* evicting: every rank holds both experts, and moves some of their weights to host memory while the VAE works.
* sharded: several ranks share the weights of both experts. Quantized experts are never sharded.
* offloaded: the idle expert is in host memory.
All videos of a list share one placement; the largest video decides the placement.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from wanfast.runtime.config import ModelsConfig, RanksConfig
from wanfast.runtime.errors import ConfigError, JoiningMemoryError
from wanfast.runtime.facts import memory
from wanfast.runtime.facts.choices import Switch, in_8_bits
from wanfast.runtime.facts.memory import gb
from wanfast.runtime.facts.mesh import Mesh, choose_mesh
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.facts.shapes import Geometry
from wanfast.runtime.machine import gpus, host
from wanfast.runtime.planning.devices import why_cpu
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.planning.plan_json import magcache_json
from wanfast.runtime.store.model_files import or_tiny

_GRAPHS, _NO_GRAPHS = "--compile-mode max-autotune", "use --compile-mode max-autotune-no-cudagraphs"
_UNMEASURED_BYTES = memory.CARDS["80 GB"]  # an H100, as in `doctor`, if no GPU is visible


@dataclass(frozen=True)
class Need:
    """This class holds the bytes that a video needs on one rank.

    For a list of videos, each number is the largest over the videos.
    """

    expert: int
    block: int
    umt5: int
    offloaded: int  # in host memory, if the idle expert is offloaded
    loop: int
    residuals: int  # that MagCache holds from step to step
    vae: int
    margin: int = memory.MARGIN_BYTES
    graphs: int = 0  # that the captured CUDA graphs of the loop hold after it
    lists: int = 0  # of blocks, which sparse attention holds from step to step


@dataclass(frozen=True)
class FreeMemory:
    """This class says how much free memory a run may use, measured before the run starts."""

    rank_bytes: int
    what: str  # the description of rank_bytes
    host_bytes: int


def place(
    plans: Sequence[Plan],
    free_memory: FreeMemory | None = None,
    mesh: Mesh | None = None,  # of ranks that run already
    *,
    must_fit: bool = True,
) -> list[Plan]:
    """Decides the mesh of ranks and where the weights lie, and returns the plans with this mesh and this placement.

    All plans get the same mesh and the same placement.
    `free_memory`: the memory that the ranks may use. If it is None, it is measured now. If ranks hold models already,
    give the memory that was free before the models were loaded.
    `mesh`: the mesh, if the ranks run already. If it is None, this function chooses the mesh.
    `must_fit`: if false, plans for the CPU that do not fit get a note instead of an error. Plans for GPUs must always
    fit.
    Raises ConfigError if the plans do not fit, or if an option such as --dit-fsdp asks for what cannot run.
    Raises JoiningMemoryError if the host has too little memory to join the clips of a video.
    """
    asked = plans[0].config.ranks
    mesh = mesh or choose_mesh(
        asked.num_gpus,
        math.gcd(*(plan.spec.dit.num_heads for plan in plans)),  # every line's model must fit the mesh
        nnodes=asked.nnodes,
        guided=any(any(plan.guided) for plan in plans),
        cfg_parallel=asked.cfg_parallel,
        ulysses=asked.ulysses,
    )
    measured = free_memory or measure(asked)
    free, what = measured.rank_bytes, measured.what
    need = _need(plans, mesh)
    here = min(asked.num_gpus, mesh.group_size * len(plans))  # ranks that this machine starts
    host_bytes = on_host(need, mesh.group_size, here, free)
    barred = _barred(plans, need, mesh.group_size, host_bytes, measured.host_bytes)
    mode, why, notes = _place_experts(plans[0], need, mesh.group_size, free, barred, must_fit)
    dit_fsdp, expert_offload = _SWITCHES[mode]
    ranks = dataclasses.replace(
        asked,
        cfg_parallel=mesh.cfg,
        ulysses=mesh.ulysses,
        dit_fsdp=dit_fsdp,
        t5_fsdp=_shard_umt5(asked, need, mesh.group_size, free),
        expert_offload=expert_offload,
    )
    placement = f"{why}, {gb(free)} {what}"
    placed = [
        dataclasses.replace(plan, config=dataclasses.replace(plan.config, ranks=ranks), placement=placement)
        for plan in plans
    ]
    for plan in placed:
        _check_joining(plan, measured.host_bytes)
    return [dataclasses.replace(plan, notes=(*plan.notes, *notes, *_repeated_work(plan))) for plan in placed]


def _check_joining(plan: Plan, host_free: int) -> None:
    """Raises JoiningMemoryError if the host has too little memory for the joined frames that the caller gets."""
    if plan.joining_bytes <= host_free:
        return
    option, fix = "--prompt", "give fewer prompts, or use a smaller --size"
    if plan.config.video.continue_from:
        option, fix = "--continue-from", "give a file with only the last part of this video"
    need = (
        f"joining {plan.config.video.total_frames} frames needs {gb(plan.joining_bytes)} of host memory, but only "
        f"{gb(host_free)} are free"
    )
    error = JoiningMemoryError(f"{option}: {need}: {fix}")
    error.need = need
    raise error


def _repeated_work(plan: Plan) -> list[str]:
    """Returns a note if two ranks would do the same work, because a step without guidance cannot use all ranks."""
    steps, size, heads = plan.guided.count(False), plan.mesh.group_size, plan.spec.dit.num_heads
    if not steps or plan.mesh.cfg == 1 or heads % size == 0:
        return []
    return [
        f"in {steps} steps without guidance, both halves of the {size} ranks do the same work, because {size} ranks "
        f"cannot share {heads} attention heads"
    ]


def check_skips(plan: Plan) -> None:
    """Raises ConfigError if MagCache cannot skip as the user asked; `plan` must come from `place`.

    There are two cases: --magcache-joint off together with sharded experts and --cfg-parallel 2; and a
    --magcache-budget or --magcache-skip that cannot be met.
    """
    ranks, skipping = plan.config.ranks, plan.config.skipping
    apart = skipping is not None and skipping.magcache_joint == "off"
    if apart and ranks.dit_fsdp == "on" and ranks.cfg_parallel == 2:
        raise ConfigError(
            "--magcache-joint off with sharded experts and --cfg-parallel 2 cannot run, because ranks that gather "
            "weights together must skip the same forwards: drop --magcache-joint off, or use --dit-fsdp off or "
            "--cfg-parallel 1"
        )
    magcache_json(plan)  # raises if a budget cannot be met


def needed(
    spec: ModelSpec, models: ModelsConfig, geometry: Geometry, mesh: Mesh, num_residuals: int = 0, lists: int = 0
) -> Need:
    """Returns the bytes of memory that one video needs on one rank of `mesh`.

    `num_residuals`: the number of MagCache residuals that the rank holds from step to step. `lists`: the bytes of the
    rank's block lists for sparse attention.
    """
    own_tokens, precision, scheme = -(-geometry.tokens // mesh.ulysses), models.precision, models.quantize
    return Need(
        expert=memory.expert_bytes(spec.dit, precision, scheme),
        block=memory.block_bytes(spec.dit, precision),
        umt5=memory.umt5_bytes(spec.umt5, precision),
        offloaded=memory.offloaded_bytes(spec.dit, precision, scheme),
        loop=memory.loop_bytes(spec, precision, own_tokens, scheme),
        residuals=num_residuals * memory.residual_bytes(spec.dit, own_tokens),
        vae=memory.vae_bytes(spec, geometry, models.vae_precision or precision) // mesh.group_size,
        lists=lists,
    )


def _need(plans: Sequence[Plan], mesh: Mesh) -> Need:
    needs = []
    for plan in plans:
        config = plan.config
        need = needed(plan.spec, config.models, plan.geometry, mesh, plan.num_residuals(mesh), plan.list_bytes(mesh))
        if config.ranks.device == "cpu":
            need = dataclasses.replace(need, margin=memory.CPU_MARGIN_BYTES)
        elif config.models.compile_mode == "max-autotune":
            need = dataclasses.replace(need, graphs=need.loop)
        needs.append(need)
    names = [field.name for field in dataclasses.fields(Need)]
    return Need(**{name: max(getattr(need, name) for need in needs) for name in names})


def modes(need: Need, ranks: int) -> dict[str, int]:
    """Returns {mode: peak bytes of a GPU} in the order of preference: resident, evicting, sharded, offloaded.

    `ranks`: the number of ranks that make one video. The result has no "evicting" if evicting would save no memory, and
    no "sharded" for one rank.
    """
    return {mode: sum(parts.values()) for mode, parts in terms(need, ranks).items()}


def terms(need: Need, ranks: int) -> dict[str, dict[str, int]]:
    """Returns {mode: {what takes memory: bytes}} for a GPU at its peak.

    A mode is a way to hold the experts, such as "offloaded". The sum of a mode's bytes is the peak that `modes` returns
    for this mode.
    """
    in_loop, in_vae = _in_loop(need), {"VAE": need.vae} | ({"graphs": need.graphs} if need.graphs else {})
    both, margin = {"both experts": 2 * need.expert}, {"margin": need.margin}
    held = {"resident": {**both, **_larger(in_loop, in_vae), **margin}}
    if _larger(in_loop, in_vae) is in_vae:
        held["evicting"] = {**_larger({**both, **in_loop}, {"one expert": need.expert, **in_vae}), **margin}
    if ranks > 1:
        shares = {"share of both": 2 * need.expert // ranks, "two blocks": 2 * need.block}
        held["sharded"] = {**shares, **_larger(in_loop, in_vae), **margin}
    return {**held, "offloaded": _offloaded(need)}


def _in_loop(need: Need) -> dict[str, int]:
    """Returns the bytes that a forward needs beside the weights."""
    held = {"residuals": need.residuals, "lists of blocks": need.lists}
    return {"loop": need.loop} | {name: size for name, size in held.items() if size}


def _offloaded(need: Need) -> dict[str, int]:
    """Returns the terms of the offloaded mode, in which no expert is on the GPU while the VAE works."""
    worst = _larger({"one expert": need.expert, **_in_loop(need)}, {"VAE": need.vae})
    return {**worst, "margin": need.margin}


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return max(one, other, key=lambda parts: sum(parts.values()))


def _place_experts(
    plan: Plan, need: Need, ranks: int, free: int, barred: dict[str, str], must_fit: bool
) -> tuple[str, str, tuple[str, ...]]:
    """Returns (mode, reason, notes), where `ranks` make one video. Raises ConfigError."""
    config, held = plan.config, modes(need, ranks)
    on_cpu, asked_cpu = config.ranks.device == "cpu", "device" in plan.requested
    for asked, option, mode in (
        (config.ranks.dit_fsdp, "--dit-fsdp", "sharded"),
        (config.ranks.expert_offload, "--expert-offload", "offloaded"),
    ):
        if asked == "on" and mode in barred:
            raise ConfigError(
                f"{option} on: {barred[mode]}{why_cpu(asked=asked_cpu) if on_cpu else ''}; drop {option}, so that "
                "wanfast chooses the placement"
            )
        if asked == "on" and (held[mode] <= free or not on_cpu):
            return mode, f"experts {mode} as asked: {gb(held[mode])}", ()
        if asked == "on":
            held = {mode: held[mode]}  # no other mode may be taken
    for mode, size in held.items():
        if mode not in barred and size <= free:
            rather = f" instead of {gb(held['resident'])}" if mode != "resident" else ""
            return mode, f"experts {mode}: {gb(size)} a rank{rather}", ()
    if on_cpu:
        refusal = _refusal_on_cpu(plan, {mode: size for mode, size in held.items() if mode not in barred}, free)
        if must_fit:
            raise ConfigError(refusal)
        mode, size = next(iter(held.items()))
        return mode, f"experts {mode}: {gb(size)} a rank", (f"a run would be refused: {refusal}",)
    if need.graphs:
        raise ConfigError(
            f"{_GRAPHS}: a rank would hold {gb(held['resident'])}, including {gb(need.graphs)} for CUDA graphs, "
            f"but only {gb(free)} are free: {_NO_GRAPHS}, or a smaller --size"
        )
    one_of = " or ".join(
        f"{gb(size)} ({mode}" + (f": {barred[mode]})" if mode in barred else ")") for mode, size in held.items()
    )
    raise ConfigError(
        f"--model {config.models.model} --precision {config.models.precision}: a rank would hold {one_of}, "
        f"but only {gb(free)} are free: use more or larger GPUs, or a smaller --size"
    )


def _refusal_on_cpu(plan: Plan, held: dict[str, int], free: int) -> str:
    """Returns the reason and the remedy if none of the modes in `held` fits into host memory."""
    one_of = " or ".join(gb(size) + (f" ({mode})" if len(held) > 1 else "") for mode, size in held.items())
    short = f"a process would hold {one_of}, but only {gb(free)} of host memory are free for each process"
    if is_cpu_for_want_of_a_gpu(plan):
        return f"no GPU was found, and on the CPU {short}: use a machine with a GPU{or_tiny(plan.spec)}"
    return f"--device cpu: {short}: use a smaller --size"


_SWITCHES: dict[str, tuple[Switch, Switch]] = {
    "resident": ("off", "off"),
    "evicting": ("off", "off"),  # both on the GPU; some weights are evicted while the VAE works
    "sharded": ("on", "off"),
    "offloaded": ("off", "on"),
}


def _barred(
    plans: Sequence[Plan], need: Need, ranks: int, host_bytes: dict[str, int], host_free: int
) -> dict[str, str]:
    """Returns the modes that are impossible, whatever the GPUs' memory, and why."""
    asked, barred = plans[0].config.ranks, {}
    if need.graphs:  # graphs are captured again after weights have moved
        barred = dict.fromkeys(
            ("evicting", "sharded", "offloaded"), f"{_GRAPHS} needs weights that do not move: {_NO_GRAPHS}"
        )
    if ranks == 1:
        barred["sharded"] = "a video has one rank: add --num-gpus, or use --expert-offload on"
    elif asked.dit_fsdp == "off":
        barred["sharded"] = "switched off"
    elif any(in_8_bits(plan.config.models.quantize) for plan in plans):
        barred["sharded"] = "quantized experts are not sharded"
    for mode, size in host_bytes.items():
        if asked.device == "cpu":
            barred[mode] = "with --device cpu there is no GPU memory to free"
        elif mode == "offloaded" and asked.expert_offload == "off":
            barred[mode] = "switched off"
        elif mode not in barred and size > host_free:
            barred[mode] = f"needs {gb(size)} of host memory, but only {gb(host_free)} are free"
    return barred


def on_host(need: Need, ranks: int, ranks_here: int, free: int | None = None) -> dict[str, int]:
    """Returns {mode: needed bytes of host memory on this machine} for the modes "evicting" and "offloaded".

    `ranks`: the number of ranks that make one video. `ranks_here`: the number of ranks on this machine. `free`: the
    free bytes of each GPU, or None if they are unknown.
    In the offloaded mode, each rank needs host memory for both experts. In the evicting mode, each rank needs host
    memory for what does not fit on its GPU. If `free` is None, the evicting mode counts the bytes of one expert.
    """
    missing = need.expert if free is None else max(0, modes(need, ranks)["resident"] - free)
    return {"evicting": missing * ranks_here, "offloaded": need.offloaded * ranks_here}


def _shard_umt5(asked: RanksConfig, need: Need, ranks: int, free: int) -> Switch:
    if asked.t5_fsdp == "on" and ranks == 1:
        raise ConfigError("--t5-fsdp on needs several ranks for a video: use a larger --num-gpus, or drop --t5-fsdp")
    if asked.t5_fsdp == "auto":
        return "on" if ranks > 1 and need.umt5 + need.margin > free else "off"
    return asked.t5_fsdp


def measure(asked: RanksConfig) -> FreeMemory:
    """Measures how much memory is free now for the ranks that `asked` describes."""
    return FreeMemory(*_free_bytes(asked), host.available_host_bytes())


def _free_bytes(asked: RanksConfig) -> tuple[int, str]:
    """Returns the bytes that one rank may use, and their description."""
    if asked.device == "cpu":
        return host.available_host_bytes() // asked.num_gpus, "of host memory free for each process"
    found = gpus.visible_gpus()[: asked.num_gpus]
    if not found:
        return _UNMEASURED_BYTES, "assumed for each GPU, because none is visible"
    return min(gpu.free_bytes for gpu in found), "free on each GPU"


def is_cpu_for_want_of_a_gpu(plan: Plan) -> bool:
    """Returns True if the plan's model needs a GPU and the plan uses the CPU because no GPU was found."""
    return "device" not in plan.requested and plan.config.ranks.device == "cpu" and plan.spec.needs_gpu


def placement_notes(plans: Sequence[Plan]) -> list[str]:
    """Returns notes on ranks that stay idle, and on a CPU that is used because no GPU was found."""
    plan, notes = plans[0], []
    mesh, num_videos = plan.mesh, len(plans)
    if idle := max(0, mesh.replica - num_videos) * mesh.group_size:
        ranks = "1 rank" if mesh.group_size == 1 else f"{mesh.group_size} ranks"
        notes.append(
            f"{idle} of {mesh.size} ranks stay idle: each video uses {ranks}, and the number of videos is {num_videos}"
        )
    if is_cpu_for_want_of_a_gpu(plan):
        notes.append("no GPU was found, so the plan is for the CPU: add --device cuda to plan for GPUs")
    return notes
