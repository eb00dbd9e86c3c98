"""Tests the benchmark of lossy attention: its predictions, its time limit, an interruption, and ranks."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

import pytest

from tests.bench.results import program

lossy: Any = program("lossy")
OPTIONS = Namespace(size="192x192", frames=17, density=0.5, layers=4, device="cpu", tiny=True, hadamard=None)


def document(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *options: str, code: int | None = None
) -> Any:
    monkeypatch.setattr(sys, "argv", ["lossy.py", "--tiny", "--device", "cpu", "--error-layers", "0", *options])
    if code is None:
        lossy.main()
    else:
        with pytest.raises(SystemExit) as ended:
            lossy.main()
        assert ended.value.code == code
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_guards_cost_what_their_calls_cost() -> None:
    """Ten of forty steps and one of four layers are exact; lists are made in each fourth step of an expert."""
    spec = lossy._spec(OPTIONS)
    plans = {"sparse": [lossy.plan_of(OPTIONS, spec, "sparse", guarded=guarded) for guarded in (True, False)]}
    guarded, bare = plans["sparse"]
    high = guarded.experts.count("high_noise")
    assert (guarded.sparsity.dense_steps, guarded.sparsity.dense_layers, len(guarded.experts)) == (10, 1, 40)
    with_lists = [len(range(first, last, 4)) for first, last in ((10, high), (high, 40))]
    rows = {"bf16, compiled": {"ms": 1000.0}, "bf16 linears, exact": {"ms": 1000.0}}
    rows |= {"bf16 linears, sparse": {"ms": 400.0}, "bf16 linears, sparse, lists made": {"ms": 420.0}}
    (found,) = lossy.guards(rows, plans).values()
    share = 30 / 40 * 3 / 4
    expected = 1000 - share * 600 + 20 * sum(with_lists) / 40 * 3 / 4
    assert found["lossy_calls"] == round(share, 4)
    assert found["with_guards_s"] == pytest.approx(expected / 1e3, abs=1e-4)
    assert found["without_guards_s"] == pytest.approx((400 + 20 * lossy._lists_share(bare)) / 1e3, abs=1e-4)
    assert found["cost"] == pytest.approx(found["with_guards_s"] / found["without_guards_s"] - 1, abs=1e-3)


def test_no_forward_begins_after_the_time(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lossy.forward, "warm", lambda *way: None)
    monkeypatch.setattr(lossy.Tried, "sampled", lambda tried: {})
    found = document(monkeypatch, capfd, "--within", "0")
    assert list(found["ways"]) == ["bf16, compiled"] and found["ways"]["bf16, compiled"]["rounds"] == 1
    assert found["guards"] == {} and not found["interrupted"]


def test_an_interrupted_run_prints_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lossy.forward, "warm", lambda *way: None)
    timed, ways = lossy.forward.timed, []

    def until_the_third(way: Any, *others: Any) -> None:
        ways.append(way.name)
        if len(ways) == 3:
            raise KeyboardInterrupt
        timed(way, *others)

    monkeypatch.setattr(lossy.forward, "timed", until_the_third)
    found = document(monkeypatch, capfd, code=130)
    assert found["interrupted"] and list(found["ways"]) == ways[:2]
    assert found["shares"] == {} and found["commit"] and found["hardware"]


def test_ranks_share_a_step(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    found = document(monkeypatch, capfd, "--ranks", "2", "--rounds", "1")
    assert found["ranks"] == 2 and list(found["steps"]) == ["one", "cfg 2, ulysses 1"]
    assert found["relative_difference"] <= 1e-6
    one, shared = (row["seconds"] for row in found["steps"].values())
    assert found["efficiency"] == pytest.approx(one / (2 * shared), abs=0.05)
