"""Tests videos of the server that are longer than a clip of the model: what is planned, joined, shown and refused."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import av
import pytest

from tests.server.running import SMALL, STAR, data_url, running, until
from wanfast.runtime.errors import ConfigError
from wanfast.runtime.facts.model_spec import A14B
from wanfast.runtime.planning.placement import FreeMemory
from wanfast.runtime.processes.handle import Opened
from wanfast.server.checks import Served

PUBLISHED_LENGTH = {**SMALL, "frames": 81}  # at 16 frames a second


@pytest.mark.parametrize(
    ("seconds", "clips", "frames", "total"),
    [("4", 1, 65, 65), ("5", 1, 81, 81), ("8", 2, 65, 129), ("12", 3, 65, 193), ("11", 3, 61, 181)],
)
def test_seconds_are_joined_clips(tmp_path: Path, seconds: str, clips: int, frames: int, total: int) -> None:
    """The API's values give exactly 4 x round(seconds x fps / 4) + 1 frames; others are rounded in each clip."""
    with running(tmp_path, options=PUBLISHED_LENGTH) as server:
        video = server.ended(server.create(seconds=seconds, seed=5))
        assert (video["status"], video["seconds"], video["prompt"]) == ("completed", seconds, "a star"), video
        plan = video["plan"]
        assert (plan["clips"], plan["frames"], plan["total_frames"]) == (clips, frames, total)
        assert plan["joining_bytes"] == (total * 64 * 64 * 3 if clips > 1 else 0)
        made = server.maker.made[-1]
        assert made["prompt"] == (["a star"] * clips if clips > 1 else "a star") and made["frames"] == frames
        assert server.metric('wanfast_forwards_total{kind="computed"}') == 6 * clips
        with av.open(io.BytesIO(server.ask("GET", f"/v1/videos/{video['id']}/content").body)) as container:
            assert sum(1 for _ in container.decode(video=0)) == total
        settings = video["settings"]
        assert settings.get("seconds") == (seconds if clips > 1 else None)
        assert settings.get("num_frames") == (None if clips > 1 else frames)
        again = {name: value for name, value in settings.items() if name in ("seconds", "num_frames", "prompt", "seed")}
        assert server.ended(server.create(**again))["plan"] == plan


def test_the_progress_is_of_all_clips_and_a_cancel_ends_them(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.maker.step_s = 0.1
        video = server.create(seconds="0.75")
        until(lambda: server.show(video)["stage"] == "clip 2 of 3, high noise")
        server.maker.holds.set()
        until(lambda: 31 <= server.show(video)["progress"] <= 63)
        assert server.ask("POST", f"/v1/videos/{video}/cancel").status == 200
        assert server.ended(video)["error"]["code"] == "cancelled"
        server.maker.holds.clear()
        assert server.ended(server.create())["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seconds": "1"}, "seconds: one video has at most 13 frames on this server (0.8125 seconds at 16 frames per "
         "second)"),
        ({"num_frames": 9}, "num_frames: one clip has at most 5 frames on this server (0.3125 seconds at 16 frames per "
         "second); a longer video has several clips: give seconds instead"),
        ({"seconds": "0.75", "seed": 4294967294}, "seed: this video has 3 clips, and each clip adds 1 to the seed: "
         "use at most 4294967293"),
        ({"recipe": "first-last-4"}, "last_image: is missing: the recipe first-last-4 makes videos between two "
         "images"),
        ({"last_image": data_url(STAR.read_bytes()), "seconds": "0.5"}, "last_image: a video with a last image has a "
         "single clip, of at most 5 frames on this server (0.3125 seconds at 16 frames per second): ask for fewer "
         "seconds"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_names_its_field(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with running(tmp_path) as server:
        given = {"prompt": "a", "input_reference": data_url(STAR.read_bytes()), **fields}
        answer = server.ask("POST", "/v1/videos", **given)
        assert (answer.status, answer.error["message"]) == (400, words)
        assert answer.error["param"] == words.partition(":")[0]


def test_clips_that_the_host_cannot_join_name_the_field_that_gives_them(tmp_path: Path) -> None:
    """The memory may be too small when the video is asked for, or only when it is made."""
    words = (
        r"seconds: joining 13 frames needs [\d.]+ kB of host memory, but only [\d.]+ kB are free: ask for fewer sec.*"
    )
    with running(tmp_path) as server:
        server.maker.holds.set()
        first, long = server.create(), server.create(seconds="0.75")
        object.__setattr__(server.maker.opened, "free_memory", FreeMemory(1 << 40, "free", 1000))
        given = {"prompt": "a", "input_reference": data_url(STAR.read_bytes())}
        refused = server.ask("POST", "/v1/videos", **given, seconds="0.75")
        assert (refused.status, refused.error["param"]) == (400, "seconds")
        assert re.fullmatch(words, refused.error["message"]), refused.error
        server.maker.holds.clear()
        assert server.ended(first)["status"] == "completed"  # a single clip is not joined
        error = server.ended(long)["error"]
        assert error["code"] == "invalid_video" and re.fullmatch(words, error["message"]), error


def test_clips_are_no_longer_than_the_model_was_trained_for() -> None:
    """A server may have longer videos by default; its disk needs room for these."""
    planner: Any = None  # is not asked
    served = Served(planner, A14B, "a14b", (64, 64), frames=121, clips=3)
    assert (served.most_frames, served.joined_frames, served.total_frames) == (81, 241, 241)
    assert dataclasses.replace(served, clips=1).total_frames == 121


def test_an_operator_may_allow_single_clips_only(tmp_path: Path) -> None:
    with running(tmp_path, max_clips=1) as server:
        given = {"prompt": "a", "input_reference": data_url(STAR.read_bytes()), "seconds": "0.75"}
        answer = server.ask("POST", "/v1/videos", **given)
        assert answer.error["message"] == (
            "seconds: one video has at most 5 frames on this server (0.3125 seconds at 16 frames per second)"
        )


@pytest.mark.parametrize(
    ("model", "frames", "fps", "seconds"),
    [("tiny", 17, 16, 193 / 16), ("tiny", 5, 24, 289 / 24), ("tiny", 1, 16, 1 / 16), ("text", 5, 16, 5 / 16)],
)
def test_the_default_allows_12_seconds(
    tmp_path: Path, small_text_model: Path, model: str, frames: int, fps: int, seconds: float
) -> None:
    """They are the longest that clients ask for. A model without images, or with clips of one frame, has one clip."""
    opened = Opened.of({**SMALL, "frames": frames} | ({"model": str(small_text_model)} if model == "text" else {}))
    served = Served.of(opened, {"fps": fps}, None)
    assert served.joined_frames / fps == seconds
    if served.clips == 1:
        assert Served.of(opened, {}, 1) == dataclasses.replace(served, defaults={})
        with pytest.raises(ConfigError, match=r"--max-clips 7: every video has one clip, because .*: drop --max-clips"):
            Served.of(opened, {}, 7)
