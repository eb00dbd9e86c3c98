"""Trains both experts and UMT5 (stage 3) by rectified flow on the VAE's latents, with the pipeline's conditioning.

The model gets the first frame of every clip, and the last frame of a third of the clips. Successive steps take clips of
different formats, with about the same number of tokens in each step.

x = (1 - s) z + s noise, v = noise - z; noise levels s are uniform before the shift. The high-noise expert gets the
levels at or above the boundary, the low-noise expert the others. Both share the text encoder. One caption in eight is
dropped, so that the empty prompt can serve as the negative prompt. Nothing is compiled, because compiled blocks gave
wrong gradients on H200 GPUs, without an error and only in some batches (LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.clips import LARGE, SMALL, Format, Mix
from training.loop import Batch, DrawFn, LossFn, Schedule, initialise, train
from training.train_vae import encode
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.conditioning import with_mask
from wanfast.runtime.facts.choices import EXPERTS, Expert
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.media.tokenizer import PromptTokenizer
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import RotaryTables, rotary_tables
from wanfast.runtime.models.umt5 import UMT5Encoder
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.store.model_files import TINY, ModelFiles
from wanfast.runtime.weights.builders import build_expert, build_umt5

STAGE = "experts"
_DROP = 0.125
_LAST_GIVEN = 1 / 3
_MAX_IDS = 40


@dataclass(frozen=True)
class Kind:
    """Holds a format, the number of encoded clips of this format, and the number of clips for each expert in a step."""

    form: Format
    clips: int
    batch: int


# Half of the steps take large clips, and a third of all steps clips that are not square.
KINDS = (
    Kind(SMALL[0], 14_000, 96),
    Kind(SMALL[1], 4_000, 112),
    Kind(SMALL[2], 4_000, 112),
    Kind(LARGE[0], 3_000, 14),
    Kind(LARGE[1], 900, 16),
    Kind(LARGE[2], 900, 16),
)
ORDER = (0, 3, 0, 4, 1, 3, 0, 3, 0, 5, 2, 3)
TOY = (Kind(Format((16, 16), 5), 3, 2), Kind(Format((32, 16), 5), 3, 1))


class TinyModel(nn.Module):
    """Holds the three networks of this stage: both experts and UMT5, in float32."""

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
    """Holds a fixed set of N encoded clips.

    `z` are the latents [N, C, T, h, w] and `y` the conditions [N, C', T, h, w], both bf16. `ids` [N + 1, n] are the
    token ids of the captions, and `lengths` [N + 1] their numbers of tokens; the last row is the empty caption.
    """

    z: Tensor
    y: Tensor
    ids: Tensor
    lengths: Tensor


def trained(files: ModelFiles) -> TinyModel:
    """Returns the experts and UMT5 of a trained model, in float32 and without gradients."""
    model, ranks = TinyModel(files.spec), Ranks("cpu")
    for name in EXPERTS:
        expert_of(model, name).load_state_dict(build_expert(files, name, "fp32", ranks).state_dict())
    model.umt5.load_state_dict(build_umt5(files, "fp32", ranks).state_dict())
    return model.requires_grad_(False)


def expert_of(model: TinyModel, name: Expert) -> WanDiT:
    return model.high_noise if name == "high_noise" else model.low_noise


@torch.no_grad()
def encode_clips(vae: WanVAE, mix: Mix, kind: Kind, number: int) -> Clips:
    """Draws, renders and encodes the clips of a kind from scene `number` on."""
    tokenizer = PromptTokenizer(TINY / "tokenizer/tokenizer.json", max_tokens=_MAX_IDS)
    latents, conditions, texts = [], [], []
    for first in range(0, kind.clips, kind.batch):
        scenes = [mix.scene(number + first + k, kind.form.size) for k in range(min(kind.batch, kind.clips - first))]
        video = mix.render(scenes, kind.form)
        with torch.autocast(mix.device, torch.bfloat16, enabled=mix.device == "cuda"):
            latents.append(encode(vae, video).bfloat16())
            conditions.append(conditions_of(vae, video, round(len(scenes) * _LAST_GIVEN)).bfloat16())
        texts += [torch.tensor(tokenizer.encode(scene.caption).ids) for scene in scenes]
    texts.append(torch.tensor(tokenizer.encode("").ids))  # the empty caption comes last
    lengths = torch.tensor([len(text) for text in texts], device=mix.device)
    ids = torch.stack([F.pad(text, (0, _MAX_IDS - len(text))) for text in texts]).to(mix.device)
    return Clips(torch.cat(latents), torch.cat(conditions), ids, lengths)


def conditions_of(vae: WanVAE, video: Tensor, last: int) -> Tensor:
    """Returns the conditions [B, C', T, h, w] of clips [B, 3, F, H, W]: a mask, and the latents of the given frames.

    All clips give their first frame, and the first `last` clips also give their last frame.
    """
    given = torch.zeros_like(video)
    given[:, :, 0] = video[:, :, 0]
    given[:last, :, -1] = video[:last, :, -1]
    latents = encode(vae, given)
    stride = vae.spec.temporal_stride
    return torch.cat((with_mask(latents[:last], stride, last=True), with_mask(latents[last:], stride)))


def fit(
    spec: ModelSpec,
    sets: Sequence[Clips],
    schedule: Schedule,
    folder: Path,
    device: str,
    batches: Sequence[int],
    order: Sequence[int],
    *,
    start: ModelFiles | None = None,
    learning: Expert | None = None,
) -> bool:
    """Trains on sets of clips, one for each kind; step k takes set `order[k % len(order)]`.

    `start`: the trained model whose experts and UMT5 learn on, or None for new ones. `learning`: the only expert that
    learns; UMT5 and the other expert then keep the values of `start`. None trains all.
    """
    model = (trained(start).requires_grad_() if start else TinyModel(spec)).to(device)
    names = EXPERTS if learning is None else (learning,)
    if learning is not None:
        model.requires_grad_(False)
        expert_of(model, learning).requires_grad_()
    loss = flow_loss(model, names)
    return train(checkpoint_name(learning), model, noised(spec, sets, batches, order), loss, schedule, folder)


def checkpoint_name(learning: Expert | None) -> str:
    return STAGE if learning is None else f"{STAGE}-{learning}"


def noised(spec: ModelSpec, sets: Sequence[Clips], batches: Sequence[int], order: Sequence[int]) -> DrawFn:
    """Returns a function that draws clips of one set for each expert.

    A drawn batch is: latents z, conditions y, noise and noise levels s, all [2, batch, ...], and the captions' ids and
    lengths [2 * batch, ...].
    """
    split = _unshift(spec.boundary, spec.shift)  # the share of noise levels below the boundary

    def draw(step: int, generator: torch.Generator) -> Batch:
        clips, batch = sets[order[step % len(order)]], batches[order[step % len(order)]]

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


def flow_loss(model: TinyModel, names: Sequence[Expert] = EXPERTS) -> LossFn:
    """Returns a function of a batch that computes the sum of the named experts' mean squared errors of the velocity.

    The batch is one for both experts, whatever the names.
    """
    tables: dict[torch.Size, RotaryTables] = {}
    first = EXPERTS.index(names[0])
    rows = slice(first, first + len(names))

    def rope(grid: torch.Size, device: torch.device) -> RotaryTables:
        if grid not in tables:
            T, h, w = grid
            tables[grid] = rotary_tables((T, h // 2, w // 2), model.spec.dit.head_dim, device)
        return tables[grid]

    def loss(z: Tensor, y: Tensor, noise: Tensor, s: Tensor, ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        device = z.device
        terms = {}
        ids, lengths = (each.unflatten(0, s.shape)[rows].flatten(0, 1) for each in (ids, lengths))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = model.text(ids, lengths).unflatten(0, (len(names), -1))
            for name, embeddings in zip(names, text, strict=True):
                k, expert = EXPERTS.index(name), expert_of(model, name)
                level = s[k].view(-1, 1, 1, 1, 1)
                x = (1 - level) * z[k].float() + level * noise[k]
                timestep = (s[k] * 1000).clamp(max=999).floor()
                context = expert.encode_text(embeddings)
                velocity, _ = expert(x, y[k].float(), timestep, context, rope(z.shape[3:], device))
                terms[name.removesuffix("_noise")] = F.mse_loss(velocity.float(), noise[k] - z[k])
        return {"loss": sum(terms.values(), torch.zeros((), device=device)), **terms}

    return loss


def _unshift(level: float, shift: float) -> float:
    return level / (shift - (shift - 1) * level)
