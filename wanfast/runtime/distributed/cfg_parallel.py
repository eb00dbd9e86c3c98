"""Parallel guidance runs the prompt's branch on half of the ranks, and the negative prompt's branch on the other half.

The branches of one step do not depend on each other, so the halves exchange only the two velocities, after the forward.
Each velocity has 16 T h w float32 values: 19 MB for a video of 1280x720 and 81 frames. A step without guidance has only
one branch, and all ranks share its tokens (`Ranks.unguided`). This works only if the number of attention heads is a
multiple of the number of ranks. Otherwise both halves compute the same forward in such a step.
Source: classifier-free guidance (arXiv 2207.12598); the split is that of xDiT (arXiv 2411.01738) section 4.1.3.

Shapes: B batch, C latent channels, T/h/w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from wanfast.runtime.distributed.collectives import all_gather
from wanfast.runtime.facts.choices import Branch


class BothBranches:
    """This class runs guidance with --cfg-parallel 1: each rank computes all branches, one after the other."""

    def own(self, branches: Sequence[Branch]) -> list[Branch]:
        return list(branches)

    def velocities(self, branches: Sequence[Branch], velocity: Callable[[Branch], Tensor]) -> list[Tensor]:
        """Returns one velocity [B, C, T, h, w] per branch, in the order of `branches`."""
        return [velocity(branch) for branch in branches]


@dataclass(frozen=True)
class CfgParallel:
    """This class runs guidance on the two ranks of a process group: each rank computes one of the two branches."""

    group: dist.ProcessGroup

    def own(self, branches: Sequence[Branch]) -> list[Branch]:
        """Returns a list with the one branch that this rank computes."""
        return [branches[self.group.rank() % len(branches)]]

    def velocities(self, branches: Sequence[Branch], velocity: Callable[[Branch], Tensor]) -> list[Tensor]:
        """Returns one velocity [B, C, T, h, w] per branch, in the order of `branches`.

        Both ranks of the process group get all velocities.
        """
        (branch,) = self.own(branches)
        own = velocity(branch)
        if len(branches) == 1:
            return [own]
        return list(all_gather(own, self.group))
