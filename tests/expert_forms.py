"""Writes an expert in the forms of public tools, and computes in float64 what its tensors are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor

State = Mapping[str, Tensor]
Forms = Mapping[str, Callable[[Path, State], dict[str, Tensor]]]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYERS = ("self_attn.", "cross_attn.", "ffn.")


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and any(part in name for part in LAYERS)


def save(file: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata=metadata and dict(metadata))


def single(prefix: str, dtype: torch.dtype) -> Callable[[Path, State], dict[str, Tensor]]:
    """A single file of plain values."""

    def write(file: Path, state: State) -> dict[str, Tensor]:
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        save(file, {prefix + name: tensor for name, tensor in stored.items()})
        return {name: tensor.double() for name, tensor in stored.items()}

    return write


def numbers(weight: Tensor, dtype: torch.dtype, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """Returns (numbers of 8 bits, float32 scales) of a weight, as public tools compute them."""
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()) / most
    scaled = (weight / scale).clamp(-most, most)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale.float()


def scaled(
    file: Path, state: State, dtype: torch.dtype, name_of_scale: str, *, by_row: bool, prefix: str = "", **more: str
) -> dict[str, Tensor]:
    """Writes 8-bit linears; `more` names what else the tool writes."""
    tensors, values = {}, {}
    layers = {}
    for name, tensor in state.items():
        if not is_linear(name, tensor):
            tensors[prefix + name] = tensor.bfloat16()
            values[name] = tensor.bfloat16().double()
            continue
        layer = prefix + name.removesuffix(".weight")
        tensors[f"{layer}.weight"], scale = numbers(tensor, dtype, by_row=by_row)
        tensors[f"{layer}.{name_of_scale}"] = scale
        values[name] = tensors[f"{layer}.weight"].double() * scale.double()
        if "input" in more:
            tensors[f"{layer}.{more['input']}"] = torch.tensor(0.5)
        layers[layer] = {"format": more.get("mark", ""), "full_precision_matrix_mult": True}
        if more.get("where") == "tensors":
            text = json.dumps(layers[layer]).encode()
            tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if "sign" in more:
        tensors[more["sign"]] = torch.empty(0, dtype=dtype)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save(file, tensors, metadata if more.get("where") == "header" else None)
    return values


def of_2025(file: Path, state: State) -> dict[str, Tensor]:
    return scaled(file, state, E4M3, "scale_weight", by_row=False, input="scale_input", sign="scaled_fp8")


def of_2026(dtype: torch.dtype, mark: str, *, by_row: bool, where: str) -> Callable[[Path, State], dict[str, Tensor]]:
    def write(file: Path, state: State) -> dict[str, Tensor]:
        more = {"input": "input_scale", "mark": mark, "where": where}
        prefix = "model.diffusion_model." if where == "header" else ""
        return scaled(file, state, dtype, "weight_scale", by_row=by_row, prefix=prefix, **more)

    return write


def distilled(dtype: torch.dtype) -> Callable[[Path, State], dict[str, Tensor]]:
    return lambda file, state: scaled(file, state, dtype, "weight_scale", by_row=True)


def by_package(kind: gguf.GGMLQuantizationType) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Blocks that the package gguf quantizes; Q8_0 is a float16 scale and 32 numbers."""

    def blocks_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = quantize(weight, kind)
        parts = blocks.reshape(*weight.shape[:-1], -1, 34)
        scale = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float64)
        return blocks, (scale * parts[..., 2:].view(np.int8)).reshape(weight.shape)

    return blocks_of


def _halves(shape: tuple[int, ...], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns random float16 values as (their bytes, float64)."""
    values = random.uniform(0.001, 0.02, (*shape, 1)).astype(np.float16)
    return values.view(np.uint8), values.astype(np.float64)


def _sixes(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the eight 6-bit scales and the eight 6-bit minima of 12 bytes."""
    low, middle, high = (packed[..., each : each + 4] for each in (0, 4, 8))
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], -1)
    return scales.astype(np.float64), minima.astype(np.float64)


