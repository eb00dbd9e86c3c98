"""The pipeline makes a video from text embeddings and up to two images, with two experts and the VAE.

Every rank of a rank group runs the pipeline with the same arguments, except that only the leader needs the pixels. In
the VAE, each rank computes some rows of every frame. Only the leader gets the video.

images [n, 3, H, W] -> VAE -> condition y [20, T, h, w] (mask, then latents) -> `denoise`, which calls the step's
expert for the velocity of each guidance branch -> clean latent [16, T, h, w] -> VAE -> video [3, F, H, W].

Shapes: n images; F frames of H x W pixels; T latent frames of h x w, T = (F-1)/4 + 1, h = H/8, w = W/8; S text tokens.
Source: Wan-Video/Wan2.2, wan/image2video.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from wanfast.runtime.device.hardware import empty_cache, free_bytes, free_memory, is_out_of_memory
from wanfast.runtime.device.meta import on_meta
from wanfast.runtime.device.timing import Stopwatch
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine import pixels
from wanfast.runtime.engine.attention_probe import Choice
from wanfast.runtime.engine.conditioning import draw_noises, given_clip, noise_shape, with_mask
from wanfast.runtime.engine.denoise import StepFn, denoise
from wanfast.runtime.engine.finite import FiniteWatch
from wanfast.runtime.engine.lossy_attention import LossyAttention
from wanfast.runtime.engine.pixels import Frames, FramesFn
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.choices import BRANCHES, Branch, Expert, Precision
from wanfast.runtime.facts.memory import decode_bytes, encode_bytes
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.facts.shapes import Geometry
from wanfast.runtime.models.bricks import RASTER
from wanfast.runtime.models.dit import TextKV, WanDiT
from wanfast.runtime.models.rope import rotary_tables
from wanfast.runtime.models.vae import Rows, WanVAE
from wanfast.runtime.planning.plan import Plan
from wanfast.runtime.sampling.guidance import Guidance
from wanfast.runtime.sampling.magcache import StepCache
from wanfast.runtime.weights.experts import Experts

DOES_NOT_FIT = "does not fit into memory beside the weights: use a smaller --size or fewer --frames"
_EVICT_BYTES = 8 << 30  # evicted each time that the VAE runs out of memory


@dataclass(frozen=True)
class VideoPipeline:
    """This class holds the models of a rank, and the methods that lead from texts and images to a video."""

    spec: ModelSpec
    experts: Experts
    vae: WanVAE
    ranks: Ranks
    attention: Choice  # the attention kernel of the experts
    lossy: LossyAttention | None = None  # their self-attention, if it is lossy

    @property
    def device(self) -> str:
        return self.ranks.device

    @torch.inference_mode()
    def latent(
        self,
        plan: Plan,
        images: Tensor,
        text: dict[Branch, Tensor],
        watch: Stopwatch,
        on_step: StepFn,
        residuals: StepCache,
    ) -> Tensor:
        """Encodes the images, denoises the plan's noise, and returns the clean latent [1, 16, T, h, w] on every rank.

        `encode_condition` explains `images`; `denoise` explains `text`, `on_step` and `residuals`. `watch` measures the
        seconds. With --expert-offload, no expert is left in the GPU's memory at the end.
        """
        noises = self.noises(plan)
        noise = next(noises)
        with watch.span("encode"):
            condition = self.encode_condition(images, plan.geometry)
        with watch.span("denoise"):
            latent = self.denoise(plan, noise, condition, text, residuals, on_step, partial(next, noises))
        self.experts.release()
        return latent

    @torch.inference_mode()
    def frames(
        self, latent: Tensor, geometry: Geometry, watch: Stopwatch, on_frames: FramesFn = lambda frames: None
    ) -> Frames | None:
        """Decodes a latent to uint8 frames [F, H, W, 3] on the leader's CPU; returns None on other ranks.

        The leader calls `on_frames` with a few frames at a time, in order, while the GPU decodes the next frames.
        """
        rows = self.ranks.rows(geometry.latent_height)

        def decoded() -> Frames | None:
            with watch.span("decode"):
                pieces = self._pieces(latent, geometry)
                return pixels.arrived(pieces, geometry, self.device, rows, on_frames)

        return self.ranks.together(decoded)

    def _pieces(self, latent: Tensor, geometry: Geometry) -> Iterator[Tensor]:
        """Yields this rank's rows of the video, [3, f, h, W] in [-1, 1], a few frames at a time.

        If memory runs out on a rank, all ranks decode again from the start; no piece is yielded twice.
        """
        empty_cache(self.device)  # the decoder allocates blocks of other sizes than the loop
        precision: Precision = "bf16" if self.vae.decoder_dtype == torch.bfloat16 else "fp32"
        self.make_room(decode_bytes(self.spec, geometry, precision) // self.ranks.size)
        yielded = 0
        while yielded < geometry.latent_frames:
            rows = self.ranks.rows(geometry.latent_height)
            stream = _decoded(latent, self.vae, rows)
            for index in range(geometry.latent_frames):
                again = partial(_decoded_pieces, index + 1, latent.to("meta"))
                piece = self._attempt(partial(next, stream), again, rows, geometry)
                if piece is None:
                    break
                if index == yielded:
                    yielded += 1
                    if rows.has_part:
                        yield piece[0]

    def make_room(self, wanted: int) -> None:
        """Collects garbage if this rank's GPU has fewer than `wanted` free bytes, and then evicts weights if needed.

        Evicts about as many bytes as are missing; if this is not possible, evicts as many as possible. On a CPU,
        nothing happens.
        """
        if wanted > free_bytes(self.device):
            free_memory(self.device)
        if (missing := wanted - free_bytes(self.device)) > 0:
            self.experts.evict(missing)

    def _attempt(
        self, work: Callable[[], Tensor], again: Callable[[WanVAE, Rows], object], rows: Rows, geometry: Geometry
    ) -> Tensor | None:
        """Returns the VAE's `work()` of each rank; None on all ranks if memory ran out on one of them.

        That rank then has evicted weights, because the estimate of the VAE's memory was wrong, which must not lose a
        video. Before this it does `again`, the same work, on the meta device, for the exchanges that its peers wait
        for. Raises ConfigError on all ranks if a rank has nothing left to evict.
        """
        result, failure = torch.empty(0), None
        try:
            result = work() if rows.has_part else result
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            failure = self._out_of_memory(error)
        if failure and (missed := rows.missed(self.device)):
            with on_meta():
                vae = WanVAE(self.spec.vae, self.vae.decoder_dtype)
            again(vae, missed)
        if not any(self.ranks.gather(failure)):
            return result
        is_ready = failure is None or self.experts.evict(_EVICT_BYTES)
        for reason in filter(None, self.ranks.gather(None if is_ready else failure)):
            size = f"--size {geometry.width}x{geometry.height} --frames {geometry.frames}"
            raise ConfigError(f"{size}: {DOES_NOT_FIT} ({reason.splitlines()[0]:.120})")
        return None

    def _out_of_memory(self, error: MemoryError | RuntimeError) -> str:
        """Returns the text of an out-of-memory error, not the error: its traceback holds the VAE's tensors."""
        if not is_out_of_memory(error, free_bytes(self.device)):
            raise error
        return str(error) or "MemoryError"

    def noises(self, plan: Plan) -> Iterator[Tensor]:
        """Yields the leader's noises of a video, each [1, 16, T, h, w], on every rank, without end.

        Denoising starts from the first noise; a solver that adds noise in each step takes the others.
        The ranks do not draw their own noise, because different GPUs may draw different noise from one seed.
        """
        video, g, channels = plan.config.video, plan.geometry, self.spec.dit.out_channels
        drawn, shape = draw_noises(video.seed, g, channels, video.noise_device), noise_shape(g, channels)
        while True:
            own = next(drawn).to(self.device) if self.ranks.is_leader else torch.empty(shape, device=self.device)
            yield self.ranks.share(own)

    def encode_condition(self, images: Tensor, geometry: Geometry) -> Tensor:
        """Returns the condition y [1, 20, T, h, w] on every rank: four mask channels, then 16 channels of latents.

        `images` [n, 3, H, W] holds the first frame, and the last frame if it is given. Only the leader's pixels are
        used; on other ranks, only n matters. If n is 0, the result is empty: [1, 0, T, h, w].
        """
        if not len(images):
            _, _, *grid = noise_shape(geometry, self.spec.dit.out_channels)
            return torch.empty(1, 0, *grid, device=self.device)
        g, channels = geometry, self.spec.vae.temporal_stride + self.spec.vae.latent_channels
        condition = torch.empty(1, channels, g.latent_frames, g.latent_height, g.latent_width, device=self.device)
        num_images, on_leader = len(images), self.ranks.is_leader
        blank = torch.empty(num_images, 3, g.height, g.width, device=self.device)
        pixels_NCHW = self.ranks.share(images.to(self.device).contiguous() if on_leader else blank)

        def encoded() -> Tensor:
            self.make_room(encode_bytes(self.spec, g) // self.ranks.size)
            own = None
            while own is None:
                rows = self.ranks.rows(g.latent_height)
                work = partial(_encoded, pixels_NCHW, g.frames, self.vae, rows)
                own = self._attempt(work, partial(_encoded, pixels_NCHW.to("meta"), g.frames), rows, g)
            latents = rows.collect(own, 3) if rows.has_part else None
            if latents is None:
                return condition
            return with_mask(latents.float(), self.spec.vae.temporal_stride, last=num_images == 2)

        return self.ranks.share(self.ranks.together(encoded).contiguous())

    def denoise(
        self,
        plan: Plan,
        noise: Tensor,
        condition: Tensor,
        text: dict[Branch, Tensor],
        residuals: StepCache,
        on_step: StepFn,
        fresh_noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Denoises `noise` [1, 16, T, h, w], and returns the clean latent, which has the same shape.

        `condition`: the result of `encode_condition`. `text`: the embedding [S, d] for each branch. `residuals`: the
        cache that decides which forwards are skipped. `on_step(done, expert)` is called before and after each step;
        `done` is the number of finished steps, and `expert` is the expert of the step. `fresh_noise` draws noise
        for the steps of a solver that adds noise.
        """
        rope = rotary_tables(plan.geometry.token_grid, self.spec.dit.head_dim, self.device)
        groupings = {True: self.ranks, False: self.ranks.unguided if plan.regroups else self.ranks}
        order = self.lossy.start(plan) if self.lossy else RASTER
        handover = _handover(plan, self.ranks)
        encoded = _EncodedText(text, self.device)
        finite = FiniteWatch(self.ranks)
        finite.look("the image as the VAE encodes it", condition)

        def velocities(
            index: int, expert: Expert, branches: Sequence[Branch], sample: Tensor, timestep: int
        ) -> list[Tensor]:
            t = torch.full((1,), timestep, device=self.device)  # filled on the device, so that no copy delays the step
            ranks = groupings[plan.guided[index]]

            def velocity(branch: Branch) -> Tensor:
                reused, wanted = residuals.reuse(index, branch), residuals.wants(index, branch)
                then: Expert | None = "low_noise" if (index, branch) == handover else None
                model, after_block = self.experts.take(expert, then, blocks=reused is None)
                if self.lossy and reused is None:
                    self.lossy.begin(index, expert, branches, branch, ranks)
                kv = encoded.by(model, expert, branches, branch) if reused is None else []
                keeps = wanted and reused is None
                prediction, residual = model(
                    sample,
                    condition,
                    t,
                    kv,
                    rope,
                    after_block,
                    cached_residual=reused,
                    keep_residual=keeps,
                    sequence=ranks.sequence,
                    order=order,
                    before_block=self.lossy.enter if self.lossy else lambda index: None,
                )
                if keeps:
                    residuals.keep(index, branch, residual)
                return prediction  # type: ignore[no-any-return]

            def rehearsed(branch: Branch) -> Tensor:
                model, _ = self.experts.take(expert)
                kv = encoded.by(model, expert, branches, ranks.guidance.own(branches)[0])
                return model(sample, condition, t, kv, rope, sequence=later.sequence, num_blocks=1, order=order)[0]  # type: ignore[no-any-return]

            # One block in the later grouping of the ranks, to make its connections and kernels ready.
            if index == 0 and plan.regroups and len(set(plan.guided)) == 2:
                later = groupings[not plan.guided[0]]
                later.guidance.velocities(BRANCHES[: 1 + (not plan.guided[0])], rehearsed)
            return ranks.guidance.velocities(branches, velocity)

        def on_sample(index: int, expert: Expert, sample: Tensor) -> None:
            name = expert.replace("_", "-")
            finite.look(f"the latent after step {index + 1} of {len(plan.schedule)}, by the {name} expert,", sample)

        try:
            latent = denoise(
                noise * plan.levels.start,
                plan.schedule,
                plan.experts,
                velocities,
                guidance=Guidance(plan.experts, plan.guidance, plan.guided),
                fresh_noise=fresh_noise,
                on_step=on_step,
                on_sample=on_sample,
            )
        finally:
            if self.lossy:
                self.lossy.finish()  # after an error too, so that the next video has the memory
        finite.finish()
        return latent


def _encoded(pixels_NCHW: Tensor, frames: int, vae: WanVAE, rows: Rows) -> Tensor:
    """Returns this rank's rows of the latents [1, 16, T, h, w] of the clip of these images."""
    clip, still_to = given_clip(rows.own(pixels_NCHW, 2), frames), frames - len(pixels_NCHW) + 1
    return vae.encode(clip, still_from=1, still_to=still_to, rows=rows)


def _decoded(latent: Tensor, vae: WanVAE, rows: Rows) -> Iterator[Tensor]:
    """Yields this rank's rows of the video, [1, 3, f, h, W], a few frames at a time."""
    yield from vae.decode_stream(rows.own(latent, 3), rows)


def _decoded_pieces(count: int, latent: Tensor, vae: WanVAE, rows: Rows) -> list[Tensor]:
    return list(islice(_decoded(latent, vae, rows), count))


class _EncodedText:
    """Holds the text's keys and values of the running expert, computed once for each prompt and not in every step.

    They are computed again when the expert or the branches of a step change. The ranks of parallel guidance then
    compute the prompt's at the same time. Otherwise sharded weights would be gathered by only some of them.
    """

    def __init__(self, text: dict[Branch, Tensor], device: str) -> None:
        self._text, self._device = text, device
        self._of: tuple[Expert, Sequence[Branch]] | None = None
        self._held: dict[Branch, list[TextKV]] = {}

    def by(self, model: WanDiT, expert: Expert, branches: Sequence[Branch], branch: Branch) -> list[TextKV]:
        if self._of != (expert, branches):
            self._of = expert, branches
            self._held.clear()  # those of an expert take 0.8 GB
        if branch not in self._held:
            self._held[branch] = model.encode_text(self._text[branch].unsqueeze(0).to(self._device))
        return self._held[branch]


def _handover(plan: Plan, ranks: Ranks) -> tuple[int, Branch] | None:
    """Returns the last call on this rank that runs high-noise blocks; offloaded low-noise blocks load during it.

    Returns None if no such call exists, or if no low-noise step follows.
    """
    calls = [
        (index, branch)
        for index, (expert, skips) in enumerate(zip(plan.experts, plan.skips, strict=True))
        if expert == "high_noise"
        for branch in ranks.guidance.own(BRANCHES if plan.guided[index] else BRANCHES[:1])
        if not skips[BRANCHES.index(branch)]
    ]
    return calls[-1] if calls and plan.experts[-1] == "low_noise" else None
