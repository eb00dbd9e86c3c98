"""Decides which jobs of a batch a rank group does.

This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# A list tries this often to load the same models, and each failed try costs a job. Then the models, and not a job or a
# moment's lack of memory, are at fault, and the list's other jobs with these models fail too.
MOST_LOADS = 3


@dataclass(frozen=True)
class Share:
    """This class decides which jobs a rank group claims: first its own jobs, then jobs that no group has claimed yet.

    `place` is the number of this group, from 0, and `groups` the number of groups. `claim(job)` returns whether this
    group gets the job; all ranks of the group call `claim` together.
    """

    place: int = 0
    groups: int = 1
    claim: Callable[[int], bool] = lambda index: True

    def own(self, jobs: Sequence[int]) -> list[int]:
        """Returns this rank group's own jobs: the job at index `place` of `jobs`, and then every n-th job.

        n is the number of rank groups.
        """
        return list(jobs[self.place :: self.groups])

    def claimed(self, jobs: Sequence[int]) -> Iterator[int]:
        """Claims the jobs one by one, and yields each job that this rank group gets.

        The group's own jobs come first.
        """
        own = dict.fromkeys(self.own(jobs))
        return filter(self.claim, [*own, *(job for job in jobs if job not in own)])
