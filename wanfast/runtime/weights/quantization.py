"""Quantizes the weights of linear layers, and replaces the linear layers of a model by quantized ones.

torchao computes 8-bit values and one scale for each row. The values and the scales are stored as plain tensors. Rows
are independent of each other, so a weight can be quantized a few rows at a time. The quantized layers are those of
`models.quantized`. torchao's own layers are not used, because they cannot be sharded, and some compile slowly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from wanfast.runtime.facts.choices import Scheme
from wanfast.runtime.models.dit import Block, Linear, LinearGELU, WanDiT
from wanfast.runtime.models.quantized import PRODUCTS, QuantizedLinear
from wanfast.runtime.store.quantized import QUANTIZED, require_torchao


def is_quantized(name: str) -> bool:
    """Returns whether the 8-bit schemes quantize the tensor `name` of an expert.

    They quantize only the weights of the linear layers in the expert's blocks.
    """
    block, _, rest = name.removeprefix("blocks.").partition(".")
    return name.startswith("blocks.") and block.isdigit() and rest.removesuffix(".weight") in QUANTIZED


def quantize_linears(model: WanDiT, scheme: Scheme, dtype: torch.dtype) -> None:
    """Replaces the linear layers in the blocks of `model` by layers that are quantized with the 8-bit `scheme`.

    `model` is on the meta device. The biases of the new layers have the dtype `dtype`.
    """
    for name, linear in list(_linears(model)):
        owner, _, last = name.rpartition(".")
        n, k = linear.weight.shape
        quantized = QuantizedLinear(scheme, k, n, dtype, gelu=isinstance(linear, LinearGELU))
        model.get_submodule(owner).add_module(last, quantized)
    weight_dtype, reads_8_bits = PRODUCTS[scheme]
    if reads_8_bits:
        for block in model.blocks:
            cast("Block", block).dtype = weight_dtype  # its norms quantize for the products that follow


def _linears(model: WanDiT) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_quantized(f"{name}.weight"):
            yield name, module


def quantize(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Quantizes `rows` [n, K] of a weight and returns (8-bit values [n, K], float32 scales [n]).

    The results are on the device of `rows`. Raises ConfigError if torchao is not installed.
    """
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows.float(), requires_grad=False)
    _torchao().quantize_(linear, _config(scheme))
    weight = cast("Any", linear.weight)
    assert weight.qdata.dtype == PRODUCTS[scheme][0]
    return weight.qdata, weight.scale.float().flatten()


def scale_of(weight: str) -> str:
    """Returns the name of a quantized weight's scales: "x.scale" for "x.weight"."""
    return f"{weight.removesuffix('weight')}scale"


def _torchao() -> Any:
    require_torchao("quantizing")
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # torchao's own kernels, which nothing here calls
    logging.disable(logging.WARNING)  # torchao warns about that, and about its own registrations
    try:
        import torchao.quantization
    finally:
        logging.disable(logging.NOTSET)
    return torchao.quantization


def _config(scheme: Scheme) -> Any:
    """Returns torchao's configuration of the scheme, for weights only: `models.quantized` quantizes the tokens."""
    if scheme == "fp8-rowwise":
        return _torchao().Float8WeightOnlyConfig(set_inductor_config=False)
    return _torchao().Int8WeightOnlyConfig(set_inductor_config=False)
