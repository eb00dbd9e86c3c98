"""Compares one forward pass of one expert with that of diffusers, on the same weights in the same run.

    python benchmarks/forward.py                                  # A14B's 40 layers at 1280x720x81, one GPU
    python benchmarks/forward.py --grid 21 60 104                 # 832x480
    python benchmarks/forward.py --ranks 4                        # Ulysses on one, two and four GPUs, beside diffusers
    python benchmarks/forward.py --tiny --layers 2                # a quick check, also on a CPU, also with --ranks 2

A way is one implementation of the forward. The ways run in turn, because the GPU's clock drops under load and must
affect all ways equally. The median of a way's rounds is reported. Each row has ms, TFLOP/s, the share of the bf16 peak,
peak memory beyond the weights, and a relative error. The error compares the way's first layers with the same layers in
float32. By design, diffusers computes the text's keys and values in every block of every forward; wanfast computes them
once per prompt.
--profile adds a table of the time of each kernel. --reference times one of our blocks beside a block in the original
program's style. --by-depth times eager blocks at several depths, each on the activations that reach this depth. --tiny
sets --grid and --kernels, and takes small layers.

--ranks times compiled ways only. They are the first kernel on each GPU by itself, the first kernel with Ulysses over
groups of 2, 4, ... and all GPUs, and diffusers with its own Ulysses. All groups of a way work at once, and the slowest
group counts. So "ulysses 2" on four GPUs takes as long as a step whose two branches run at once, each on two GPUs.
`comparison` holds each way's efficiency: the seconds of one GPU / (the number of GPUs * their seconds). It also
compares our time and our velocity on all ranks with those of diffusers (`ratio_to_diffusers`, `relative_difference`).
If diffusers is not installed or fails, its rows are missing and `diffusers` says why. The Ulysses of diffusers needs
numbers of tokens and of heads that are multiples of the number of ranks. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from in_turn import medians
from profile_table import profile_table
from random_expert import TINY, Inputs, random_expert, random_inputs
from reference_style import ReferenceStyleBlock
from spawned import on_ranks
from torch import Tensor, nn

from wanfast.runtime.device import hardware
from wanfast.runtime.device.timing import synchronize
from wanfast.runtime.distributed.ranks import Ranks, rank_group
from wanfast.runtime.distributed.ulysses import Ulysses
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.facts.flop import bf16_peak, forward_flop
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.attention import Sequence, WholeSequence, attention_by
from wanfast.runtime.models.dit import Stream, TextKV, WanDiT
from wanfast.runtime.weights.key_maps import rename_back

if TYPE_CHECKING:  # --diffusers none runs without diffusers
    from diffusers import WanTransformer3DModel

DIFFUSERS_BACKENDS = {
    "cudnn": "_native_cudnn", "flash": "_native_flash", "math": "_native_math", "sdpa": "native", "fa3": "_flash_3_hub",
}  # fmt: skip
VelocityFn = Callable[[], Tensor]


@dataclass
class Way:
    """Holds one way to compute a forward, and its measurements."""

    name: str
    velocity: VelocityFn
    blocks: nn.ModuleList  # the model's blocks
    rounds: int
    ranks: int = 1  # that share the forward; otherwise each rank computes all of it
    seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    peak_bytes: int = 0
    relative_error: float | None = None
    output: Tensor | None = None  # of the last round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=A14B.dit.num_layers)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 90, 160), help="latent frames, height, width")
    parser.add_argument("--kernels", default="fa3,cudnn", help="our attention kernels; --rounds is for the first one")
    parser.add_argument(
        "--diffusers",
        choices=(*DIFFUSERS_BACKENDS, "none"),
        help="attention backend of diffusers; none leaves out diffusers  [default: cudnn; with --tiny, sdpa]",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of our compiled first kernel, and of compiled diffusers"
    )
    parser.add_argument("--other-rounds", type=int, default=1, help="rounds of all other ways")
    parser.add_argument(
        "--eager", action=argparse.BooleanOptionalAction, default=True, help="also run without compiling"
    )
    parser.add_argument("--compile-mode", default="default")
    parser.add_argument("--error-layers", type=int, default=2, help="layers that are compared with float32; 0 for none")
    parser.add_argument(
        "--reference", type=int, default=0, metavar="ROUNDS", help="also time a block in the original program's style"
    )
    parser.add_argument(
        "--by-depth", type=int, default=0, metavar="ROUNDS", help="also time eager blocks at several depths"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.grid, options.kernels = (4, 6, 10), "flash,math"
    options.diffusers = options.diffusers or ("sdpa" if options.tiny else "cudnn")
    if min(options.ranks, options.rounds, options.other_rounds, options.layers) < 1:
        parser.error("--ranks, --rounds, --other-rounds and --layers must be 1 or more")
    if options.ranks > 1 and (options.reference or options.by_depth):
        parser.error("--reference and --by-depth run on one GPU only: drop these options, or drop --ranks")
    if options.ranks == 1:
        measure(options, Ranks("cuda" if torch.cuda.is_available() else "cpu"))
        return
    on_ranks(_shared, options)


def _shared(options: argparse.Namespace) -> None:
    with rank_group(
        "cuda" if torch.cuda.is_available() else "cpu", Mesh(ulysses=options.ranks), timeout_s=300
    ) as ranks:
        measure(options, ranks)


@torch.inference_mode()
def measure(options: argparse.Namespace, ranks: Ranks) -> None:
    device = ranks.device
    hardware.prepare(device, "bf16", None)
    spec = replace(TINY if options.tiny else A14B.dit, num_layers=options.layers)
    inputs = random_inputs(spec, tuple(options.grid), device)
    model = random_expert(spec, torch.bfloat16, device)
    model.fuse_projections()
    ways = list(_own_ways(options, model, inputs) if ranks.size == 1 else _ways_of_ranks(options, model, inputs, ranks))
    for way in ways:
        warm(way, device, ranks)
    theirs, missing = _diffusers_that_run(options, model, inputs, ranks)
    ways += theirs
    if options.error_layers:
        _find_errors(ways, model, min(options.error_layers, spec.num_layers), inputs, ranks)
    for turn in range(max(way.rounds for way in ways)):
        for way in ways:
            if turn < way.rounds:
                timed(way, device, ranks)
    tables = {}
    if options.profile:
        profiled = [way for way in ways if way.rounds == options.rounds]
        tables = {way.name: profile_table(way.velocity, device, quiet=not ranks.is_leader) for way in profiled}
    if not ranks.is_leader:
        return
    report = {way.name: report_of(way, spec, inputs) for way in ways}
    if options.reference:
        report["block"] = _block_against_reference(options.reference, model, inputs)
    if options.by_depth:
        report["by depth"] = _by_depth(options.by_depth, _twin(model, options.kernels.split(",")[0]), inputs)
    tokens = inputs.rope.cos.shape[0]
    facts = {"layers": spec.num_layers, "tokens": tokens, "ranks": ranks.size, "mode": options.compile_mode}
    facts |= {"diffusers": f"none: {missing}" if missing else options.diffusers}
    facts |= {"comparison": comparison(ways)} if ranks.size > 1 else {}
    found = {"commit": commit(), "hardware": hardware.describe(device), "versions": versions()}
    print(json.dumps({**facts, "ways": report, "profiles": tables, **found}), flush=True)


def _own_ways(options: argparse.Namespace, model: WanDiT, inputs: Inputs) -> Iterator[Way]:
    """Yields our model compiled and eager with each kernel: separate modules with shared parameters."""
    text = model.encode_text(inputs.texts[0])
    for index, kernel in enumerate(options.kernels.split(",")):
        for compiled in (True, False) if options.eager else (True,):
            twin = _twin(model, kernel)
            if compiled:
                compile_blocks(twin, options.compile_mode)
            rounds = options.rounds if compiled and index == 0 else options.other_rounds
            name = f"wanfast {'compiled' if compiled else 'eager'} {kernel}"
            yield Way(name, velocity_of(twin, inputs, text), twin.blocks, rounds)


def _ways_of_ranks(options: argparse.Namespace, model: WanDiT, inputs: Inputs, ranks: Ranks) -> Iterator[Way]:
    """Yields the first kernel, compiled: on each rank alone, and with the tokens shared by 2, 4, ... and all ranks."""
    text = model.encode_text(inputs.texts[0])
    sizes = sorted({size for size in (1, 2, 4, 8, ranks.size) if ranks.size % size == 0})
    for size in sizes:
        sequence, name = (_sequence(ranks, size), f"ulysses {size}") if size > 1 else (WholeSequence(), "one")
        twin = _twin(model, options.kernels.split(",")[0], sequence)
        compile_blocks(twin, options.compile_mode)
        yield Way(name, velocity_of(twin, inputs, text), twin.blocks, options.rounds, size)


def _sequence(ranks: Ranks, size: int) -> Sequence:
    """Returns Ulysses over this rank's group of `size` ranks, which are neighbours."""
    if size == ranks.size:
        return ranks.sequence
    neighbours = Mesh(cfg=ranks.size // size, ulysses=size).neighbours("ulysses")
    return Ulysses(dist.new_subgroups_by_enumeration(neighbours)[0])  # type: ignore[no-untyped-call]


def _twin(model: WanDiT, kernel: str, sequence: Sequence = WholeSequence()) -> WanDiT:  # noqa: B008
    """Returns a model with the same memory as parameters, whether or not its `sequence` needs q, k and v one by one."""
    with torch.device("meta"):
        twin = WanDiT(model.spec, torch.bfloat16, sequence, attention_by(kernel))
        twin.fuse_projections()
    known = {**model.state_dict(), **dict(model.named_parameters())}
    for name, _ in list(twin.named_parameters()):
        module, _, last = name.rpartition(".")
        setattr(twin.get_submodule(module), last, nn.Parameter(known[name], requires_grad=False))
    return twin.eval()


def velocity_of(model: WanDiT, inputs: Inputs, text: list[TextKV]) -> VelocityFn:
    return lambda: model(*inputs.arguments(text[: len(model.blocks)]))[0]


def _diffusers_that_run(
    options: argparse.Namespace, model: WanDiT, inputs: Inputs, ranks: Ranks
) -> tuple[list[Way], str | None]:
    """Returns diffusers' ways, which ran once; or no way and the reason, if it is missing or fails on any rank."""
    if options.diffusers == "none":
        return [], "as asked"
    ways, reason = [], None
    try:
        for way in _diffusers_ways(options, model, inputs, ranks):
            warm(way, ranks.device, ranks)
            ways.append(way)
    except Exception as error:  # noqa: BLE001 - of any kind: our own ways are measured without it
        reason = f"{type(error).__name__}: {error}"
    failed = [found for found in ranks.gather(reason) if found]
    return ([], failed[0]) if failed else (ways, None)


def _diffusers_ways(options: argparse.Namespace, model: WanDiT, inputs: Inputs, ranks: Ranks) -> Iterator[Way]:
    """Yields diffusers' model compiled and eager; for several ranks compiled, with its own Ulysses."""
    video = torch.cat((inputs.latent, inputs.condition), 1).bfloat16()
    padding = model.spec.text_len - inputs.texts[0].shape[1]
    text = nn.functional.pad(inputs.texts[0], (0, 0, 0, padding)).bfloat16()
    for compiled in (True, False) if options.eager and ranks.size == 1 else (True,):
        theirs = _diffusers(model)
        theirs.set_attention_backend(DIFFUSERS_BACKENDS[options.diffusers])

        def velocity(theirs: WanTransformer3DModel = theirs) -> Tensor:
            out: Tensor = theirs(video, inputs.timestep, text, return_dict=False)[0]
            return out

        if ranks.size > 1:
            _share_tokens(theirs, ranks)
            with first_layers(theirs.blocks, 1):
                velocity()  # keeps what the first call finds in signatures, which the compiler cannot trace
        if compiled:
            mode = None if options.compile_mode == "default" else options.compile_mode
            theirs.compile_repeated_blocks(fullgraph=True, dynamic=False, mode=mode)
        shared = f" ulysses {ranks.size}" if ranks.size > 1 else ""
        name = f"diffusers {'compiled' if compiled else 'eager'} {options.diffusers}{shared}"
        yield Way(name, velocity, theirs.blocks, options.rounds if compiled else options.other_rounds, ranks.size)


def _share_tokens(theirs: WanTransformer3DModel, ranks: Ranks) -> None:
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(ranks.device, (1, ranks.size), mesh_dim_names=("ring", "ulysses"))
    with patch("torch.accelerator.device_count", lambda: ranks.size):  # a CPU has 0 of them, by which diffusers divides
        theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks.size, mesh=mesh))


