"""Trains both experts and UMT5 (stage 3) by rectified flow on the VAE's latents, with the pipeline's conditioning.

x = (1 - s) z + s noise, v = noise - z; noise levels s are uniform before the shift. The high-noise expert gets the
levels at or above the boundary, the low-noise expert the others. Both share the text encoder. One caption in eight is
dropped, so that the empty prompt can serve as the negative prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.loop import Batch, DrawFn, LossFn, Schedule, initialise, train
from training.train_vae import encode
from wanfast.quality.world import Renderer, draw_scene, moments_of_clip
from wanfast.runtime.engine.conditioning import with_mask
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.media.tokenizer import PromptTokenizer
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store.model_files import TINY

_DROP = 0.125


class TinyModel(nn.Module):
    """Holds the three networks of this stage."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.high_noise = WanDiT(spec.dit, torch.float32)
        self.low_noise = WanDiT(spec.dit, torch.float32)
        self.umt5 = UMT5Encoder(spec.umt5, torch.float32)
        for seed, network in enumerate((self.high_noise, self.low_noise, self.umt5), start=2):
            initialise(network, seed, zero=("head.head", "pos_embedding"))

    def text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns embeddings [B, n, text_dim] of ids [B, n]; zeros follow each text's length, as in the pipeline."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return self.umt5(ids, mask) * mask.unsqueeze(-1)


@dataclass(frozen=True)
class Clips:
    """Holds a fixed set of encoded clips: latents z and conditions y [N, C, T, h, w] bf16, and their captions' ids.

    `ids` has N + 1 rows; the last row is the empty caption.
    """

    z: Tensor
    y: Tensor
    ids: Tensor
    lengths: Tensor


@torch.no_grad()
def encode_clips(vae: WanVAE, renderer: Renderer, count: int, batch: int = 64) -> Clips:
    """Draws, renders and encodes `count` clips; each condition encodes the first frame followed by grey frames."""
    tokenizer = PromptTokenizer(TINY / "tokenizer/tokenizer.json", max_tokens=40)
    latents, conditions, texts = [], [], []
    for first in range(0, count, batch):
        scenes = [draw_scene(10_000_000 + first + k) for k in range(min(batch, count - first))]
        video = renderer(scenes, moments_of_clip())
        given = torch.zeros_like(video)
        given[:, :, 0] = video[:, :, 0]
        with torch.autocast(renderer.device, torch.bfloat16, enabled=renderer.device == "cuda"):
            latents.append(encode(vae, video).bfloat16())
            conditions.append(with_mask(encode(vae, given), vae.spec.temporal_stride).bfloat16())
        texts += [torch.tensor(tokenizer.encode(scene.caption).ids) for scene in scenes]
    texts.append(torch.tensor(tokenizer.encode("").ids))  # the empty caption comes last
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(renderer.device)
    lengths = torch.tensor([len(text) for text in texts], device=renderer.device)
    return Clips(torch.cat(latents), torch.cat(conditions), ids, lengths)


def fit(spec: ModelSpec, clips: Clips, schedule: Schedule, folder: Path, device: str, batch: int) -> bool:
    model = TinyModel(spec).to(device)
    if device == "cuda":
        for expert in (model.high_noise, model.low_noise):
            for block in expert.blocks:
                block.compile(dynamic=False)
    return train("experts", model, noised(spec, clips, batch), flow_loss(model, clips.z), schedule, folder)


def noised(spec: ModelSpec, clips: Clips, batch: int) -> DrawFn:
    """Returns a function that draws `batch` clips for each expert.

    A drawn batch is: latents z, conditions y, noise and noise levels s, all [2, batch, ...], and the captions' ids and
    lengths [2 * batch, ...].
    """
    split = _unshift(spec.boundary, spec.shift)  # the share of noise levels below the boundary

    def draw(step: int, generator: torch.Generator) -> Batch:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=clips.z.device)

        index = torch.randint(0, len(clips.z), (2, batch), generator=generator, device=clips.z.device)
        kept = uniform(2, batch) >= _DROP
        captions = torch.where(kept, index, len(clips.z)).flatten()
        levels = torch.stack((split + (1 - split) * uniform(batch), split * uniform(batch)))
        s = spec.shift * levels / (1 + (spec.shift - 1) * levels)
        noise = torch.randn((2, batch, *clips.z.shape[1:]), generator=generator, device=clips.z.device)
        return clips.z[index], clips.y[index], noise, s, clips.ids[captions], clips.lengths[captions]

    return draw


def flow_loss(model: TinyModel, latents: Tensor) -> LossFn:
    """Returns the sum of the experts' mean squared velocity errors, for clips shaped like `latents` [N, C, T, h, w]."""
    T, h, w = latents.shape[2:]
    rope = rotary_tables((T, h // 2, w // 2), model.spec.dit.head_dim, latents.device)

    def loss(z: Tensor, y: Tensor, noise: Tensor, s: Tensor, ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        device = z.device
        terms = {}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = model.text(ids, lengths).unflatten(0, s.shape)
            for k, (name, expert) in enumerate((("high", model.high_noise), ("low", model.low_noise))):
                level = s[k].view(-1, 1, 1, 1, 1)
                x = (1 - level) * z[k].float() + level * noise[k]
                timestep = (s[k] * 1000).clamp(max=999).floor()
                velocity, _ = expert(x, y[k].float(), timestep, expert.encode_text(text[k]), rope)
                terms[name] = F.mse_loss(velocity.float(), noise[k] - z[k])
        return {"loss": terms["high"] + terms["low"], **terms}

    return loss


def _unshift(level: float, shift: float) -> float:
    return level / (shift - (shift - 1) * level)
