"""Times the four products of a block in bf16 and 8 bits, and the quantization of the block's tokens.

    python benchmarks/products.py                 # A14B's products at 75,600 tokens, one GPU
    python benchmarks/products.py --torchao       # also torchao's own dynamic linears, compiled
    python benchmarks/products.py --tiny          # a quick check, also on a CPU

The ways run in turn, and the median is reported. Values are random. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from in_turn import medians
from random_expert import TINY
from torch import Tensor
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    quantize_,
)

from wanfast.runtime.device import hardware
from wanfast.runtime.facts.model_spec import A14B, DiTSpec
from wanfast.runtime.machine.packages import commit, versions
from wanfast.runtime.models.fused import quantize_tokens
from wanfast.runtime.models.quantized import fp8_product, int8_product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torchao", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    measure(TINY if options.tiny else A14B.dit, 45 if options.tiny else 75_600, options.rounds, options.torchao)


@torch.inference_mode()
def measure(spec: DiTSpec, num_tokens: int, rounds: int, with_torchao: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dim, ffn_dim = spec.dim, spec.ffn_dim
    found = {}
    for name, (k, n) in {
        "qkv": (dim, 3 * dim), "o": (dim, dim), "ffn.0": (dim, ffn_dim), "ffn.2": (ffn_dim, dim)
    }.items():  # fmt: skip
        x = torch.randn(1, num_tokens, k, device=device, dtype=torch.bfloat16)
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) * k**-0.5
        bias = torch.randn(n, device=device, dtype=torch.bfloat16)
        ways: dict[str, Callable[[], object]] = {"bf16": lambda x=x, w=weight, b=bias: F.linear(x, w, b)}
        for dtype, multiply in ((torch.int8, int8_product), (torch.float8_e4m3fn, fp8_product)):
            tokens, rows = quantize_tokens(x, dtype), quantize_tokens(weight.unsqueeze(0), dtype)
            values, scale = rows.values[0], rows.scale[0]
            ways[str(dtype)] = lambda t=tokens, w=values, s=scale, b=bias, f=multiply: f(t, w, s, b)
            ways[f"quantize to {dtype}"] = lambda x=x, d=dtype, gelu=name == "ffn.2": quantize_tokens(x, d, gelu=gelu)
            if dtype == torch.int8:
                ways["_int_mm alone"] = lambda t=tokens, w=values: torch._int_mm(t.values[0], w.t())
        if with_torchao:
            ways |= {name: lambda x=x, f=f: f(x) for name, f in torchao_linears(weight, bias).items()}
        exact = F.linear(x, weight, bias).float()
        for way, seconds in medians(ways, rounds, device).items():
            out = ways[way]()
            row = {"ms": round(seconds * 1e3, 3)}
            if not way.startswith("quantize"):
                row["tops"] = round(2 * num_tokens * k * n / seconds / 1e12, 1)
                if isinstance(out, Tensor) and out.dtype == torch.bfloat16:
                    row["difference_from_bf16"] = round(float((out.float() - exact).norm() / exact.norm()), 5)
            found[f"{name} {way}"] = row
            print(f"{name:6} {way:32} {row}", flush=True)
    machine = {"commit": commit(), "hardware": hardware.describe(device), "versions": versions()}
    print(json.dumps({"tokens": num_tokens, "ways": found, **machine}))


def torchao_linears(weight: Tensor, bias: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns torchao's compiled dynamic linears, which quantize the tokens and multiply."""
    schemes = {"torchao int8": Int8DynamicActivationInt8WeightConfig()}
    if weight.is_cuda:  # torchao's float8 needs a GPU
        schemes["torchao float8"] = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    found = {}
    for name, scheme in schemes.items():
        linear = torch.nn.Linear(*reversed(weight.shape), device=weight.device, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight, bias
        quantize_(linear, scheme)
        found[name] = torch.compile(linear, fullgraph=True, dynamic=False)
    return found


if __name__ == "__main__":
    main()
