"""The four products of a block by each way that multiplies 8 bits, and what quantizing its tokens takes. One GPU.

    python benchmarks/products.py

Ways are taken in turn, five rounds, medians. Random values. The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wanfast.runtime import hardware
from wanfast.runtime.metadata import versions
from wanfast.runtime.model_spec import A14B
from wanfast.runtime.models.fused import quantize_tokens
from wanfast.runtime.models.quantized import fp8_product, int8_product

TOKENS, ROUNDS = 75_600, 5
SHAPES = {
    "qkv": (A14B.dit.dim, 3 * A14B.dit.dim),
    "o": (A14B.dit.dim, A14B.dit.dim),
    "ffn.0": (A14B.dit.dim, A14B.dit.ffn_dim),
    "ffn.2": (A14B.dit.ffn_dim, A14B.dit.dim),
}


@torch.inference_mode()
def main() -> None:
    found = {}
    for name, (k, n) in SHAPES.items():
        x = torch.randn(1, TOKENS, k, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        ways: dict[str, Callable[[], object]] = {"bf16": lambda x=x, w=weight, b=bias: F.linear(x, w, b)}
        for dtype, multiply in ((torch.int8, int8_product), (torch.float8_e4m3fn, fp8_product)):
            tokens, rows = quantize_tokens(x, dtype), quantize_tokens(weight.unsqueeze(0), dtype)
            values, scale = rows.values[0], rows.scale[0]
            ways[str(dtype)] = lambda t=tokens, w=values, s=scale, b=bias, f=multiply: f(t, w, s, b)
            ways[f"quantize to {dtype}"] = lambda x=x, d=dtype, gelu=name == "ffn.2": quantize_tokens(x, d, gelu=gelu)
            if dtype == torch.int8:
                ways["_int_mm alone"] = lambda t=tokens, w=values: torch._int_mm(t.values[0], w.t())
        exact = F.linear(x, weight, bias).float()
        for way, ms in times(ways).items():
            out = ways[way]()
            row = {"ms": round(ms, 3)}
            if not way.startswith("quantize"):
                row["tops"] = round(2 * TOKENS * k * n / ms / 1e9, 1)
                if isinstance(out, Tensor) and out.dtype == torch.bfloat16:
                    row["difference_from_bf16"] = round(float((out.float() - exact).norm() / exact.norm()), 5)
            found[f"{name} {way}"] = row
            print(f"{name:6} {way:32} {row}", flush=True)
    print(json.dumps({"tokens": TOKENS, "ways": found, "hardware": hardware.describe("cuda"), "versions": versions()}))


def times(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            way()
            ended.record()
            torch.cuda.synchronize()
            if turn:  # the first one compiles
                seen[name].append(begun.elapsed_time(ended))
    return {name: statistics.median(values) for name, values in seen.items()}


if __name__ == "__main__":
    main()
