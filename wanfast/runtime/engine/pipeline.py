"""The pipeline makes a video from an image and text embeddings, with two experts and the VAE; it has no options.

Every rank of a group runs the pipeline with the same arguments. Only the leader encodes the image and decodes the
video; all ranks run the loop.

image [3, H, W] -> VAE -> condition y [20, T, h, w] (mask, then latents) -> `denoise`, which calls the step's
expert for the velocity of each guidance branch -> clean latent [16, T, h, w] -> VAE -> video [3, F, H, W].

Shapes: F frames of H x W pixels; T latent frames of h x w, T = (F-1)/4 + 1, h = H/8, w = W/8; n text tokens.
Source: Wan-Video/Wan2.2, wan/image2video.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wanfast.runtime.device.finite import all_finite
from wanfast.runtime.device.hardware import free_bytes, free_memory, is_out_of_memory
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.attention_probe import Choice
from wanfast.runtime.engine.conditioning import draw_noise, first_frame_clip, noise_shape, with_mask
from wanfast.runtime.engine.denoise import StepFn, denoise
from wanfast.runtime.engine.finite import FiniteWatch, require_finite
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert
from wanfast.runtime.facts.memory import decode_bytes
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.facts.shapes import Geometry
from wanfast.runtime.models.dit import TextKV, WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.models.vae import WanVAE
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.guidance import needs_unconditional
from wanfast.runtime.sampling.magcache import ResidualCache, StepCache
from wanfast.runtime.weights.experts import Experts

DOES_NOT_FIT = "does not fit into memory beside the weights: use smaller values"
_EVICT_BYTES = 8 << 30  # evicted each time that the VAE runs out of memory


@dataclass(frozen=True)
class ImageToVideoPipeline:
    """This class holds the models of a rank, and the parts of the way from an image to a video."""

    spec: ModelSpec
    experts: Experts
    vae: WanVAE | None  # only on the leader
    ranks: Ranks
    attention: Choice  # the attention kernel of the experts

    @property
    def device(self) -> str:
        return self.ranks.device

    @torch.inference_mode()
    def __call__(
        self,
        plan: Plan,
        image: Tensor,
        text: dict[Branch, Tensor],
        watch: Stopwatch,
        on_step: StepFn = lambda i, e: None,
        residuals: StepCache | None = None,
    ) -> Tensor | None:
        """Returns the video [3, F, H, W] in [-1, 1] on the leader's CPU, None on other ranks.

        It is made from an image [3, H, W] and each branch's `text` [n, d]. `residuals` decides which forwards run; by
        default the plan decides.
        """
        latent = self.latent(plan, image, text, watch, on_step, residuals or ResidualCache(plan.skips))
        return self.decode(latent, plan.geometry, watch)

    @torch.inference_mode()
    def latent(
        self,
        plan: Plan,
        image: Tensor,
        text: dict[Branch, Tensor],
        watch: Stopwatch,
        on_step: StepFn,
        residuals: StepCache,
    ) -> Tensor:
        """Returns the clean latent [1, 16, T, h, w] on every rank; no expert is needed afterwards."""
        noise = self.noise(plan)
        with watch.span("encode"):
            condition = self.encode_condition(image, plan.geometry)
        with watch.span("denoise"):
            latent = self.denoise(plan, noise, condition, text, residuals, on_step)
        self.experts.leave()
        return latent

    @torch.inference_mode()
    def decode(self, latent: Tensor, geometry: Geometry, watch: Stopwatch) -> Tensor | None:
        """Returns the video [3, F, H, W] in [-1, 1] on the leader's CPU, None on other ranks."""
        vae = self.vae
        return self.ranks.together(lambda: None if vae is None else self._decode(vae, latent, geometry, watch))

    def _decode(self, vae: WanVAE, latent: Tensor, geometry: Geometry, watch: Stopwatch) -> Tensor:
        """Returns the video on the CPU."""
        free_memory(self.device)  # the decoder allocates blocks of other sizes than the loop
        with watch.span("decode"):
            wanted = decode_bytes(self.spec, geometry)
            if self.device == "cuda" and (missing := wanted - torch.cuda.mem_get_info()[0]) > 0:
                self.experts.evict(missing)
            video = self._evicting(partial(vae.decode, latent), geometry)[0]
            require_finite("the decoded video", bool(all_finite(video)))
            return video.cpu()

    def _evicting(self, work: Callable[[], Tensor], geometry: Geometry) -> Tensor:
        """Returns the result of the VAE's `work`; evicts weights and retries when memory is out.

        The memory that the VAE needs is only an estimate, and a wrong estimate must not lose a video. Raises
        ConfigError if there is nothing left to evict.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:  # torch.OutOfMemoryError is a subclass
                if not is_out_of_memory(error, free_bytes(self.device)):
                    raise
                failure = str(error)  # not the error: its traceback holds the VAE's tensors
            if not self.experts.evict(_EVICT_BYTES):
                size = f"--size {geometry.width}x{geometry.height} --frames {geometry.frames}"
                raise ConfigError(f"{size}: {DOES_NOT_FIT} ({failure.splitlines()[0]:.120})")

    def noise(self, plan: Plan) -> Tensor:
        """Returns the leader's noise [1, 16, T, h, w] on every rank, because unlike GPUs draw unlike noise."""
        video, channels = plan.config.video, self.spec.dit.out_channels
        noise = torch.empty(noise_shape(plan.geometry, channels), device=self.device)
        if self.ranks.is_leader:
            noise = draw_noise(video.seed, plan.geometry, channels, video.noise_device).to(self.device)
        return self.ranks.share(noise)

    def encode_condition(self, image: Tensor, geometry: Geometry) -> Tensor:
        """Returns the condition y [1, 20, T, h, w]: four mask channels, then the latents of a clip.

        The mask is 1 on the latent frame that is given. The clip is the image followed by mid-grey frames.
        """
        g, channels = geometry, self.spec.vae.temporal_stride + self.spec.vae.latent_channels
        condition = torch.empty(1, channels, g.latent_frames, g.latent_height, g.latent_width, device=self.device)

        def encoded(vae: WanVAE) -> Tensor:
            clip = first_frame_clip(image.to(self.device), g.frames)
            latents = self._evicting(partial(vae.encode, clip), g)
            return with_mask(latents.float(), self.spec.vae.temporal_stride)

        vae = self.vae
        return self.ranks.share(self.ranks.together(lambda: condition if vae is None else encoded(vae)).contiguous())

    def denoise(
        self,
        plan: Plan,
        noise: Tensor,
        condition: Tensor,
        text: dict[Branch, Tensor],
        residuals: StepCache,
        on_step: StepFn,
    ) -> Tensor:
        """Returns the clean latent [1, 16, T, h, w] from noise of its shape; `residuals` decides which forwards run."""
        rope = rotary_tables(plan.geometry.token_grid, self.spec.dit.head_dim, self.device)

        handover = _handover(plan, self.ranks)
        encoded = _EncodedText(text, self.device)
        finite = FiniteWatch(self.ranks)
        finite.look("the image as the VAE encodes it", condition)

        def velocities(
            index: int, expert: Expert, branches: Sequence[Branch], sample: Tensor, timestep: int
        ) -> list[Tensor]:
            t = torch.full((1,), timestep, device=self.device)  # filled on the device, so that no copy delays the step

            def velocity(branch: Branch) -> Tensor:
                reused, wanted = residuals.reuse(index, branch), residuals.wants(index, branch)
                then: Expert | None = "low_noise" if (index, branch) == handover else None
                model, after_block = self.experts.take(expert, then, blocks=reused is None)
                kv = encoded.by(model, expert, branch) if reused is None else []
                keeps = wanted and reused is None
                prediction, residual = model(
                    sample, condition, t, kv, rope, after_block, cached_residual=reused, keep_residual=keeps
                )
                if keeps:
                    residuals.keep(index, branch, residual)
                return prediction  # type: ignore[no-any-return]

            return self.ranks.guidance.velocities(branches, velocity)

        def on_sample(index: int, expert: Expert, sample: Tensor) -> None:
            name = expert.replace("_", "-")
            finite.look(f"the latent after step {index + 1} of {len(plan.schedule)}, by the {name} expert,", sample)

        latent = denoise(
            noise,
            plan.schedule,
            velocities,
            boundary=self.spec.boundary,
            guidance=plan.guidance,
            on_step=on_step,
            on_sample=on_sample,
        )
        finite.finish()
        return latent


