"""Moving average of weights: what is deployed is smoother than where the last step happened to land.

Source: Polyak and Juditsky 1992; as an exponential average Tarvainen and Valpola 2017.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """avg ← d·avg + (1 − d)·now, for every parameter and statistic; d rises to `decay` from 0 (min with (1+n)/(10+n)).

    The rise keeps the first steps, which are far from the end, out of short runs.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.held = {key: tensor.clone() for key, tensor in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        return {key: t.detach() for key, t in self.module.state_dict().items() if t.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in what the module holds."""
        self.steps += 1
        now = self._now()
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_([self.held[key] for key in now], list(now.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module holds the average for a while."""
        now = {key: tensor.clone() for key, tensor in self._now().items()}
        self.put(self.held)
        try:
            yield
        finally:
            self.put(now)

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the module hold these."""
        for key, tensor in self._now().items():
            tensor.copy_(tensors[key])
