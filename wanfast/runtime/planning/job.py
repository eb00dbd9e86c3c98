"""A job is the part of a plan that the parent sends to the ranks, as JSON.

This module does not import torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from wanfast.runtime.config import EffectiveConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job is one planned video in the form that the parent sends to the ranks."""

    config: EffectiveConfig
    requested: dict[str, Any]  # the options that were given
    notes: tuple[str, ...] = ()
    placement: str = ""
    image_size: tuple[int, int] = (0, 0)  # (width, height) for a warmup, which reads no image

    def clips(self) -> list[Job]:
        """Returns a job for each clip of the video, in order."""
        configs = [dataclasses.replace(self.config, video=video) for video in self.config.video.clips()]
        return [dataclasses.replace(self, config=config) for config in configs]

    def to_json(self) -> dict[str, Any]:
        return {
            "requested": self.requested,
            "effective": self.config.to_json(),
            "notes": list(self.notes),
            "placement": self.placement,
            "image_size": list(self.image_size),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Job:
        """Makes a job from the JSON that `to_json` returned. Raises ConfigError if an option has a wrong value."""
        return cls(
            config=EffectiveConfig.from_json(document["effective"]),
            requested=document["requested"],
            notes=tuple(document["notes"]),
            placement=document["placement"],
            image_size=tuple(document["image_size"]),
        )
