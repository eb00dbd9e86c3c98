"""Tests how a video is shortened for a warm-up of the server, and for a measurement of `wanfast bench`."""

from __future__ import annotations

from wanfast.runtime.config import NO_VIDEO, EffectiveConfig
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.planning.shortened import few_steps, least_steps, schedule_of


def test_a_video_of_few_steps_skips_nothing() -> None:
    assert few_steps({"steps": 9, "seed": 1, "magcache_k": 2}, {"steps": 3}) == {
        "steps": 3,
        "seed": 1,
        "magcache": "off",
    }


def test_a_list_of_noise_levels_becomes_shorter_with_both_experts() -> None:
    video = EffectiveConfig.of({**NO_VIDEO, "recipe": "hybrid"}, A14B).video
    assert least_steps(video, A14B) == 2
    assert schedule_of(video, A14B, 2) == {"sigmas": "0.999799842,0.25", "switch_step": 1}
    fewer = schedule_of(video, A14B, 6)
    assert (fewer["sigmas"].count(","), fewer["switch_step"]) == (5, 5)
    assert schedule_of(video, A14B, 18) == {"sigmas": video.sigmas, "switch_step": 15}
    plain = EffectiveConfig.of({**NO_VIDEO, "steps": 9}, A14B).video
    assert schedule_of(plain, A14B, 3) == {"steps": 3}
