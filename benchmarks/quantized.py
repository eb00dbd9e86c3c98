"""Compares one forward of one expert by each scheme of `wanfast quantize` with bf16, in the same run.

    python benchmarks/quantized.py                                  # A14B's 40 layers at 1280x720x81, one GPU
    python benchmarks/quantized.py --layers 3 --grid 2 32 32 --device cpu     # for the errors only, on any machine
    python benchmarks/quantized.py --tiny                           # a quick check

All schemes quantize the same random weights. The models run in turn, and the median of each is reported. A layer's
error is the relative error of the tensor that the layer adds to its input. The reference is the same layer in float32
with unquantized weights; both layers get the input that this layer has in the bf16 model. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import forward
import torch
from forward import Way
from random_expert import TINY, Inputs, random_expert, random_inputs
from torch import Tensor, nn

from wanfast.runtime.device import hardware
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.compilation import compile_blocks
from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.attention import attention_by
from wanfast.runtime.models.dit import Stream, WanDiT
from wanfast.runtime.models.quantized import QuantizedLinear
from wanfast.runtime.weights.quantization import quantize, quantize_linears, scale_of

SCHEMES = [scheme for scheme in get_args(Scheme) if scheme != "bf16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=A14B.dit.num_layers)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 90, 160), help="latent frames, height, width")
    parser.add_argument("--kernel", default=None, help="attention  [default: fa3 on a GPU, flash on a CPU]")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--error-layers",
        type=int,
        default=3,
        help="number of layers whose error is measured; each needs 1.5 GB of memory",
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.grid = 2, (3, 6, 10)
    options.kernel = options.kernel or ("fa3" if options.device == "cuda" else "flash")
    measure(options)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    ranks, spec = Ranks(options.device), replace(TINY if options.tiny else A14B.dit, num_layers=options.layers)
    hardware.prepare(options.device, "bf16", None)
    inputs = random_inputs(spec, tuple(options.grid), options.device)
    exact = random_expert(spec, torch.bfloat16, options.device, attend=attention_by(options.kernel))
    models = {"bf16": exact, **{scheme: quantized(exact, scheme, options.kernel) for scheme in options.schemes}}
    errors = dict(_errors(models, inputs, min(options.error_layers, spec.num_layers)))
    ways = []
    for name, model in models.items():
        model.fuse_projections()
        if options.device == "cuda":
            compile_blocks(model, "default")
        velocity = forward.velocity_of(model, inputs, model.encode_text(inputs.texts[0]))
        ways.append(Way(name, velocity, model.blocks, options.rounds))
    for way in ways:
        forward.warm(way, options.device, ranks)
    for _ in range(options.rounds):
        for way in ways:
            forward.timed(way, options.device, ranks)
    rows = {way.name: forward.report_of(way, spec, inputs) for way in ways}
    for name, row in rows.items():
        row["ratio"] = round(row["ms"] / rows["bf16"]["ms"], 4)
        row["weights_gb"] = round(sum(p.nbytes for p in models[name].parameters()) / 1e9, 3)
        row["error_by_layer"] = [round(error, 5) for error in errors[name]]
        lowest, highest = min(errors[name]), max(errors[name])
        time = f"{row['ms']:9.1f} ms, {row['ratio']:.3f} of bf16, {row['weights_gb']:.1f} GB"
        print(f"{name:18} {time}; error of a layer {lowest:.4f} to {highest:.4f}", flush=True)
    tables = {}
    if options.profile:
        tables = {way.name: forward.profile_table(way.velocity, options.device) for way in ways}
    facts = {"layers": spec.num_layers, "tokens": inputs.rope.cos.shape[0], "kernel": options.kernel}
    found = {"commit": commit(), "hardware": hardware.describe(options.device), "versions": versions()}
    print(json.dumps({**facts, "ways": rows, "profiles": tables, **found}), flush=True)


def quantized(exact: WanDiT, scheme: Scheme, kernel: str) -> WanDiT:
    """Returns a copy of the model with quantized linears; it shares all other parameters."""
    with torch.device("meta"):
        model = WanDiT(exact.spec, torch.bfloat16, attend=attention_by(kernel))
        quantize_linears(model, scheme, torch.bfloat16)
    held = exact.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = f"{name}.weight"
            held[weight], held[scale_of(weight)] = quantize(exact.state_dict()[weight], scheme)
    model.load_state_dict(held, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _errors(models: dict[str, WanDiT], inputs: Inputs, layers: int) -> Iterator[tuple[str, list[float]]]:
    """Yields (model name, relative errors of its first layers)."""
    streams: list[tuple[Any, ...]] = []  # each block's arguments
    exact = models["bf16"]
    text = exact.encode_text(inputs.texts[0])[:layers]
    with forward.first_layers(exact.blocks, layers):
        hooks = [block.register_forward_pre_hook(lambda _, given: streams.append(given)) for block in exact.blocks]
        exact(*inputs.arguments(text))
    for hook in hooks:
        hook.remove()
    added = []
    for block, given in zip(exact.blocks[:layers], streams, strict=True):
        wide = _in_float32(exact.spec, block)
        time, kv, *others = given[1:]
        kv = type(kv)(kv.k.float(), kv.v.float())
        added.append(_sum(wide(given[0], time, kv, *others)) - _sum(given[0]))
    for name, model in models.items():
        yield (
            name,
            [
                float((_sum(block(*given)) - _sum(given[0]) - want).norm() / want.norm())
                for block, given, want in zip(model.blocks[:layers], streams, added, strict=True)
            ],
        )


def _sum(stream: Stream) -> Tensor:
    return stream.x + stream.gate * stream.added


def _in_float32(spec: DiTSpec, block: nn.Module) -> nn.Module:
    with torch.device("meta"):
        (wide,) = WanDiT(replace(spec, num_layers=1), torch.float32, attend=forward.exact_attention).blocks
    wide.load_state_dict({name: tensor.float() for name, tensor in block.state_dict().items()}, assign=True)
    return wide


if __name__ == "__main__":
    main()
