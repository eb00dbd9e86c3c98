"""Tests which line a machine gets, and what happens to lines that machines lose."""

from __future__ import annotations

from wanfast.runtime.processes.lines import MOST_TRIES, Lines

BOTH = {"a", "b"}


def test_lines_are_taken_in_order_but_loaded_models_first() -> None:
    lines = Lines(["tiny", "tiny", "large", "large"])
    assert lines.take("a", None, BOTH) == 0
    assert lines.take("b", "large", BOTH) == 2
    assert lines.take("a", "tiny", BOTH) == 1
    assert lines.take("a", "tiny", BOTH) == 3  # none of its models is left
    assert lines.take("b", "large", BOTH) is None


def test_a_lost_line_goes_to_another_machine_and_comes_first() -> None:
    lines = Lines(["tiny"] * 3)
    assert lines.take("a", None, BOTH) == 0
    assert lines.lose(0, "a")
    assert lines.waiting == (0, 1, 2)
    assert lines.take("a", None, BOTH) == 1
    assert lines.take("b", None, BOTH) == 0


def test_a_line_that_all_machines_lost_is_tried_again_by_any() -> None:
    lines = Lines(["tiny"])
    for machine in ("a", "b"):
        assert lines.take(machine, None, BOTH) == 0
        assert lines.lose(0, machine)
        assert lines.take("a", None, {*BOTH, "c"}) is None  # c may succeed
    assert lines.take("a", None, {"a"}) == 0  # c is gone too


def test_a_line_is_given_up_after_its_last_try() -> None:
    lines = Lines(["tiny", "tiny"])
    kept = []
    for _ in range(MOST_TRIES):
        assert lines.take("a", None, {"a"}) == 0
        kept.append(lines.lose(0, "a"))
    assert kept == [True] * (MOST_TRIES - 1) + [False]
    assert lines.drop() == [1] and lines.waiting == ()
