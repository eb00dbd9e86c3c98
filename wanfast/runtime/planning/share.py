"""Says which jobs of a batch one rank group does. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A rank group does the jobs that it claims: first its own ones, then those that the other groups left.

    `claim(job)` returns whether this group gets the job; all ranks of the group call it together.
    """

    place: int = 0
    groups: int = 1
    claim: Callable[[int], bool] = lambda index: True

    def own(self, jobs: Sequence[int]) -> list[int]:
        """Returns every n-th job, where n groups share them."""
        return list(jobs[self.place :: self.groups])

    def claimed(self, jobs: Sequence[int]) -> Iterator[int]:
        """Yields each job when it is claimed."""
        own = dict.fromkeys(self.own(jobs))
        return filter(self.claim, [*own, *(job for job in jobs if job not in own)])
