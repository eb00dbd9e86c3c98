"""Tests that Triton's kernels compile for Hopper as in Inductor; any machine can, because Triton has an assembler."""

from __future__ import annotations

import os
import subprocess
import sys

# This runs in its own process, because the test process may have imported Triton in interpreter mode.
PROGRAM = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wanfast.runtime.models import fused_kernels, router_kernel, vae_kernels

FACTS = {"eps": 1e-6, "d": 5120, "BLOCK": 8192, "GATED": True, "GELU": True}
FACTS |= {"ROTATED": True, "PAIRS_A_HEAD": 64, "PARTS": 4}
FACTS |= {"NORMED": True, "CENTRED": True, "HADAMARD": True, "HEADS": 40, "D": 128, "HEAD_DIM": 128}
OF_HEADS = {"BLOCK": 128} | {name: getattr(fused_kernels, f"_{name}") for name in ("ROWS", "TILE", "GROUP")}
FACTS |= {"SCALE": 128**-0.5, "LANES": 128, "TILE": router_kernel._TILE}
COUNTS = dict.fromkeys(("stride", "rows", "quarters", "blocks", "first", "last"), "i32")
OF_VAE = {"channels": 384, "SILU": True, "rate": 2, "ROWS": 8, "LANES": 512}
COUNTS |= dict.fromkeys(("positions", "x_frame", "x_stride", "out_frame", "out_stride"), "i32")
COUNTS |= dict.fromkeys(("height", "width", "out_frame_stride"), "i32")
OUTPUTS = ("*bf16", 0.0), ("*i8", 127.0), ("*fp8e4nv", 448.0)
KERNELS = {"_add_layer_norm": OUTPUTS, "_quantize_tokens": OUTPUTS[1:], "_rms_norm_rotate": OUTPUTS[:1]}
KERNELS |= {"_heads_to_fp8": OUTPUTS[2:], "_choice_scores": (("*fp32", 0.0),)}
KERNELS |= dict.fromkeys(("_rms_norm", "_upsample"), (("*fp32", 0.0), ("*bf16", 0.0)))
MODULES = {"_choice_scores": router_kernel, "_rms_norm": vae_kernels, "_upsample": vae_kernels}
for name, outputs in KERNELS.items():
    module = MODULES.get(name, fused_kernels)
    kernel = getattr(module, name)
    for out, largest in outputs:
        facts = FACTS | {"LARGEST": largest} | (OF_HEADS if name == "_heads_to_fp8" else {})
        facts |= OF_VAE if module is vae_kernels else {}
        signature, constants = {}, {}
        for parameter in kernel.params:
            pointer = parameter.name.endswith("_ptr")
            kinds = {"out_ptr": out, "y_ptr": "*bf16"} | COUNTS
            # what is no constant Inductor passes as int or, if it is a float, as float64
            signature[parameter.name] = kinds.get(parameter.name, "*fp32" if pointer else "fp64")
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", facts[parameter.name]
        source = ASTSource(kernel, signature, constants)
        warps = {"num_warps": fused_kernels._WARPS if name == "_heads_to_fp8" else 4}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=warps).asm["ptx"]
        assert ".f64" not in ptx, (name, out)
        if largest:  # a kernel that quantizes: such a maximum would hide NaN
            assert not re.search(r"\\b(max|min)\\.(?!NaN)\\S*f32", ptx), (name, out)
        if out == "*fp8e4nv":  # values that are too large become the largest number: v's scale follows from a sample
            conversions = re.findall(r"\\bcvt\\.\\S*e4m3x2\\.f32\\b", ptx)
            assert conversions and all(".satfinite" in conversion for conversion in conversions), (name, conversions)
        print(name, out)
"""


def test_kernels_compile_for_hopper_and_stay_in_float32() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 12
