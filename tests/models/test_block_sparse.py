"""Tests attention over listed blocks against float64, and the router that lists them."""

from __future__ import annotations

import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.parity import relative_error
from wanfast.runtime.engine import attention_probe
from wanfast.runtime.models import block_sparse
from wanfast.runtime.models.attention_router import block_lists, block_scores
from wanfast.runtime.models.block_sparse import BlockLists, _by_fa4, block_sparse_attention, listed_attention


def qkv(length: int, heads: int = 2, seed: int = 0, head_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, heads, head_dim, generator=generator) for _ in "qkv"]


def lists_of(mask: Tensor) -> BlockLists:
    """The lists of a mask of blocks [B, H, M, N]; what stands behind a list's end does not count."""
    counts = mask.sum(-1).int()
    blocks = mask.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
    return BlockLists(counts, blocks.int())


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> Tensor:
    """Masked attention in float64; `mask` is of blocks."""
    length = q.shape[1]
    of_tokens = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :length, :length]
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~of_tokens, -torch.inf).softmax(-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v.double())


@given(length=st.integers(1, 70), block=st.sampled_from([4, 8, 16]), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_attention_is_exact_for_any_mask(length: int, block: int, share: float, seed: int) -> None:
    """Lists of unequal lengths, ragged ends, and a single block."""
    q, k, v = qkv(length, heads=3, seed=seed)
    num_blocks = -(-length // block)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 3, num_blocks, num_blocks, generator=generator) < share
    mask |= torch.nn.functional.one_hot(torch.randint(num_blocks, mask.shape[:3], generator=generator), num_blocks) > 0
    out = block_sparse_attention(q, k, v, lists_of(mask), block)
    assert out.shape == q.shape
    assert relative_error(out, formula(q, k, v, mask, block)) <= 1e-5


def test_bf16_only_rounds() -> None:
    q, k, v = (x.bfloat16() for x in qkv(300, head_dim=64))
    mask = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    out = block_sparse_attention(q, k, v, lists_of(mask), 128)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, formula(q, k, v, mask, 128)) <= 1e-2


def test_flash_attention_gets_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """As full blocks without masks, with the block's size; its own module is a stand-in here."""
    tensors = namedtuple("tensors", "mask_block_cnt mask_block_idx full_block_cnt full_block_idx block_size")
    seen: list[object] = []
    fakes = {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": lambda q, k, v, **named: (seen.append(named), (q + v, None))[1]},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": tensors},
        "cutlass": {},
        "cutlass.base_dsl": {},
        "cutlass.base_dsl.common": {"DSLBaseError": OSError},
    }
    for name, held in fakes.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**held))  # type: ignore[arg-type]
    q, k, v = qkv(300)
    lists = lists_of(torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6)
    assert torch.equal(_by_fa4(q, k, v, lists, 128), q + v)
    (named,) = seen
    assert isinstance(named, dict) and named.keys() == {"block_sparse_tensors"}
    given = named["block_sparse_tensors"]
    assert given.block_size == (128, 128) and not given.mask_block_cnt.any()
    assert (given.full_block_cnt, given.full_block_idx) == lists
    assert given.mask_block_cnt.dtype == given.mask_block_idx.dtype == torch.int32
    assert given.mask_block_cnt.shape == lists.counts.shape and given.mask_block_idx.shape == lists.blocks.shape


def test_an_empty_list_is_refused() -> None:
    q, k, v = qkv(32)
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = False
    with pytest.raises(ValueError, match="no block of keys"):
        block_sparse_attention(q, k, v, lists_of(mask), 8)


def test_the_router_lists_no_empty_list() -> None:
    q, k, _ = qkv(32)
    with pytest.raises(ValueError, match="no block of keys"):
        block_lists(q, k, 8, (2, 0), 0)


