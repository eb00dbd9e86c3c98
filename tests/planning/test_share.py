"""Tests which jobs a rank group does, and whose prompts it encodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from wanfast.runtime.jobs.loop import run_jobs
from wanfast.runtime.planning.share import Share


def test_a_group_does_its_own_jobs_first_and_then_those_that_are_left() -> None:
    taken = {3}
    share = Share(1, 2, lambda job: job not in taken and not taken.add(job))
    assert list(share.claimed([0, 1, 2, 3, 4, 5])) == [1, 5, 0, 2, 4]
    assert list(share.claimed([0, 1, 2, 3, 4, 5])) == []


def test_a_group_encodes_the_prompts_of_its_own_jobs() -> None:
    """With four groups, each would otherwise encode all prompts of the list."""
    encoded: list[str] = []
    session = SimpleNamespace(
        encode=lambda texts: encoded.extend(texts), load=lambda before_each: None, forget_seconds=lambda: None
    )
    jobs: list[Any] = [
        SimpleNamespace(
            config=SimpleNamespace(models="alike", video=SimpleNamespace(prompt=f"{n}", negative_prompt=""))
        )
        for n in range(8)
    ]
    sessions: Any = SimpleNamespace(of=lambda config: session, ranks=None)
    done = run_jobs(lambda index, *_: {"index": index}, jobs, sessions, Share(1, 4), lambda *state: None)
    assert sorted(index for index, _ in done) == list(range(8))
    assert set(encoded) == {"1", "5", ""}
