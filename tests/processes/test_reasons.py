"""Tests how a rank tells a timeout from a bug: by where the error comes from and how long the rank was silent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from tests.configs import effective_config
from tests.on_ranks import on_ranks
from wanfast.runtime.distributed.ranks import Ranks
from wanfast.runtime.errors import CorruptArtifactError
from wanfast.runtime.facts.mesh import Mesh
from wanfast.runtime.processes.failures import error_of_group
from wanfast.runtime.processes.worker import _error_document


def kind_of(error: BaseException, silent_s: float) -> str:
    kind: str = _error_document(error, silent_s, 10.0)["kind"]
    return kind


def test_words_do_not_make_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's time limit has nothing to do with ranks."""
    monkeypatch.setenv("RANK", "0")
    error = RuntimeError("the kernel's compilation timed out: timeout of 60 s")
    assert kind_of(error, 100) == "bug"
    try:
        raise error
    except RuntimeError as raised:
        assert kind_of(raised, 100) == "bug"


def test_other_errors_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert kind_of(CorruptArtifactError("timeout"), 100) == kind_of(torch.OutOfMemoryError("x"), 100) == "user"
    assert kind_of(TimeoutError("timed out"), 100) == "bug"


def test_a_bug_between_exchanges_is_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks do most of their work inside `Ranks.together`, a function of a module of exchanges."""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        Ranks("cpu").together(lambda: torch.nn.functional.linear(torch.ones(4, 2), torch.ones(5, 3)))
    assert kind_of(error.value, 100) == "bug"


def test_an_exchange_waits_as_long_as_asked_and_one_that_failed_late_waited_for_a_peer() -> None:
    def work(ranks: Ranks) -> tuple[str, str, float]:
        if ranks.rank == 1:
            time.sleep(4)
            return "", "", 0.0
        began = time.monotonic()
        with pytest.raises(RuntimeError) as error:
            ranks.gather(None)
        return kind_of(error.value, 10), kind_of(error.value, 1), time.monotonic() - began

    late, early, seconds = on_ranks(Mesh(cfg=2), work, timeout_s=1)[0]
    assert (late, early) == ("timeout", "exchange") and seconds < 3


@pytest.mark.parametrize(
    ("kind", "killed", "said"),
    [
        ("exchange", True, "the launcher of rank group 0 failed"),
        ("bug", True, "rank 0 failed: boom"),
        ("exchange", False, "rank 0 failed: boom"),
    ],
)
def test_a_launcher_that_is_killed_is_the_cause_of_lost_connections(
    tmp_path: Path, kind: str, killed: bool, said: str
) -> None:
    """A launcher that is killed writes nothing, and a rank may see its lost connection before it is ended too."""
    (tmp_path / "ranks/0-0").mkdir(parents=True)
    document = {"rank": 0, "time": time.time_ns(), "kind": kind, "error": "boom"}
    (tmp_path / "ranks/0-0/error.json").write_text(json.dumps(document))
    if not killed:
        failed = {"exit_codes": {"0": 1}, "seconds": {"0": time.time()}, "stopped": []}
        (tmp_path / "ranks/0.json").write_text(json.dumps(failed))
    assert said in str(error_of_group(tmp_path, 0, effective_config().ranks)[1])
