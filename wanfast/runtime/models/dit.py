"""The diffusion transformer of one expert maps noisy latent, condition, timestep and text to the flow velocity.

A token is a 1x2x2 patch of the latent video. Each of the forty blocks has three sublayers: self-attention over all
tokens, cross-attention to the text, and a feed-forward network. Each sublayer reads a normalised copy of one residual
stream and adds its result to that stream. The timestep acts only through shifts, scales and gates (adaLN). All tokens
share one timestep, so the time MLP computes ONE row, which is broadcast. The text's keys and values do not depend on
the step, so `encode_text` computes them once for each prompt.

Precision: matrix products run in the dtype of the linear layers (bf16). The residual stream, norms, modulation, time
MLP and head stay in float32, because they are small or accumulate sums.
Cost at 1280x720, 81 frames (L = 75,600): 163 TFLOP a block, 72 % of it self-attention; 6.5 PFLOP a forward.

Shapes: B batch, L tokens, d model dim, H heads, D head dim, S text tokens, T/Y/X token grid, C latent channels.
Source: Wan (arXiv 2503.20314) section 4.2; DiT (arXiv 2212.09748) for adaLN. Parameter names are the original
checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanfast.runtime.facts.model_spec import DiTSpec
from wanfast.runtime.models.attention import HeadOrder, Sequence, WholeSequence, attention
from wanfast.runtime.models.attention_kernels import AttentionFn
from wanfast.runtime.models.bricks import RASTER, TokenOrder
from wanfast.runtime.models.fused import add_layer_norm, linear_gelu, rms_norm_heads
from wanfast.runtime.models.lossy import check_attention
from wanfast.runtime.models.projections import Fp8, Fp8Projections, Projections
from wanfast.runtime.models.rope import RotaryTables
from wanfast.runtime.models.tokens import Tokens, packed, rows_of


class TextKV(NamedTuple):
    """Holds one block's cross-attention keys and values of the text, each [B, S, H, D]."""

    k: Tensor
    v: Tensor


class Stream(NamedTuple):
    """Holds the three parts of this rank's residual stream, x + gate * added; the next norm computes the sum."""

    x: Tensor  # [B, L, d], float32
    added: Tensor  # [B, L, d]
    gate: Tensor  # [B, 1, d], float32


class Linear(nn.Linear):
    """This linear layer casts its input to the dtype of its weight, and multiplies in that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def of_shifted(self, x: Tensor, shift: Tensor) -> Tensor:
        """Returns the layer's output for x + `shift`, where `shift` [in] float32 is the same for all tokens.

        Only the bias changes, so this needs no pass over the tokens.
        """
        bias = self.bias + (self.weight.float() * shift).sum(-1)
        return F.linear(x.to(self.weight.dtype), self.weight, bias.to(self.bias.dtype))

    def part(self, x: Tensor, part: int, parts: int) -> Tensor:
        """Returns the output channels of one group, and leaves out all others: [..., out / parts].

        The output channels are divided into `parts` equal groups. `part` is the group's number, counted from 0.
        """
        return F.linear(x.to(self.weight.dtype), self.weight.chunk(parts)[part], self.bias.chunk(parts)[part])

    def chosen(self, x: Tensor, groups: Tensor, parts: int) -> Tensor:
        """Returns the output channels of n groups, and leaves out all others: [..., n * out / parts].

        The output channels are divided into `parts` equal groups, counted from 0. `groups` [n] holds the numbers of the
        groups to return; the result has the order of `groups`.
        """
        return F.linear(x.to(self.weight.dtype), *(rows_of(each, groups, parts) for each in (self.weight, self.bias)))


class LinearGELU(Linear):
    """Applies a linear layer and then GELU in its tanh approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(x.to(self.weight.dtype), self.weight, self.bias)


