"""Tests the condition against the reference's formula, with the first frame given, or the first and the last."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, repeat

from wanfast.runtime.engine.conditioning import given_clip, with_mask


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames", [5, 17, 81])
def test_the_mask_groups_the_given_frames_by_four(frames: int, last: bool) -> None:
    """The formula: 1 for a given frame; frame 0 counts four times; then each four frames make one latent frame."""
    given = torch.zeros(frames)
    given[0], given[-1] = 1, float(last)
    four_times = torch.cat((repeat(given[:1], "one -> (four one)", four=4), given[1:]))
    expected = rearrange(four_times, "(T four) -> four T", four=4)
    latents = torch.randn(2, 16, (frames - 1) // 4 + 1, 2, 3)
    condition = with_mask(latents, 4, last=last)
    assert torch.equal(condition[:, 4:], latents)
    assert torch.equal(condition[:, :4], expected[None, :, :, None, None].expand(2, -1, -1, 2, 3))


def test_the_encoded_clip_is_grey_between_the_given_pictures() -> None:
    first, last = torch.rand(3, 4, 6), torch.rand(3, 4, 6)
    clip = given_clip(torch.stack([first, last]), 9)
    assert clip.shape == (1, 3, 9, 4, 6)
    assert torch.equal(clip[0, :, 0], first) and torch.equal(clip[0, :, -1], last) and not clip[:, :, 1:-1].any()
    assert not given_clip(first[None], 9)[:, :, 1:].any()
