"""Tests that ranks that share the rows of each frame encode and decode what one rank does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.on_ranks import on_ranks
from tests.parity import relative_error
from wanfast.bench.model_folder import randomise
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.distributed.vae_parallel import SplitRows
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import VAESpec
from wanfast.runtime.models.vae import WanVAE

SPEC = VAESpec(base_dim=8)
TOLERANCE = 1e-5


def random_vae() -> WanVAE:
    vae = WanVAE(SPEC)
    randomise(vae, 0)
    vae.decoder.conv_out.weight.data *= 0.2  # keeps the video within [-1, 1]
    return vae.requires_grad_(False)


@pytest.mark.parametrize(("num_ranks", "latent_rows"), [(2, 4), (3, 7), (4, 6), (8, 5)])
def test_ranks_that_share_rows_do_what_one_does(num_ranks: int, latent_rows: int) -> None:
    vae, generator = random_vae(), torch.Generator().manual_seed(1)
    video = torch.rand((1, 3, 9, 8 * latent_rows, 24), generator=generator) * 2 - 1
    video[:, :, 1:] = 0
    with torch.inference_mode():
        latents = vae.encode(video)
        decoded = vae.decode(latents)

    def work(ranks: Ranks) -> tuple[Tensor | None, Tensor | None]:
        rows = SplitRows.of(ranks.rank, ranks.size, latent_rows)
        if not rows.has_part:
            return None, None
        with torch.inference_mode():
            own = vae.encode(rows.own(video, 3), still_from=1, rows=rows)
            pieces = list(vae.decode_stream(rows.own(latents, 3), rows))
            return rows.collect(own, 3), rows.collect(torch.cat(pieces, 2), 3)

    (encoded, shown), *others = on_ranks(Mesh(ulysses=num_ranks), work)
    assert others == [(None, None)] * (num_ranks - 1)
    errors = relative_error(encoded, latents), relative_error(shown, decoded)
    print(f"{num_ranks} ranks, {latent_rows} rows: encode {errors[0]:.1e}, decode {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE


def test_shares_differ_by_one_row_at_most() -> None:
    assert SplitRows.of(0, 4, 90).counts == (23, 23, 22, 22)
    assert SplitRows.of(3, 8, 5).counts == (1, 1, 1, 1, 1)
    assert [SplitRows.of(rank, 8, 5).has_part for rank in (4, 5)] == [True, False]
    whole = torch.arange(90 * 8)
    assert torch.equal(torch.cat([SplitRows.of(rank, 4, 90).own(whole, 0) for rank in range(4)]), whole)


def test_a_missing_halo_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: zeros instead of the neighbours' rows change the video."""
    vae = random_vae()
    latents = torch.randn((1, 16, 2, 4, 3), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        decoded = vae.decode(latents)

    def work(ranks: Ranks) -> Tensor | None:
        monkeypatch.setattr(SplitRows, "fill", lambda self, clip: clip[..., 0, :].zero_() + clip[..., -1, :].zero_())
        rows = SplitRows.of(ranks.rank, ranks.size, 4)
        with torch.inference_mode():
            return rows.collect(torch.cat(list(vae.decode_stream(rows.own(latents, 3), rows)), 2), 3)

    assert relative_error(on_ranks(Mesh(ulysses=2), work)[0], decoded) > 0.01
