"""Runs a block eagerly in the style of the original program, with which the published times were measured.

This is not the original code, but it makes the same choices. The time embedding is expanded to one row per token, and
each token is modulated by its row in float32. The rotary embedding is a product of complex128 numbers. Every projection
runs under autocast. The text's keys and values are computed in every layer of every forward. The kernel of attention is
FlashAttention-2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanfast.runtime.models.dit import Block
from wanfast.runtime.models.rope import RotaryTables

State = dict[str, Tensor]


class ReferenceStyleBlock:
    """Runs the reference style with the weights of one of our blocks; `state` is that block's state dict."""

    def __init__(self, block: Block, rope: RotaryTables) -> None:
        self.state: State = block.state_dict()
        self.dim, self.eps, self.num_heads = block.norm3.normalized_shape[0], block.eps, block.self_attn.num_heads
        self.rotation = torch.complex(rope.cos.double(), rope.sin.double())  # [L, 1, D/2]

    def __call__(self, x_BLd: Tensor, time_BL6d: Tensor, text_BSd: Tensor) -> Tensor:
        """Returns the stream [B, L, d] after the block.

        x [B, L, d] float32, the time embedding of every token [B, L, 6, d] float32, text [B, S, d] bf16.
        """
        device = x_BLd.device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            rows = [row.squeeze(2) for row in (self.state["modulation"].unsqueeze(0) + time_BL6d).chunk(6, dim=2)]
            normed = self._layer_norm(x_BLd) * (1 + rows[1]) + rows[0]
            x = x_BLd + self._attention("self_attn", normed, normed, rotate=True) * rows[2]
            normed = self._layer_norm(x, self.state["norm3.weight"], self.state["norm3.bias"])
            x = x + self._attention("cross_attn", normed, text_BSd, rotate=False)
            hidden = self._linear("ffn.0", self._layer_norm(x) * (1 + rows[4]) + rows[3])
            return x + self._linear("ffn.2", F.gelu(hidden, approximate="tanh")) * rows[5]

    def _attention(self, name: str, x_BLd: Tensor, context_BSd: Tensor, rotate: bool) -> Tensor:
        q = self._rms_norm(self._linear(f"{name}.q", x_BLd), f"{name}.norm_q")
        k = self._rms_norm(self._linear(f"{name}.k", context_BSd), f"{name}.norm_k")
        q, k, v = (
            x.unflatten(2, (self.num_heads, -1)) for x in (q, k, self._linear(f"{name}.v", context_BSd).bfloat16())
        )
        if rotate:
            q, k = self._rotated(q), self._rotated(k)
        q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v)
        return self._linear(f"{name}.o", out.transpose(1, 2).flatten(2))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _layer_norm(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(x.float(), (self.dim,), weight, bias, self.eps)

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.state[f"{name}.weight"]

    def _rotated(self, x_BLHD: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_BLHD.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotation).flatten(-2).float()