class RMSNorm(nn.Module):
    """Applies RMS norm to q or k over all heads together, then rotary embedding if `rope` is given.

    The heads of the result are divided into `parts` equal groups: [parts, B, L, H / parts, D].
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))

    def forward(
        self, x_BLd: Tensor, num_heads: int, rope: RotaryTables | None = None, *, parts: int = 1, by_kernel: bool = True
    ) -> Tensor:
        return rms_norm_heads(x_BLd, self.weight, self.eps, num_heads, rope, parts=parts, by_kernel=by_kernel)


class Attention(nn.Module):
    """This base class of self- and cross-attention holds the projections q, k, v, o and the norms of q and k."""

    def __init__(self, spec: DiTSpec, dtype: torch.dtype, attend: AttentionFn) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.attend = attend
        self.q, self.k, self.v, self.o = (Linear(spec.dim, spec.dim, dtype=dtype) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(spec.dim, spec.eps) for _ in range(2))

    @staticmethod
    def heads(x_BLd: Tensor, num_heads: int) -> Tensor:
        return rearrange(x_BLd, "B L (H D) -> B L H D", H=num_heads)


class SelfAttention(Attention):
    """In self-attention, each token attends to all tokens of the video.

    If several ranks share the tokens, the forward's `sequence` exchanges queries, keys and values between the ranks.
    """

    def __init__(self, spec: DiTSpec, dtype: torch.dtype, attend: AttentionFn) -> None:
        super().__init__(spec, dtype, attend)
        self.qkv: Linear | None = None
        self.fp8: Fp8 | None = None  # in the forwards that compute this attention in float8
        self.head_order: HeadOrder | None = None  # among the ranks of Ulysses

    def fuse_projections(self) -> None:
        """Fuses the projections q, k and v into one linear layer, which reads the tokens only once.

        The weights must be loaded before this call. The keys of the state dict do not change.
        """
        projections = (self.q, self.k, self.v)
        self.qkv = self.q  # of any class: each of its parameters has one row for each output
        for name in [name for name, _ in self.q.named_parameters()]:
            joined = torch.cat([getattr(linear, name).data for linear in projections])
            setattr(self.qkv, name, nn.Parameter(joined, requires_grad=False))
        del self.q, self.k, self.v
        self.register_state_dict_post_hook(_split_fused_keys)  # type: ignore[no-untyped-call]

    def forward(self, x_BLd: Tokens, rope: RotaryTables, num_tokens: int, sequence: Sequence) -> Tensor:
        if self.fp8 is None:
            order = self.head_order if sequence.is_shared else None  # one rank has all heads
            heads = sequence.attention(Projections(self, x_BLd, rope, order), num_tokens, self.attend)
            heads = heads if order is None else order.restored(heads)
            return self.o(heads.flatten(2))  # type: ignore[no-any-return]
        projections = Fp8Projections(self, x_BLd, rope, self.fp8, together=not sequence.is_shared)
        heads, constant = sequence.fp8_attention(projections, num_tokens)
        if self.fp8.errors is not None:
            check_attention(*projections.exact(), heads, constant, self.fp8.errors)
        return self.o.of_shifted(heads.flatten(2), constant.flatten())


def _split_fused_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}qkv.")]:
        kind, parts = key.rpartition(".")[2], state.pop(key).chunk(3)
        state.update({f"{prefix}{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)})


class CrossAttention(Attention):
    """In cross-attention, the video's tokens attend to all tokens of the text, including the padding.

    There is no rotary embedding and no mask.
    """

    def encode_text(self, text_BSd: Tensor) -> TextKV:
        """Computes the text's keys and values from the embedded text [B, S, d]; S is the number of text tokens."""
        (k,) = self.norm_k(self.k(text_BSd), self.num_heads, by_kernel=False)  # few rows are not worth a kernel
        return TextKV(k, self.heads(self.v(text_BSd), self.num_heads))

    def forward(self, x_BLd: Tokens, text: TextKV) -> Tensor:
        (q,) = self.norm_q(self.q(x_BLd), self.num_heads)
        out: Tensor = self.o(self.attend(q, *text).flatten(2))
        return out