def _diffusers(model: WanDiT) -> WanTransformer3DModel:
    """Returns diffusers' model with our parameters, in the dtypes of its own loading in bf16."""
    from diffusers import WanTransformer3DModel

    spec = model.spec
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=spec.num_heads, attention_head_dim=spec.head_dim, in_channels=spec.in_channels,
            out_channels=spec.out_channels, text_dim=spec.text_dim, freq_dim=spec.freq_dim, ffn_dim=spec.ffn_dim,
            num_layers=spec.num_layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=spec.eps,
            patch_size=spec.patch_size,
        )  # fmt: skip
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    parameters = {}
    for name, tensor in model.state_dict().items():
        key = rename_back("dit", "diffusers", name)
        parameters[key] = tensor.float() if kept & set(key.split(".")) else tensor.bfloat16()
    theirs.load_state_dict(parameters, strict=True, assign=True)
    fresh = type(theirs.rope)(spec.head_dim, spec.patch_size, theirs.config.rope_max_seq_len)
    theirs.rope = fresh.to(model.patch_embedding.weight.device)  # the rotary tables were also made on meta
    return theirs.requires_grad_(False).eval()


@contextmanager
def first_layers(blocks: nn.ModuleList, layers: int) -> Iterator[None]:
    """Removes all blocks after the first `layers` while the context is open."""
    every = list(blocks)
    del blocks[layers:]
    yield
    blocks.extend(every[layers:])


