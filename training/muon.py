"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

A convolution counts as a matrix with one row for each output channel. torch's own Muon takes only parameters of two
dimensions, and updates one parameter after the other. This Muon updates all matrices of one shape together, because
kernel launches limit the speed of networks this small.
"""

from __future__ import annotations

from collections import defaultdict
from typing import cast

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that moves singular values towards one, from the source
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Moves each matrix by `rate` times the orthogonalised momentum of its gradients.

    For a matrix with more rows than columns, the move is also multiplied by sqrt(rows / columns). Before the move, the
    matrix is multiplied by 1 - `rate` * `weight_decay`. Without weight decay, matrices grow as long as the rate is
    constant, so that each later step changes them less.
    `rate` is a tensor, so that a captured CUDA graph of `step` reads the present value of the rate.
    """

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {})
        self.weight_decay = weight_decay
        self.rate = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for shape, parameters in self._shapes().items():
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1 - self.rate * self.weight_decay)
            scale = max(1.0, shape[0] / shape[1:].numel()) ** 0.5  # so that outputs change alike in all shapes
            moves = orthogonal(self._directions(parameters)) * (self.rate * -scale)
            torch._foreach_add_(parameters, [move.view(shape) for move in moves])

    @torch.no_grad()
    def rehearse(self) -> None:
        """Runs the matrix products of a step on zeros, to initialise their library; parameters stay unchanged."""
        for shape, parameters in self._shapes().items():
            orthogonal(self.rate.new_zeros(len(parameters), shape[0], shape[1:].numel()))

    def _shapes(self) -> dict[torch.Size, list[nn.Parameter]]:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.param_groups[0]["params"]:
            shapes[parameter.shape].append(parameter)
        return shapes

    def _directions(self, parameters: list[nn.Parameter]) -> Tensor:
        """Returns the matrices [N, rows, columns] of the gradients with momentum (Nesterov's)."""
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, _MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=_MOMENTUM)
        return torch.stack([direction.flatten(1) for direction in ahead])


def orthogonal(matrices: Tensor) -> Tensor:
    """Returns approximately U V^T for each matrix U S V^T of `matrices` [N, rows, columns].

    The singular values of the result lie between about 0.7 and 1.2, instead of exactly 1.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT
