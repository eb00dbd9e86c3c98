"""How linears are quantized, and a model given quantized ones; `quantized_artifacts` says which they are.

torchao works out the values; what it leaves, 8-bit values and a scale a row, is kept as
plain tensors and run by `models.quantized`, whose products compile in seconds and shard into one graph (LOG.md holds
torchao's own against it). Rows are independent of each other, so that a weight can be quantized a few rows at a time.
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
    """Whether a parameter of an expert is the weight of a linear that schemes quantize."""
    block, _, rest = name.removeprefix("blocks.").partition(".")
    return name.startswith("blocks.") and block.isdigit() and rest.removesuffix(".weight") in QUANTIZED


def quantize_linears(model: WanDiT, scheme: Scheme, dtype: torch.dtype) -> None:
    """Give a model on the meta device the quantized linears of a scheme of 8 bits."""
    for name, linear in list(_linears(model)):
        owner, _, last = name.rpartition(".")
        n, k = linear.weight.shape
        quantized = QuantizedLinear(scheme, k, n, dtype, gelu=isinstance(linear, LinearGELU))
        model.get_submodule(owner).add_module(last, quantized)
    weight_dtype, reads_8_bits = PRODUCTS[scheme]
    if reads_8_bits:
        for block in model.blocks:
            cast("Block", block).dtype = weight_dtype  # its norms quantize for the products after them


def _linears(model: WanDiT) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_quantized(f"{name}.weight"):
            yield name, module


def quantize(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(8-bit values [n, K], scale [n] float32) of some rows of a weight, on their device. Raises ConfigError."""
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows.float(), requires_grad=False)
    _torchao().quantize_(linear, _config(scheme))
    weight = cast("Any", linear.weight)
    assert weight.qdata.dtype == PRODUCTS[scheme][0]
    return weight.qdata, weight.scale.float().flatten()


def scale_of(weight: str) -> str:
    """The name of a quantized weight's scales."""
    return f"{weight.removesuffix('weight')}scale"


def _torchao() -> Any:
    require_torchao("quantizing")
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # its own kernels, which nothing here calls
    logging.disable(logging.WARNING)  # it warns of that, and of its own registrations
    try:
        import torchao.quantization
    finally:
        logging.disable(logging.NOTSET)
    return torchao.quantization


def _config(scheme: Scheme) -> Any:
    """torchao's own of the scheme. Of the weights alone: how tokens are quantized is `models.quantized`'s to know."""
    if scheme == "fp8-rowwise":
        return _torchao().Float8WeightOnlyConfig(set_inductor_config=False)
    return _torchao().Int8WeightOnlyConfig(set_inductor_config=False)