def test_the_host_does_not_wait_for_the_lists_of_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values, so reading one is an error; the kernel is a stand-in."""
    monkeypatch.setattr(block_sparse, "_by_fa4", lambda q, k, v, lists, block: q)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 32, 2, 8, device="cuda") for _ in "qkv")
        lists = BlockLists(
            *(torch.ones(shape, dtype=torch.int32, device="cuda") for shape in ((1, 2, 4), (1, 2, 4, 2)))
        )
        assert listed_attention(q, k, v, lists, 8) is q
        with pytest.raises(DataDependentOutputException):
            block_sparse_attention(q, k, v, lists, 8)


@given(
    length=st.integers(1, 90),
    first=st.integers(0, 3),
    last=st.integers(0, 2),
    more=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_lists_hold_the_given_frames_and_their_own_block(
    length: int, first: int, last: int, more: tuple[int, int]
) -> None:
    """The lists of each head have their own length, and all are as wide as the longest."""
    q, k, _ = qkv(length)
    num_blocks = -(-length // 8)
    first, last = min(first, num_blocks), min(last, num_blocks)
    listed = [min(first + last + each, num_blocks) for each in more]
    counts, blocks = block_lists(q, k, 8, listed, first, last)
    assert counts.dtype == blocks.dtype == torch.int32 and blocks.shape == (1, 2, num_blocks, max(listed))
    assert counts.shape == (1, 2, num_blocks) and counts[0].T.tolist() == [listed] * num_blocks
    for number, lists in enumerate(blocks[0].transpose(0, 1).tolist()):
        for count, row in zip(listed, lists, strict=True):
            numbers = row[:count]
            assert numbers == sorted(set(numbers)) and numbers[-1] < num_blocks
            assert {*range(first), *range(num_blocks - last, num_blocks), number} <= {*numbers}


def test_the_router_finds_the_keys_that_a_query_needs() -> None:
    """Each block of queries has one block of keys like it, in another place for each head."""
    num_blocks, block, head_dim = 6, 16, 32
    generator = torch.Generator().manual_seed(0)
    meaning = torch.nn.functional.normalize(torch.randn(num_blocks, head_dim, generator=generator), dim=-1) * 12
    places = torch.stack([torch.randperm(num_blocks, generator=generator) for _ in range(2)])
    q = meaning.repeat_interleave(block, 0)[None, :, None].expand(1, -1, 2, -1)
    k = torch.stack([meaning[place].repeat_interleave(block, 0) for place in places], 1)[None]
    _, blocks = block_lists(q, k, block, (2, 2), 0)
    for head, place in enumerate(places):
        for number in range(num_blocks):
            wanted = (place == number).nonzero().item()
            assert wanted in blocks[0, head, number].tolist()


def test_a_strong_key_counts_though_the_mean_of_its_block_hides_it() -> None:
    """One quarter of the block points to the queries, the next one away from them; the block's mean is zero."""
    q = torch.zeros(1, 48, 4)
    q[..., 0] = 8
    k = torch.zeros(1, 48, 4)
    k[:, 16:20, 0], k[:, 20:24, 0] = 4, -4
    assert block_scores(q, k, 16)[0, 0].argmax() == 1
    assert k[:, 16:32].mean().abs() < 1e-6


@pytest.mark.parametrize("length", [64, 61, 50, 3])
def test_scores_are_those_of_the_formula(length: int) -> None:
    """Also of a last block with fewer tokens or fewer quarters."""
    q, k, _ = (x[:, :, 0].double() for x in qkv(length))
    scores = block_scores(q.float(), k.float(), 16)
    for row in range(-(-length // 16)):
        for column in range(-(-length // 16)):
            pairs = [
                part @ other * q.shape[-1] ** -0.5
                for part in (quarter.mean(0) for quarter in q[0, row * 16 : row * 16 + 16].split(4))
                for other in (quarter.mean(0) for quarter in k[0, column * 16 : column * 16 + 16].split(4))
            ]
            assert abs(float(scores[0, row, column] - torch.stack(pairs).logsumexp(0))) <= 1e-5


def test_a_head_computes_only_its_own_lists() -> None:
    """Heads with lists of other lengths give what each gives with a neighbour of the same length."""
    q, k, v = qkv(77)
    out = block_sparse_attention(q, k, v, block_lists(q, k, 16, (2, 4), 1), 16)
    for head, length in enumerate((2, 4)):
        alike = block_sparse_attention(q, k, v, block_lists(q, k, 16, (length, length), 1), 16)
        assert relative_error(out[:, :, head], alike[:, :, head]) <= 1e-6


def test_all_blocks_are_dense_attention() -> None:
    q, k, v = qkv(77)
    out = block_sparse_attention(q, k, v, block_lists(q, k, 16, (5, 5), 1), 16)
    assert relative_error(out, attention_probe._formula(q.double(), k.double(), v.double())) <= 1e-6