class _EncodedText:
    """Holds the text's keys and values of the running expert, computed once for each prompt and not in every step."""

    def __init__(self, text: dict[Branch, Tensor], device: str) -> None:
        self._text, self._device = text, device
        self._held: dict[tuple[Expert, Branch], list[TextKV]] = {}

    def by(self, model: WanDiT, expert: Expert, branch: Branch) -> list[TextKV]:
        if any(other != expert for other, _ in self._held):
            self._held.clear()  # the other expert has done its steps, and its keys and values take 0.8 GB
        if (expert, branch) not in self._held:
            self._held[expert, branch] = model.encode_text(self._text[branch].unsqueeze(0).to(self._device))
        return self._held[expert, branch]


def _handover(plan: Plan, ranks: Ranks) -> tuple[int, Branch] | None:
    """Returns the last call on this rank that runs high-noise blocks; offloaded low-noise blocks load during it.

    Returns None if no such call exists, or if no low-noise step follows.
    """
    calls = [
        (index, branch)
        for index, (expert, skips) in enumerate(zip(plan.experts, plan.skips, strict=True))
        if expert == "high_noise"
        for branch in ranks.guidance.own(BRANCHES if needs_unconditional(plan.guidance[expert]) else BRANCHES[:1])
        if not skips[BRANCHES.index(branch)]
    ]
    return calls[-1] if calls and plan.experts[-1] == "low_noise" else None
