"""Decides which line of a list a rank group of another machine makes, and which lost lines are tried again.

This module knows neither Ray nor torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MOST_TRIES = 3  # of a line: then the line, and not the machines, is at fault


class Lines:
    """This class holds the lines that nobody makes, and the machines that lost each line."""

    def __init__(self, models: Sequence[str]) -> None:
        """`models`: what each line loads. Lines with the same text share models."""
        self._models = models
        self._waiting = list(range(len(models)))
        self._tries: Counter[int] = Counter()
        self._lost_on: dict[int, set[str]] = {}

    @property
    def waiting(self) -> tuple[int, ...]:
        """Returns the lines that nobody makes."""
        return tuple(self._waiting)

    def models(self, line: int) -> str:
        """Returns what a line loads."""
        return self._models[line]

    def take(self, machine: str, loaded: str | None, machines: set[str]) -> int | None:
        """Returns the next line for a rank group of `machine`, which then makes it; None if there is none for it.

        A line whose models are `loaded` comes first. A line that this machine lost waits for another one of the
        `machines` that did not lose it, if there is one.
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
        """Lets a line that a machine lost wait again, before all others; returns False if it was its last try."""
        self._lost_on.setdefault(line, set()).add(machine)
        if self._tries[line] >= MOST_TRIES:
            return False
        self._waiting.insert(0, line)
        return True

    def drop(self) -> list[int]:
        """Returns all lines that wait, which nobody will make."""
        dropped, self._waiting = self._waiting, []
        return dropped
