"""A plan describes completely what will run for one video; nothing of it is computed yet.

`Plan.of` derives the geometry, the schedule and the steps of each expert from an effective config and the facts of the
model. Later, `placement.place` decides the mesh of ranks. Parent and ranks derive the same plan from the same config,
so that the printed plan is the plan that runs.
This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from wanfast.runtime.config import EffectiveConfig, Options, parse_size
from wanfast.runtime.config.recipes import has_lossy_attention
from wanfast.runtime.facts.choices import Expert
from wanfast.runtime.facts.densities import Densities
from wanfast.runtime.facts.fp8_schedule import Fp8Schedule
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.facts.model_spec import ModelSpec
from wanfast.runtime.facts.shapes import Geometry, geometry_of
from wanfast.runtime.facts.sparsity import Sparsity
from wanfast.runtime.planning.job import Job
from wanfast.runtime.planning.skips import planned_skips
from wanfast.runtime.sampling.guidance import gate_steps, guided_steps
from wanfast.runtime.sampling.magcache import Ratios, ResidualCache, Skips
from wanfast.runtime.sampling.scheduler import Levels, Step, solve
from wanfast.runtime.store.curves import Curve, levels_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan describes completely what will run for one video."""

    config: EffectiveConfig
    requested: Options = field(default_factory=dict)  # the options that were given
    spec: ModelSpec
    geometry: Geometry
    levels: Levels
    schedule: tuple[Step, ...]
    experts: tuple[Expert, ...]  # of each step
    notes: tuple[str, ...] = ()
    placement: str = ""  # where the weights lie, and why
    curve: Curve | None = None  # decides which forwards are skipped
    densities: Densities | None = None  # of sparse attention, if a plan of attention gives them
    residuals_a_branch: int = 0  # held from step to step
    may_regroup: bool = True  # whether the ranks may share tokens otherwise in steps without guidance

    @classmethod
    def of(
        cls,
        config: EffectiveConfig,
        spec: ModelSpec,
        image_size: tuple[int, int],
        notes: tuple[str, ...] = (),
        placement: str = "",
        curve: Curve | None = None,
        densities: Densities | None = None,
    ) -> Plan:
        """Derives a plan from a config, a model and the (width, height) of the image.

        `config`: the options with all defaults filled in, as `completed.effective` returns them. `notes`, `placement`:
        texts that are shown to the user; nothing is derived from them. `curve`: MagCache's curve, or None without
        MagCache. `densities`: the densities that the file of --attention-plan gives, or None without this option.
        """
        video = config.video
        levels = levels_of(video)
        experts = tuple(levels.experts(spec.boundary, video.switch_step))
        return cls(
            config=config,
            spec=spec,
            geometry=geometry_of(
                spec, "crop" if video.continue_from else video.fit, parse_size(video.size), video.frames, image_size
            ),
            levels=levels,
            schedule=solve(video.solver, levels, experts.count("high_noise")),
            experts=experts,
            notes=notes,
            placement=placement,
            curve=curve,
            densities=densities,
            residuals_a_branch=0 if curve is None else 2 if _extrapolates(config) else 1,
        )

    def job(self) -> Job:
        """Returns the part of the plan that goes to the ranks; the ranks derive the rest of the plan from this part."""
        return Job(config=self.config, requested=dict(self.requested), notes=self.notes, placement=self.placement)

    @property
    def outputs(self) -> tuple[Path, ...]:
        return self.config.output.paths

    @property
    def mesh(self) -> Mesh:
        """Returns the mesh that the ranks of all machines form together."""
        return self.config.ranks.mesh

    @property
    def guidance(self) -> dict[Expert, float]:
        return {"high_noise": self.config.video.guidance_high_noise, "low_noise": self.config.video.guidance_low_noise}

    @property
    def joining_bytes(self) -> int:
        """Returns the size, in bytes of host memory, of the array that holds all frames of joined clips.

        A handle returns this array to its caller. The size is 0 if nothing is joined. The size is also 0 if the video
        is written to an .mp4, because then no array holds all frames.
        """
        video = self.config.video
        is_joined = video.continue_from or len(video.prompts) > 1
        if self.outputs or not is_joined:
            return 0
        return video.total_frames * self.geometry.height * self.geometry.width * 3

    @property
    def timesteps(self) -> dict[Expert, list[int]]:
        """Returns the timesteps of each expert, in the order of the steps."""
        split: dict[Expert, list[int]] = {"high_noise": [], "low_noise": []}
        for expert, step in zip(self.experts, self.schedule, strict=True):
            split[expert].append(step.timestep)
        return split

    @property
    def num_forwards(self) -> int:
        """Returns the number of forwards of all steps, including the skipped forwards.

        A step has two forwards if the negative prompt's branch runs, and otherwise one.
        """
        return sum(1 + both for both in self.guided)

    @cached_property
    def guided(self) -> list[bool]:
        """Returns for each step whether the negative prompt's branch runs."""
        return guided_steps(self.experts, self.guidance, self.config.video.guidance_gate)

    @property
    def unguided_mesh(self) -> Mesh:
        """Returns the mesh of the steps without guidance."""
        return self.mesh.unguided(self.spec.dit.num_heads) if self.may_regroup else self.mesh

    @property
    def regroups(self) -> bool:
        """Returns whether there are steps without guidance that run on another mesh than `mesh`."""
        return self.unguided_mesh != self.mesh and not all(self.guided)

    @property
    def always_computed(self) -> list[int]:
        """Returns the steps whose forwards are never skipped, whatever the curve and the settings of MagCache say.

        Steps count from 0. Two kinds of steps are never skipped:
        * the steps of distilled weights, because the curve has no ratios for them;
        * if the guidance of an expert stops early, its last step with guidance and its first step without guidance.
        """
        # Later steps reuse the difference of the two branches in the last step with guidance. The ranks regroup before
        # the first step without guidance, so the residuals that they hold do not fit this step.
        distilled = range(len(self.schedule) if self.curve is None else self.curve.num_steps, len(self.schedule))
        return [*gate_steps(self.experts, self.guided), *distilled]

    @property
    def is_joint(self) -> bool:
        """Returns whether both branches of guidance skip the same forwards.

        If each branch has its own ranks, a skip of only one branch saves no time: the ranks that skip wait for the
        ranks of the other branch.
        """
        return self.config.skipping is not None and self.config.skipping.magcache_joint == "on"

    @cached_property
    def skips(self) -> list[Skips]:
        """Returns for each step and branch whether MagCache skips the forward.

        Raises ConfigError if --magcache-budget or --magcache-skip cannot be met.
        """
        return self.skips_if(joint=self.is_joint)

    def skips_if(self, *, joint: bool) -> list[Skips]:
        """Returns the same as `skips`, but `joint` says whether both branches of guidance skip the same forwards.

        Raises ConfigError if --magcache-budget or --magcache-skip cannot be met.
        """
        if self.curve is None:
            return [(False, False)] * len(self.schedule)
        skipping = self.config.skipping
        assert skipping is not None
        return planned_skips(skipping, self.ratios, self.experts, self.guided, self.always_computed, joint=joint)

    @property
    def ratios(self) -> Ratios:
        """Returns the ratios of each step: first those of the curve, then (1, 1) for each later step.

        The later steps have distilled weights, and are never skipped. Without a curve, all ratios are 1.
        """
        known = () if self.curve is None else self.curve.ratios
        return (*known, *[(1.0, 1.0)] * (len(self.schedule) - len(known)))

    def residuals(self) -> ResidualCache:
        """Returns an empty cache for MagCache's residuals; it frees each residual after the last step that uses it."""
        alike = zip(self.experts, self.guided, strict=True)  # between unlike steps, the ranks may regroup
        levels = [(kind, step.sigma) for kind, step in zip(alike, self.schedule, strict=True)]
        return ResidualCache(self.skips, levels if _extrapolates(self.config) else None)

    def num_residuals(self, mesh: Mesh) -> int:
        """Returns the largest number of MagCache residuals that a rank of `mesh` holds at one time.

        A rank that computes both branches of guidance holds the residuals of both. With --magcache-extrapolate, the
        number includes the extrapolated residual, which exists for a short time.
        """
        held = self.residuals_a_branch * self._num_branches(mesh)
        return held + (1 if self.curve is not None and _extrapolates(self.config) else 0)

    @cached_property
    def sparsity(self) -> Sparsity | None:
        """Returns which calls of self-attention are sparse; None without --attention sparse.

        Raises ConfigError if all steps or all layers would be dense.
        """
        models, densities = self.config.models, self.densities
        if models.attention != "sparse":
            return None
        if densities is None:
            assert models.density is not None
            densities = Densities.uniform(models.density, self.spec.dit.num_layers, self.spec.dit.num_heads)
        return Sparsity.of(
            self.geometry.token_grid,
            densities=densities,
            num_steps=len(self.schedule),
            dense_share=models.dense_share,
            dense_layers=models.dense_layers,
            lists_every=models.lists_every,
            has_last=self.config.video.last_image is not None,
        )

    @cached_property
    def fp8(self) -> Fp8Schedule | None:
        """Returns which calls of self-attention are in float8; None without --attention fa3-fp8.

        If a recipe sets this kernel, all steps of a very short video are exact. Raises ConfigError if --fp8-steps,
        --fp8-layers or --fp8-hadamard does not fit the video or the model, or if no recipe sets this kernel and no step
        is left for float8.
        """
        models, dit = self.config.models, self.spec.dit
        if models.attention != "fa3-fp8":
            return None
        return Fp8Schedule.of(
            num_steps=len(self.schedule),
            num_layers=dit.num_layers,
            head_dim=dit.head_dim,
            steps=models.fp8_steps,
            layers=models.fp8_layers,
            hadamard=models.fp8_hadamard,
            may_be_empty=has_lossy_attention(models.recipe, models.attention),
        )

    def list_bytes(self, mesh: Mesh) -> int:
        """Returns how many bytes of block lists a rank of `mesh` holds, for all branches that this rank computes.

        The result is 0 without --attention sparse.
        """
        if self.sparsity is None:
            return 0
        return self._num_branches(mesh) * self.sparsity.list_bytes(mesh.ulysses)

    def _num_branches(self, mesh: Mesh) -> int:
        """Returns the largest number of branches of guidance that a rank of `mesh` computes in a step."""
        return 2 if any(self.guided) and mesh.cfg == 1 else 1


def _extrapolates(config: EffectiveConfig) -> bool:
    return config.skipping is not None and config.skipping.magcache_extrapolate