def warm(way: Way, device: str, ranks: Ranks) -> None:
    """Runs the first two layers, so that all graphs are compiled, and stores the seconds in `way.first_s`.

    Two layers are needed, because the first layer in diffusers' Ulysses has another graph than all others.
    """
    started = time.perf_counter()
    with first_layers(way.blocks, 2):
        way.velocity()
        synchronize(device)
    way.first_s = time.perf_counter() - started


def timed(way: Way, device: str, ranks: Ranks) -> None:
    synchronize(device)
    ranks.gather(None)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    hardware.reset_peak_memory(device)
    started = time.perf_counter()
    way.output = way.velocity()
    synchronize(device)
    ranks.gather(None)
    way.seconds.append(time.perf_counter() - started)
    way.peak_bytes = hardware.peak_memory_bytes(device) - held


def _find_errors(ways: list[Way], model: WanDiT, layers: int, inputs: Inputs, ranks: Ranks) -> None:
    """Sets each way's relative error: its first layers against the same weights and inputs in float32."""
    expected = _exact_velocity(model, layers, inputs) if ranks.is_leader else None
    for way in ways:
        with first_layers(way.blocks, layers):
            velocity = way.velocity()
        if expected is not None:
            way.relative_error = _relative_error(velocity, expected)


def _exact_velocity(model: WanDiT, layers: int, inputs: Inputs) -> Tensor:
    with torch.device("meta"):
        exact = WanDiT(replace(model.spec, num_layers=layers), torch.float32, attend=exact_attention)
    known = model.state_dict()
    exact.load_state_dict({name: known[name].float() for name in exact.state_dict()}, assign=True)
    exact.requires_grad_(False)
    exact_convolution = torch.backends.cudnn.flags(allow_tf32=False)
    with torch.inference_mode(False), torch.enable_grad(), exact_convolution:  # gradients disable our kernels
        return velocity_of(exact, inputs, exact.encode_text(inputs.texts[0]))()


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention by its formula in the inputs' dtype, one head and 4096 queries at a time."""
    out = torch.empty_like(q)
    for head in range(q.shape[2]):
        for queries in range(0, q.shape[1], 4096):
            rows = slice(queries, queries + 4096)
            scores = q[:, rows, head] @ k[:, :, head].transpose(1, 2) * q.shape[-1] ** -0.5
            out[:, rows, head] = scores.softmax(-1) @ v[:, :, head]
    return out


