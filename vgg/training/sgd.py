"""The update of the weights (arXiv 1409.1556 §3.1): momentum and weight decay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.sgd import sgd


class SGD:
    """Stochastic gradient descent, bit for bit the one of torch.optim.SGD(fused=True).

    That class loads torch.compile's tracer when it is made: 4 of the 10 seconds after which training starts on a CPU.
    momentum: the buffers of the parameters that were updated before, in their layout; saved in checkpoints.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], momentum: float, weight_decay: float, skip: torch.Tensor
    ) -> None:
        """skip: float32 (), on the parameters' device; while it is 1, updates do nothing."""
        self._parameters = list(parameters)
        self._factor, self._decay = momentum, weight_decay
        self._skip = skip
        self.momentum: dict[torch.Tensor, torch.Tensor] = {}

    def forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the parameters by their gradients.  The host does not wait for the device."""
        updated: list[torch.Tensor] = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in updated if parameter.grad is not None]
        buffers = [self.momentum.get(parameter) for parameter in updated] if self._factor else []
        sgd(
            updated, gradients, buffers, fused=True, found_inf=self._skip, lr=rate, momentum=self._factor,
            weight_decay=self._decay, dampening=0, nesterov=False, maximize=False,
        )  # fmt: skip
        for parameter, buffer in zip(updated, buffers, strict=False):  # buffers of a first step are made there
            assert buffer is not None
            self.momentum[parameter] = buffer
