"""Distils both experts to four steps without guidance (stage 5): a LoRA of rank 16 for each expert.

The teacher is the exported model with its 40 guided steps. From each noise, the teacher's samples are stored at the
four noise levels of the recipe `lightning-4` and at the end. A sample at a level between two steps of the teacher is
their linear interpolation. The student makes four Euler steps from the same noise. In each step it learns the velocity
that leads from its own sample to the teacher's next sample, so that it also learns to correct its own errors. In
progressive distillation (arXiv 2202.00512), the student starts each step at the teacher's sample instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from training.clips import LARGE, SMALL
from training.loop import Batch, DrawFn, LossFn, Schedule, load_ema, train
from training.train_experts import Clips, Kind, TinyModel, expert_of
from wanfast.runtime.config.recipes import RECIPES
from wanfast.runtime.engine.denoise import denoise
from wanfast.runtime.facts.choices import EXPERTS, Branch, Expert
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.models.dit import WanDiT
from wanfast.runtime.models.rope import RotaryTables, rotary_tables
from wanfast.runtime.sampling.guidance import Guidance, guided_steps
from wanfast.runtime.sampling.scheduler import grid, listed, solve

RECIPE = "lightning-4"
RANK = 16
STAGE = "lora"
_LEVELS = listed("euler", [float(level) for level in RECIPES[RECIPE].options["sigmas"].split(",")])
_TEACHER_STEPS = 40
KINDS = (
    Kind(SMALL[0], 12_000, 96),
    Kind(LARGE[0], 2_000, 14),
    Kind(SMALL[1], 3_000, 112),
    Kind(SMALL[2], 3_000, 112),
)


@dataclass(frozen=True)
class Paths:
    """Holds N paths of the teacher: its samples from the noise to the end.

    `samples` [N, 5, C, T, h, w] float16 lie at the four noise levels and at the end. `y` [N, C', T, h, w] bf16 are the
    conditions. `text` [N, n, text_dim] float32 are the embeddings of the captions.
    """

    samples: Tensor
    y: Tensor
    text: Tensor


class Factors(nn.Module):
    """Holds the LoRA factors, down and up, of every linear layer in the blocks and the head of an expert."""

    def __init__(self, expert: WanDiT, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in expert.named_parameters():
            if weight.dim() == 2 and name.startswith(("blocks.", "head.head.")):
                path, (rows, columns) = name.removesuffix(".weight").replace(".", "/"), weight.shape
                down = torch.randn(RANK, columns, generator=generator) / columns**0.5
                self.down[path] = nn.Parameter(down.to(weight.device))
                self.up[path] = nn.Parameter(torch.zeros(rows, RANK, device=weight.device))

    def products(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name of a weight, the product up @ down that is added to this weight)."""
        for path, up in self.up.items():
            yield f"{path.replace('/', '.')}.weight", up @ self.down[path]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a LoRA file: {name: bf16 factor}."""
        return {
            f"diffusion_model.{path.replace('/', '.')}.lora_{letter}.weight": factor.detach().bfloat16().contiguous()
            for letter, factors in (("A", self.down), ("B", self.up))
            for path, factor in factors.items()
        }


class Student(nn.Module):
    """Holds the LoRA factors of both experts, which are the only trained parameters."""

    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.high_noise, self.low_noise = (Factors(expert_of(model, name), seed) for seed, name in enumerate(EXPERTS))


class Velocity(nn.Module):
    """Computes the velocity of an expert from text embeddings, so that `functional_call` replaces all its weights."""

    def __init__(self, expert: WanDiT, tables: dict[torch.Size, RotaryTables]) -> None:
        super().__init__()
        self.expert, self._tables = expert, tables

    def forward(self, x: Tensor, y: Tensor, timestep: int, text: Tensor) -> Tensor:
        T, h, w = grid_of = x.shape[2:]
        if grid_of not in self._tables:
            self._tables[grid_of] = rotary_tables((T, h // 2, w // 2), self.expert.spec.head_dim, x.device)
        timesteps = torch.full((len(x),), timestep, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            velocity, _ = self.expert(x, y, timesteps, self.expert.encode_text(text), self._tables[grid_of])
        return velocity.float()


@torch.no_grad()
def paths(model: TinyModel, clips: Clips, batch: int, seed: int) -> Paths:
    """Returns the teacher's paths for the conditions and captions of clips; each clip has its own noise.

    `batch`: the number of clips that the teacher computes at a time.
    """
    generator = torch.Generator(clips.y.device).manual_seed(seed)
    velocities = _velocities(model)
    text = torch.cat(
        [model.text(ids, n) for ids, n in zip(clips.ids.split(256), clips.lengths.split(256), strict=True)]
    )
    samples = []
    for rows in torch.arange(len(clips.y), device=text.device).split(batch):
        noise = torch.randn(clips.z[rows].shape, generator=generator, device=text.device)
        condition = clips.y[rows].float()
        samples.append(_path(model.spec, velocities, noise, condition, text[rows], text[-1:]).half())
    return Paths(torch.cat(samples), clips.y, text[:-1])


def _path(
    spec: ModelSpec, velocities: dict[Expert, Velocity], noise: Tensor, y: Tensor, text: Tensor, negative: Tensor
) -> Tensor:
    """Returns the teacher's samples [B, 5, C, T, h, w] at the student's noise levels and at the end."""
    levels = grid("unipc", _TEACHER_STEPS, spec.shift)
    scales: dict[Expert, float] = {"high_noise": spec.guidance_high_noise, "low_noise": spec.guidance_low_noise}
    experts = levels.experts(spec.boundary)
    texts: dict[Branch, Tensor] = {"prompt": text, "negative_prompt": negative.expand_as(text)}
    samples = [noise]

    def predict(_: int, expert: Expert, branches: Sequence[Branch], sample: Tensor, timestep: int) -> list[Tensor]:
        n = len(branches)
        both = torch.cat([sample] * n), torch.cat([y] * n), timestep, torch.cat([texts[branch] for branch in branches])
        return list(velocities[expert](*both).chunk(n))

    denoise(
        noise,
        solve("unipc", levels, experts.count("high_noise")),
        experts,
        predict,
        guidance=Guidance(experts, scales, guided_steps(experts, scales)),
        on_sample=lambda index, expert, sample: samples.append(sample),
    )
    return torch.stack([noise, *(_between(samples, levels.sigmas, level) for level in _LEVELS.sigmas[1:])], dim=1)


def _between(samples: Sequence[Tensor], sigmas: Sequence[float], level: float) -> Tensor:
    """Returns the sample at a noise level, from the samples at falling levels `sigmas`, the last of which is 0."""
    after = next(k for k, sigma in enumerate(sigmas) if sigma <= level)
    share = (level - sigmas[after]) / (sigmas[after - 1] - sigmas[after])
    return torch.lerp(samples[after], samples[after - 1], share)


def _velocities(model: TinyModel) -> dict[Expert, Velocity]:
    tables: dict[torch.Size, RotaryTables] = {}
    return {name: Velocity(expert_of(model, name), tables) for name in EXPERTS}


def fit(model: TinyModel, sets: Sequence[Paths], schedule: Schedule, folder: Path, batches: Sequence[int]) -> bool:
    """Trains the LoRAs on `sets`, one for each format of clips; successive steps take the sets in turn.

    `batches` holds the number of paths in a step, for each set. Returns whether all steps are made.
    """
    student = Student(model)
    return train(STAGE, student, drawn(sets, batches), path_loss(model, student), schedule, folder)


def drawn(sets: Sequence[Paths], batches: Sequence[int]) -> DrawFn:
    def draw(step: int, generator: torch.Generator) -> Batch:
        chosen, batch = sets[step % len(sets)], batches[step % len(sets)]
        index = torch.randint(0, len(chosen.y), (batch,), generator=generator, device=chosen.y.device)
        return chosen.samples[index], chosen.y[index], chosen.text[index]

    return draw


def path_loss(model: TinyModel, student: Student) -> LossFn:
    """Returns a function of a batch that computes the loss and a PSNR.

    "loss" is the sum of the mean squared errors of the velocity in the student's four steps. "psnr" compares the
    student's last latents with the teacher's, for a peak of 2.
    """
    velocities = _velocities(model)
    steps = list(zip(_LEVELS.sigmas, _LEVELS.sigmas[1:], _LEVELS.timesteps, strict=False))
    experts = _LEVELS.experts(model.spec.boundary)

    def loss(samples: Tensor, y: Tensor, text: Tensor) -> dict[str, Tensor]:
        weights = {
            name: {
                f"expert.{key}": expert_of(model, name).get_parameter(key) + product
                for key, product in getattr(student, name).products()
            }
            for name in EXPERTS
        }
        x, total = samples[:, 0].float(), torch.zeros((), device=y.device)
        for k, ((here, after, timestep), name) in enumerate(zip(steps, experts, strict=True)):
            wanted = (x - samples[:, k + 1].float()) / (here - after)
            inputs = (x, y.float(), timestep, text)
            velocity = torch.func.functional_call(velocities[name], weights[name], inputs)
            total = total + F.mse_loss(velocity, wanted)
            x = (x - (here - after) * velocity).detach()
        error = (x - samples[:, -1].float()).square().mean()
        return {"loss": total, "psnr": -10 * (error / 4).log10()}

    return loss


def export(model: TinyModel, folder: Path, files: Path) -> None:
    """Writes the LoRA of each expert, in bf16 as it will ship, to `files`/EXPERT.safetensors."""
    student = Student(model)
    load_ema(student, folder / f"{STAGE}.pt")
    files.mkdir(parents=True, exist_ok=True)
    for name in EXPERTS:
        file = files / f"{name}.safetensors"
        save_file(getattr(student, name).tensors(), file, metadata={"recipe": RECIPE, "rank": str(RANK)})
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