def comparison(ways: list[Way]) -> dict[str, Any]:
    """Returns the efficiency of each way on several ranks, and compares the last of these ways with diffusers.

    `ways` begins with the forward on one rank. "efficiency" is {way: seconds on one rank / (ranks * seconds)}.
    "ratio_to_diffusers" is our median time divided by that of diffusers. "relative_difference" is the relative distance
    of our velocity from that of diffusers. Both are missing if diffusers did not run.
    """
    seconds = {way.name: statistics.median(way.seconds) for way in ways}
    shared = [way for way in ways if way.name.startswith("ulysses")]
    one_s = seconds[ways[0].name]
    found: dict[str, Any] = {
        "efficiency": {way.name: round(one_s / (way.ranks * seconds[way.name]), 4) for way in shared}
    }
    theirs = next((way for way in ways if way.name.startswith("diffusers")), None)
    if theirs is None or theirs.output is None or shared[-1].output is None:
        return found
    found["ratio_to_diffusers"] = round(seconds[shared[-1].name] / seconds[theirs.name], 4)
    return found | {"relative_difference": _relative_error(shared[-1].output, theirs.output)}


def report_of(way: Way, spec: DiTSpec, inputs: Inputs) -> dict[str, Any]:
    median = statistics.median(way.seconds)
    tflops = forward_flop(spec, inputs.rope.cos.shape[0]) / median / 1e12 / way.ranks
    peak = bf16_peak(hardware.describe(inputs.latent.device.type)["device"])
    row = {
        "ms": round(median * 1e3, 1),
        "spread_ms": round((max(way.seconds) - min(way.seconds)) * 1e3, 1),
        "rounds": len(way.seconds),
        "tflops": round(tflops, 1),
        "mfu": peak and round(tflops * 1e12 / peak, 4),
        "peak_gb_beyond_weights": round(way.peak_bytes / 1e9, 2),
        "relative_error": way.relative_error,
        "first_s": round(way.first_s, 1),
    }
    print(f"{way.name:32}", row, file=sys.stderr, flush=True)
    return row


