"""Tests which jobs a rank group does, and whose prompts it encodes."""

from __future__ import annotations

import itertools
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.engine.session import Session
from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.jobs.loop import run_jobs
from wanfast.runtime.planning.share import Share


def test_a_group_does_its_own_jobs_first_and_then_those_that_are_left() -> None:
    taken = {3}
    share = Share(1, 2, lambda job: job not in taken and not taken.add(job))
    assert list(share.claimed([0, 1, 2, 3, 4, 5])) == [1, 5, 0, 2, 4]
    assert list(share.claimed([0, 1, 2, 3, 4, 5])) == []


def alike(count: int) -> list[Any]:
    """Returns jobs that share models."""
    videos = [SimpleNamespace(texts=[(f"{n}", "")]) for n in range(count)]
    models = namedtuple("Models", "model precision")("alike", "bf16")
    return [SimpleNamespace(config=SimpleNamespace(models=models, video=video)) for video in videos]


def test_a_group_encodes_the_prompts_of_its_own_jobs() -> None:
    """With four groups, each would otherwise encode all prompts of the list."""
    encoded: list[str] = []
    session = session_that(encode=lambda clips: encoded.extend(itertools.chain.from_iterable(clips)))
    sessions: Any = SimpleNamespace(of=lambda config: session, ranks=None)
    done = run_jobs(lambda index, *_: {"index": index}, alike(8), sessions, Share(1, 4), lambda *state: None)
    assert sorted(index for index, _ in done) == list(range(8))
    assert set(encoded) == {"1", "5", ""}


def test_a_group_claims_a_job_when_the_job_before_is_done() -> None:
    """Another group may be faster, or this group may die."""
    claims: list[int] = []
    share = Share(claim=lambda index: not claims.append(index))
    sessions: Any = SimpleNamespace(of=lambda config: session_that(), ranks=None)
    done = run_jobs(lambda *_: {}, alike(3), sessions, share, lambda *state: None)
    assert [(next(done)[0], list(claims)) for _ in range(3)] == [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])]


@pytest.mark.parametrize(
    ("bad_tries", "failed"), [(0, 0), (1, 1), (2, 2), (3, 6)], ids=["none", "one", "two", "three, the most"]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), CorruptArtifactError("vae.pth: is damaged")])
@pytest.mark.parametrize("step", ["encode", "load"])
def test_each_try_to_load_that_fails_costs_one_job(bad_tries: int, failed: int, error: Exception, step: str) -> None:
    tries, closed = itertools.count(1), []

    def fails(*arguments: object) -> None:
        if next(tries) <= bad_tries:
            raise error

    session = session_that(**{step: fails})
    sessions: Any = SimpleNamespace(
        of=lambda config: session, ranks=Ranks("cpu"), are_loaded=False, close=lambda: closed.append(1)
    )
    results = dict(run_jobs(lambda *_: {}, alike(6), sessions, Share(), lambda *state: None))
    assert ["error" in results[index] for index in range(6)] == [True] * failed + [False] * (6 - failed)
    assert len(closed) == bad_tries and next(tries) == bad_tries + 1 + (failed < 6)


def session_that(**methods: Any) -> Session:
    session = Session.__new__(Session)
    defaults = {"encode": lambda texts: None, "load": lambda before_each: None, "forget_seconds": lambda: None}
    vars(session).update(defaults | methods)
    return session
