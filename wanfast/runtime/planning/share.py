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
    """This class decides in which order a rank group claims the jobs of a batch: first its own jobs, then all others.

    The groups own the jobs in turn. For example, of 4 jobs and 2 groups, group 0 owns jobs 0 and 2. If several groups
    claim the same job, the first of them gets the job, even if another group owns the job.
    `place`: the number of this group, from 0. `groups`: the number of groups. `claim`: a function that claims a job,
    and returns whether this group gets the job. All ranks of the group call `claim` together.
    """

    place: int = 0
    groups: int = 1
    claim: Callable[[int], bool] = lambda index: True

    def own(self, jobs: Sequence[int]) -> list[int]:
        """Returns this rank group's own jobs: those of `jobs` at the indices `place`, `place` + `groups`, and so on."""
        return list(jobs[self.place :: self.groups])

    def claimed(self, jobs: Sequence[int]) -> Iterator[int]:
        """Claims the jobs one by one, and yields each job that this rank group gets.

        The group's own jobs come first.
        """
        own = dict.fromkeys(self.own(jobs))
        return filter(self.claim, [*own, *(job for job in jobs if job not in own)])