def _block_against_reference(rounds: int, model: WanDiT, inputs: Inputs) -> dict[str, float]:
    """Returns milliseconds of one block in the reference style with FlashAttention-2, and of our compiled block."""
    device = inputs.latent.device.type
    tokens, dim = inputs.rope.cos.shape[0], model.spec.dim
    ours = _twin(model, "fa3" if device == "cuda" else "flash")
    compile_blocks(ours, "default")
    block, text_kv = ours.blocks[0], model.encode_text(inputs.texts[0])[0]
    theirs = ReferenceStyleBlock(model.blocks[0], inputs.rope)  # type: ignore[arg-type]
    x = torch.randn(1, tokens, dim, device=device)
    stream = Stream(torch.zeros_like(x), x.bfloat16(), torch.ones(1, 1, dim, device=device))
    time_B6d = torch.randn(1, 6, dim, device=device)
    time_BL6d = time_B6d.unsqueeze(1).expand(1, tokens, 6, dim).contiguous()
    text = torch.randn(1, model.spec.text_len, dim, device=device, dtype=torch.bfloat16)
    ways = {
        "reference_style_fa2": lambda: theirs(x, time_BL6d, text),
        "wanfast": lambda: block(stream, time_B6d, text_kv, inputs.rope, tokens, WholeSequence()),
    }
    found = {f"{name}_ms": round(seconds * 1e3, 2) for name, seconds in medians(ways, rounds, device).items()}
    return found | {"ratio": round(found["wanfast_ms"] / found["reference_style_fa2_ms"], 4)}


def _by_depth(rounds: int, model: WanDiT, inputs: Inputs) -> dict[str, dict[str, float]]:
    """Returns milliseconds of eager blocks on the streams that reach them, and the mean cosine of two tokens there.

    At its power limit a GPU runs faster if fewer bits change, and random weights make the tokens similar.
    """
    last = len(model.blocks) - 1
    kept: dict[int, tuple[Any, ...]] = {}
    hooks = [
        model.blocks[depth].register_forward_pre_hook(lambda block, given, depth=depth: kept.update({depth: given}))
        for depth in sorted({0, min(1, last), last // 8, last // 2, last})
    ]
    velocity_of(model, inputs, model.encode_text(inputs.texts[0]))()
    for hook in hooks:
        hook.remove()
    ways = {str(depth): partial(model.blocks[depth], *given) for depth, given in kept.items()}
    seconds = medians(ways, rounds, inputs.latent.device.type)
    found = {}
    for depth, given in kept.items():
        some = (given[0].x + given[0].gate * given[0].added)[0]
        some = some[:: max(1, len(some) // 150)].double()
        directions = nn.functional.normalize(some - some.mean(-1, keepdim=True), dim=-1)
        cosine = float((directions @ directions.T).mean())
        found[str(depth)] = {"ms": round(seconds[str(depth)] * 1e3, 2), "cosine": round(cosine, 4)}
    return found


if __name__ == "__main__":
    main()
