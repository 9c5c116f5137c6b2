"""torch's optimizers with a learning rate and a weight decay for each tensor, and a state that can be kept by name."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.errors import InputError

OPTIMIZERS = {
    # Sources: Nesterov's momentum as in Sutskever et al. 2013; Kingma and Ba 2015; Loshchilov and Hutter 2019.
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, eps=1e-12),
    "adamw": torch.optim.AdamW,
}


class Pace(NamedTuple):
    """How a tensor moves: its learning rate in parts of the loop's, and its weight decay."""

    size: float
    decay: float = 0.0


class Optimizer:
    """torch's optimizer of that name; `paces` says for each parameter how it moves."""

    def __init__(self, kind: str, parameters: Mapping[str, nn.Parameter], paces: Mapping[str, Pace]) -> None:
        if not parameters:
            raise InputError("there is nothing to train: the network has no parameter that learns.")
        self.parameters = dict(parameters)
        groups = [{"params": [p], "key": key, "weight_decay": paces[key].decay} for key, p in parameters.items()]
        self.torch: torch.optim.Optimizer = OPTIMIZERS[kind](groups, lr=0.0)  # type: ignore[operator]
        self.paces = {key: Pace(*paces[key]) for key in parameters}

    @staticmethod
    def relative(module: nn.Module) -> "Optimizer":
        """Adam whose rate is relative to each tensor's root mean square when training began.

        A relative rate suits tables, weights and biases of any scale with one number. A tensor of zeros steps as if
        its root mean square were 1e-3.
        """
        chosen = trainable(module)
        sizes = {key: max(1e-3, float(p.detach().double().square().mean().sqrt())) for key, p in chosen.items()}
        return Optimizer("adam", chosen, {key: Pace(size) for key, size in sizes.items()})

    def step(self, loss: Tensor, rate: float, clip: float = 0.0) -> str | None:
        """Move all parameters that the loss depends on; the norm of all gradients is brought down to `clip`.

        A gradient that is not finite moves nothing: the name of its parameter is returned.
        """
        self.torch.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        moving = [p for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in moving if p.grad is not None])
        if not torch.isfinite(norm):
            return self.not_finite()
        if clip:
            nn.utils.clip_grads_with_norm_(moving, clip, norm)
        for group in self.torch.param_groups:
            group["lr"] = rate * self.paces[group["key"]].size
        self.torch.step()
        return None

    def not_finite(self) -> str:
        """The first parameter with a gradient that is not finite."""
        return next(
            (k for k, p in self.parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()), "all"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Moments and step counts by name, and the pace of each tensor: what `resume` wants."""
        return dict(self._moments()), {key: list(pace) for key, pace in self.paces.items()}

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for key, parameter in self.parameters.items():
            for part, value in self.torch.state[parameter].items():
                if isinstance(value, Tensor):
                    yield f"{part}/{key}", value

    def resume(self, tensors: Mapping[str, Tensor]) -> "Optimizer":
        """As it was when `state` gave these."""
        for key, parameter in self.parameters.items():
            found = {part: tensors[name].clone() for part in MOMENTS if (name := f"{part}/{key}") in tensors}
            if found:  # step counts stay in main memory, as torch has them
                moved = {part: t if part == "step" else t.to(parameter.device) for part, t in found.items()}
                self.torch.state[parameter] = moved
        return self


MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {key: p for key, p in module.named_parameters() if p.requires_grad}
