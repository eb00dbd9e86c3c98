"""Decides which rank group of a cluster makes which line of a list, and which lines are tried again.

A line is tried again if a machine failed while it made the line.

This module imports neither Ray nor torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MOST_TRIES = 3  # of a line: then the line, and not the machines, is at fault


class Lines:
    """This class holds the lines that wait for a machine, and records which machines failed while they made a line."""

    def __init__(self, models: Sequence[str]) -> None:
        """`models`: what each line loads. Lines with the same text share models."""
        self._models = models
        self._waiting = list(range(len(models)))
        self._tries: Counter[int] = Counter()
        self._lost_on: dict[int, set[str]] = {}

    @property
    def waiting(self) -> tuple[int, ...]:
        """Returns the lines that wait for a machine."""
        return tuple(self._waiting)

    def models(self, line: int) -> str:
        """Returns a text that identifies the models of a line of the list; lines with equal texts share models."""
        return self._models[line]

    def take(self, machine: str, loaded: str | None, machines: set[str]) -> int | None:
        """Returns the line that a rank group of `machine` makes next, or None if no line waits for this machine.

        `loaded`: the models that the rank group holds; a line with these models comes first. `machines`: all machines
        that can make lines. A machine that failed while it made a line gets this line again only if all `machines`
        have failed with this line.
        """
        may = [
            line
            for line in self._waiting
            if machine not in (lost := self._lost_on.get(line, set())) or lost >= machines
        ]
        if not may:
            return None
        line = next((line for line in may if self._models[line] == loaded), may[0])
        self._waiting.remove(line)
        self._tries[line] += 1
        return line

    def lose(self, line: int, machine: str) -> bool:
        """Records that `machine` failed while it made a line, and returns whether the line is tried again.

        A line is tried at most `MOST_TRIES` times. If the line is tried again, it becomes the first waiting line.
        """
        self._lost_on.setdefault(line, set()).add(machine)
        if self._tries[line] >= MOST_TRIES:
            return False
        self._waiting.insert(0, line)
        return True

    def drop(self) -> list[int]:
        """Removes all lines that wait for a machine, and returns these lines; no machine will make them."""
        dropped, self._waiting = self._waiting, []
        return dropped