class Block(nn.Module):
    """Applies self-attention, cross-attention to the text and a feed-forward network to the residual stream."""

    def __init__(self, spec: DiTSpec, dtype: torch.dtype, attend: AttentionFn) -> None:
        super().__init__()
        self.dtype = dtype  # of the norms' output, which products read; 8-bit if those products quantize
        self.eps = spec.eps
        self.self_attn = SelfAttention(spec, dtype, attend)
        self.norm3 = nn.LayerNorm(spec.dim, spec.eps, dtype=torch.float32)
        self.cross_attn = CrossAttention(spec, dtype, attend)
        self.ffn = nn.Sequential(
            LinearGELU(spec.dim, spec.ffn_dim, dtype=dtype),
            nn.Identity(),  # takes the index of the activation in the original
            Linear(spec.ffn_dim, spec.dim, dtype=dtype),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, spec.dim, dtype=torch.float32))

    def forward(
        self,
        stream: Stream,
        time_B6d: Tensor,
        text: TextKV,
        rope: RotaryTables,
        num_tokens: int,
        sequence: Sequence,
    ) -> Stream:
        """Returns this rank's residual stream after the block.

        `num_tokens` counts the tokens of all ranks together; `sequence` shares them among the ranks.
        """
        rows = (self.modulation + time_B6d).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = rows
        norm3, eps, dtype = self.norm3, self.eps, self.dtype
        x, normed = add_layer_norm(*stream, 1 + scale_attn, shift_attn, eps, dtype)
        out = self.self_attn(normed, rope, num_tokens, sequence)
        x, normed = add_layer_norm(x, out, gate_attn, norm3.weight, norm3.bias, eps, dtype)
        x, normed = add_layer_norm(x, self.cross_attn(normed, text), None, 1 + scale_ffn, shift_ffn, eps, dtype)
        return Stream(x, self.ffn(normed), packed(gate_ffn))

    def encode_text(self, text_BSd: Tensor) -> TextKV:
        """Computes the text's keys and values for this block's cross-attention, from the embedded text [B, S, d].

        S is the number of text tokens.
        """
        return self.cross_attn.encode_text(text_BSd)


class Head(nn.Module):
    """Normalises the tokens, modulates them by the time embedding, and projects them to patches, all in float32."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.head = Linear(spec.dim, math.prod(spec.patch_size) * spec.out_channels, dtype=torch.float32)
        self.modulation = nn.Parameter(torch.empty(1, 2, spec.dim, dtype=torch.float32))

    def forward(self, stream: Stream, time_Bd: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (the velocity as patches [B, L, p], the residual stream [B, L, d]).

        p is the number of values in one patch. The residual stream is the sum stream.x + stream.gate * stream.added.
        The head uses plain PyTorch, because the head runs only once in a forward: compiling a kernel would not pay off.
        """
        shift, scale = (self.modulation + time_Bd.unsqueeze(1)).chunk(2, dim=1)
        x = stream.x + stream.gate * stream.added
        return self.head(F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift), x