def q4_or_q5_k(weight: np.ndarray, *, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random blocks (d, dmin, 12 bytes of scales, the fifth bits, the low four bits) and their values."""
    random = np.random.default_rng(4)
    shape = (*weight.shape[:-1], weight.shape[-1] // 256)
    (d, d64), (least, least64) = _halves(shape, random), _halves(shape, random)
    packed, fifth, low = (random.integers(0, 256, (*shape, n), np.uint8) for n in (12, 32, 128))
    scales, minima = _sixes(packed)
    fours = low.reshape(*shape, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(2, 1) & 15
    numbers = fours.reshape(*shape, 8, 32).astype(np.float64)
    if bits == 5:
        numbers += 16 * (fifth[..., None, :] >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1)
    values = (d64 * scales)[..., None] * numbers - (least64 * minima)[..., None]
    blocks = np.concatenate([d, least, packed, *([fifth] if bits == 5 else []), low], -1)
    return blocks.reshape(*weight.shape[:-1], -1), values.reshape(weight.shape)


def q6_k(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns random blocks (low four bits, high two bits, 16 scales, d) and their values."""
    random = np.random.default_rng(6)
    shape = (*weight.shape[:-1], weight.shape[-1] // 256)
    low, high, scales = (random.integers(0, 256, (*shape, n), np.uint8) for n in (128, 64, 16))
    d, d64 = _halves(shape, random)
    fours = low.reshape(*shape, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(2, 1) & 15
    twos = high.reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    numbers = fours.reshape(*shape, 16, 16) + 16.0 * twos.reshape(*shape, 16, 16) - 32
    values = (d64 * scales.view(np.int8))[..., None] * numbers
    return np.concatenate([low, high, scales, d], -1).reshape(*weight.shape[:-1], -1), values.reshape(weight.shape)


K = gguf.GGMLQuantizationType
BLOCKS: Mapping[K, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    K.Q8_0: by_package(K.Q8_0),
    K.Q6_K: q6_k,
    K.Q5_K: lambda weight: q4_or_q5_k(weight, bits=5),
    K.Q4_K: lambda weight: q4_or_q5_k(weight, bits=4),
}


def in_gguf(kind: K, prefix: str = "") -> Callable[[Path, State], dict[str, Tensor]]:
    """Linears in blocks, other matrices in F16 or BF16, and the rest in F32."""

    def write(file: Path, state: State) -> dict[str, Tensor]:
        writer = gguf.GGUFWriter(file, "wan")
        values = {}
        for name, tensor in state.items():
            exact = tensor.float().numpy()
            if is_linear(name, tensor):
                blocks, found = BLOCKS[kind](exact)
                writer.add_tensor(prefix + name, blocks, raw_dtype=kind)
                values[name] = torch.from_numpy(found)
                continue
            plain = {2: K.F16, 3: K.BF16}.get(tensor.dim(), K.BF16 if name.endswith("norm_q.weight") else K.F32)
            stored = quantize(exact, plain)
            writer.add_tensor(prefix + name, stored, raw_dtype=plain)
            dtype = {K.F16: torch.float16, K.BF16: torch.bfloat16, K.F32: torch.float32}[plain]
            values[name] = tensor.to(dtype).double()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return values

    return write


SINGLE: Forms = {
    "fp16": single("", torch.float16),
    "fp16 with model.diffusion_model.": single("model.diffusion_model.", torch.float16),
    "bf16 with diffusion_model.": single("diffusion_model.", torch.bfloat16),
}
SCALED: Forms = {
    "fp8 of 2025": of_2025,
    "fp8 of 2026": of_2026(E4M3, "float8_e4m3fn", by_row=False, where="tensors"),
    "fp8 of 2026 by row": of_2026(E4M3, "float8_e4m3fn", by_row=True, where="tensors"),
    "fp8 of 2026, metadata": of_2026(E4M3, "float8_e4m3fn", by_row=False, where="header"),
    "int8 of 2026": of_2026(torch.int8, "int8_tensorwise", by_row=False, where="tensors"),
    "int8 of 2026 by row, metadata": of_2026(torch.int8, "int8_tensorwise", by_row=True, where="header"),
    "fp8 of the distilled repository": distilled(E4M3),
    "int8 of the distilled repository": distilled(torch.int8),
}
E5M2_FORM: Forms = {"e5m2 of 2026": of_2026(E5M2, "float8_e5m2", by_row=False, where="tensors")}
GGUF: Forms = {
    **{f"GGUF {kind.name}": in_gguf(kind) for kind in BLOCKS},
    "GGUF with a prefix": in_gguf(K.Q8_0, "model.diffusion_model."),
}
FORMS: Forms = {**SINGLE, **SCALED, **E5M2_FORM, **GGUF}


def file_of(folder: Path, form: str) -> Path:
    return folder / f"{form.replace(' ', '-')}.{'gguf' if form.startswith('GGUF') else 'safetensors'}"
