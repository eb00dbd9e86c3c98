"""Tests the solvers against diffusers, step by step, on the reference's noise levels; and the published timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.parity import relative_error
from wanfast.runtime.facts.choices import Solver
from wanfast.runtime.sampling.scheduler import Integrator, Levels, grid, solve

SHIFT = 5.0


def diffusers_scheduler(solver: Solver, num_steps: int) -> Any:
    """Returns diffusers' solver on the reference's grid; diffusers applies the shift."""
    start = 1.0 if solver == "dpm++" else float(np.float32(0.999))
    levels = np.linspace(start, 0, num_steps + 1)[:-1]
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        scheduler.set_timesteps(sigmas=levels)
        return scheduler
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(**flow)
        scheduler.set_timesteps(sigmas=levels)
        return scheduler
    scheduler = DPMSolverMultistepScheduler(**flow)  # it accepts no noise levels, so they are set afterwards
    scheduler.set_timesteps(num_steps)
    shifted = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    scheduler.sigmas = torch.from_numpy(np.append(shifted, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy(np.trunc(shifted * 1000).astype(np.int64))
    return scheduler


@pytest.mark.parametrize("num_steps", [1, 2, 4, 20, 40])
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_every_step_equals_diffusers(solver: Solver, num_steps: int) -> None:
    reference = diffusers_scheduler(solver, num_steps)
    steps = solve(solver, grid(solver, num_steps, SHIFT), num_steps)
    integrator = Integrator(steps)
    generator = torch.Generator().manual_seed(num_steps)
    expected = got = torch.randn(1, 16, 3, 4, 6, generator=generator)
    worst = 0.0
    for timestep in reference.timesteps:
        velocity = torch.randn(got.shape, generator=generator)
        expected = reference.step(velocity, timestep, expected, return_dict=False)[0]
        got = integrator.advance(got, velocity)
        worst = max(worst, relative_error(got, expected))
    print(f"{solver}, {num_steps} steps: worst relative error of a step {worst:.1e}")
    assert worst <= 2e-5
    if solver == "unipc":
        assert [step.timestep for step in steps] == reference.timesteps.tolist()
        assert [step.sigma for step in steps] == reference.sigmas[:-1].tolist()


@pytest.mark.parametrize(
    ("num_steps", "shift", "high_and_low"),
    [(40, 5.0, (15, 25)), (40, 3.0, (10, 30)), (50, 5.0, (18, 32)), (20, 5.0, (8, 12)), (4, 5.0, (2, 2))],
)
def test_steps_of_each_expert(num_steps: int, shift: float, high_and_low: tuple[int, int]) -> None:
    experts = grid("unipc", num_steps, shift).experts(0.9)
    assert (experts.count("high_noise"), experts.count("low_noise")) == high_and_low


def test_the_boundary_itself_is_high_noise() -> None:
    assert Levels((0.9, 0.899, 0.0), (900, 899)).experts(0.9) == ["high_noise", "low_noise"]


def test_timesteps_of_the_reference() -> None:
    unipc = grid("unipc", 40, 5.0).timesteps
    assert unipc[:16] == (999, 994, 989, 983, 978, 972, 965, 959, 952, 944, 937, 929, 920, 911, 902, 892)
    assert unipc[-4:] == (356, 288, 208, 113)
    assert grid("unipc", 4, 5.0).timesteps == (999, 937, 833, 624)
    dpm = grid("dpm++", 40, 5.0).timesteps
    assert dpm[:16] == (1000, 994, 989, 984, 978, 972, 965, 959, 952, 945, 937, 929, 921, 912, 902, 892)
    assert grid("euler", 40, 5.0).timesteps == unipc


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_straight_flow_is_followed_exactly(solver: Solver) -> None:
    """With a constant velocity every solver must reach the clean sample: x0 = x - sigma v."""
    steps = solve(solver, grid(solver, 7, SHIFT), 7)
    integrator = Integrator(steps)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    sample = (1 - steps[0].sigma) * clean + steps[0].sigma * noise
    for _ in steps:
        sample = integrator.advance(sample, noise - clean)
    assert relative_error(sample, clean) < 1e-12