class WanDiT(nn.Module):
    """This class is one expert; its linear layers have `dtype`, but norms, modulation, time MLP and head are float32.

    `sequence` shares the tokens among ranks, unless a forward is called with another `sequence`. Every forward takes
    and returns whole latents on each rank, so that the next forward may share the tokens in another way.
    `attend` is the attention function of self- and cross-attention.
    """

    def __init__(
        self,
        spec: DiTSpec,
        dtype: torch.dtype = torch.bfloat16,
        sequence: Sequence = WholeSequence(),  # noqa: B008
        attend: AttentionFn = attention,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.sequence = sequence
        self.patch_embedding = nn.Conv3d(
            spec.in_channels, spec.dim, kernel_size=spec.patch_size, stride=spec.patch_size, dtype=dtype
        )
        self.text_embedding = nn.Sequential(
            LinearGELU(spec.text_dim, spec.dim, dtype=dtype), nn.Identity(), Linear(spec.dim, spec.dim, dtype=dtype)
        )
        self.time_embedding = nn.Sequential(
            Linear(spec.freq_dim, spec.dim, dtype=torch.float32),
            nn.SiLU(),
            Linear(spec.dim, spec.dim, dtype=torch.float32),
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(spec.dim, 6 * spec.dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(Block(spec, dtype, attend) for _ in range(spec.num_layers))
        self.head = Head(spec)

    def encode_text(self, text_BSc: Tensor) -> list[TextKV]:
        """Returns each block's keys and values for text embeddings [B, n, text_dim], n <= text_len.

        Zero rows pad the embeddings to `text_len`. Attention includes these rows, because the model was trained with
        such rows.
        """
        padding = self.spec.text_len - text_BSc.shape[1]
        text = self.text_embedding(F.pad(text_BSc, (0, 0, 0, padding)))
        return [block.encode_text(text) for block in self._blocks()]

    def forward(
        self,
        latent: Tensor,
        condition: Tensor,
        timestep: Tensor,
        text: list[TextKV],
        rope: RotaryTables,
        after_block: Callable[[int], None] = lambda index: None,
        cached_residual: Tensor | None = None,
        keep_residual: bool = False,
        sequence: Sequence | None = None,
        num_blocks: int | None = None,
        order: TokenOrder = RASTER,
        before_block: Callable[[int], None] = lambda index: None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (flow velocity [B, C, T, h, w], residual [B, L, d] or None), both in float32.

        The residual is the sum that the blocks add to this rank's tokens.
        latent: [B, C, T, h, w]; condition: [B, 20, T, h, w] (4 mask channels, then the encoded frames), or
        [B, 0, T, h, w] if the model takes no images;
        timestep: [B] in 0..1000; text: from `encode_text`; rope: the rotary tables of the whole token grid.
        after_block: a function that is called with a block's index, as soon as the kernels of this block are queued.
        The function may overwrite the weights of this block.
        cached_residual: the residual of an earlier call; if given, it is added to the tokens, and no block runs.
        keep_residual: whether to return the residual; if False, the second result is None.
        sequence: shares the tokens of this forward among ranks; None takes the model's `sequence`.
        num_blocks: how many blocks run; None runs all of them.
        order: the order in which the blocks hold the tokens; residuals are in this order too.
        before_block: a function that is called with a block's index before the block runs.
        """
        sequence = sequence or self.sequence
        video = torch.cat((latent, condition), dim=1).to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(video)
        token_grid = patches.shape[2:]
        num_tokens = math.prod(token_grid)
        tokens = packed(sequence.shard(order.permute(rearrange(patches, "B d T Y X -> B (T Y X) d"), 1), 1))
        time_Bd = self.time_embedding(sinusoid(timestep, self.spec.freq_dim))
        start = torch.zeros(tokens.shape, device=tokens.device) if cached_residual is None else cached_residual
        stream = Stream(start, tokens, torch.ones(tokens.shape[0], 1, self.spec.dim, device=tokens.device))
        first = tokens if keep_residual else None
        del start, tokens  # the blocks need the memory
        if cached_residual is None:
            own_rope = RotaryTables(*(sequence.shard(order.permute(table, 0), 0) for table in rope))
            time_B6d = self.time_projection(time_Bd).unflatten(1, (6, -1))
            blocks = list(zip(self._blocks(), text, strict=True))[:num_blocks]
            for index, (block, text_kv) in enumerate(blocks):
                before_block(index)
                stream = block(stream, time_B6d, text_kv, own_rope, num_tokens, sequence)
                after_block(index)
        out, x = self.head(stream, time_Bd)
        velocity = self._unpatchify(order.restore(sequence.gather(out, 1, num_tokens), 1), token_grid)
        return velocity, None if first is None else x.sub_(first)

    def fuse_projections(self) -> None:
        """Fuses the projections q, k and v of each block into one layer.

        Nothing is fused if ranks share the tokens in every forward, because then q, k and v are computed and sent one
        after the other.
        The weights must be loaded and must not be sharded.
        """
        if not self.sequence.is_shared:
            for block in self._blocks():
                block.self_attn.fuse_projections()

    def self_attentions(self) -> list[SelfAttention]:
        """Returns the self-attention of each block, the first block's first."""
        return [block.self_attn for block in self._blocks()]

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _unpatchify(self, x_BLp: Tensor, token_grid: torch.Size) -> Tensor:
        (T, Y, X), (pt, py, px) = token_grid, self.spec.patch_size
        return rearrange(
            x_BLp,
            "B (T Y X) (pt py px C) -> B C (T pt) (Y py) (X px)",
            T=T,
            Y=Y,
            X=X,
            pt=pt,
            py=py,
            px=px,
        )


def sinusoid(timestep_B: Tensor, dim: int) -> Tensor:
    """Returns the sinusoidal embedding [B, dim] of timesteps [B]: cosines, then sines, of timestep * 10000^(-2j/dim).

    j counts from 0 to dim/2 - 1. The embedding is computed in float64 and returned in float32.
    """
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=timestep_B.device) / dim)
    angles = torch.outer(timestep_B.double(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()
