"""Training that can be killed at any moment and resumed to the same result, bit for bit.

Nothing depends on what happened outside the state: the order of the samples follows from the seed and the epoch, masks
and learning rates from the step, and a checkpoint holds everything else. Checkpoints are safetensors, written aside.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.storage.atomic import replacing
from lowbit.train.distill import Task
from lowbit.train.samples import Samples

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Training:
    """The loss of each step of training; all about it follows from the number of the step and the seed.

    task      what is trained for
    augment   (inputs, generator) → inputs, for each batch; None: as they are
    """

    def __init__(self, task: Task, samples: Samples, batch: int, augment: Augment | None = None) -> None:
        self.task, self.samples, self.batch, self.augment = task, samples, batch, augment
        self.steps_an_epoch = max(1, len(samples) // batch)
        self.epoch, self.order = (-1, -1), torch.empty(0)

    def loss(self, student: nn.Module, step: int, seed: int) -> Tensor:
        """Of a network whose forward gives {output: tensor}."""
        epoch, place = divmod(step, self.steps_an_epoch)
        if self.epoch != (epoch, seed):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self.epoch, self.order = (epoch, seed), torch.randperm(len(self.samples), generator=generator)
        rows = self.order[place * self.batch : (place + 1) * self.batch]
        part = self.samples.take(rows)
        if self.augment is not None:
            generator = torch.Generator().manual_seed(seed * 7919 + step)
            part = replace(part, inputs=tuple(self.augment(x, generator) for x in part.inputs))
        return self.task.loss(student(*part.inputs), part, None if self.augment else rows)


class Adam:
    """torch's Adam with a step size for each tensor, relative to its root mean square when training began.

    A relative step suits tables, weights and biases of any scale with one number. Source: Kingma and Ba 2015.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sizes: Mapping[str, float]) -> None:
        groups = [{"params": [p], "key": key, "size": sizes[key]} for key, p in parameters.items()]
        self.groups = torch.optim.Adam(groups, lr=0.0, eps=1e-12)

    @staticmethod
    def of(module: nn.Module) -> "Adam":
        """Fresh moments; a tensor of zeros steps as if its root mean square were 1e-3."""
        chosen = _trainable(module)
        sizes = {key: max(1e-3, float(p.detach().double().square().mean().sqrt())) for key, p in chosen.items()}
        return Adam(chosen, sizes)

    def step(self, loss: Tensor, rate: float) -> None:
        """Move all parameters that the loss depends on."""
        parameters = [group["params"][0] for group in self.groups.param_groups]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for group, parameter, gradient in zip(self.groups.param_groups, parameters, gradients, strict=True):
            group["lr"], parameter.grad = rate * group["size"], gradient
        self.groups.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Moments and step counts by name, and the size of each tensor: what `resumed` wants."""
        tensors = {
            f"{part}/{group['key']}": tensor
            for group in self.groups.param_groups
            for part, tensor in self.groups.state[group["params"][0]].items()
        }
        return tensors, {group["key"]: group["size"] for group in self.groups.param_groups}

    @staticmethod
    def resumed(module: nn.Module, sizes: Mapping[str, float], tensors: Mapping[str, Tensor]) -> "Adam":
        """As it was when `state` gave these."""
        adam = Adam(_trainable(module), sizes)
        for group in adam.groups.param_groups:
            found = {part: tensors.get(f"{part}/{group['key']}") for part in ("step", "exp_avg", "exp_avg_sq")}
            if found["step"] is not None:
                adam.groups.state[group["params"][0]] = found
        return adam


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in module.named_parameters() if p.requires_grad}


@dataclass
class Checkpoints:
    """Where the state is kept, and how often.

    path       None: nowhere
    identity   what the run is about: a checkpoint of another run is an InputError, not a wrong result
    """

    path: Path | None
    identity: Mapping[str, Any]
    every_seconds: float = 30.0
    last: float = field(default_factory=time.monotonic)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and progress of an earlier run, or None where there was none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                notes = json.loads(file.metadata()["lowbit.checkpoint"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(f"checkpoint '{self.path}' cannot be read ({error}); delete it to start anew.") from None
        if notes["identity"] != json.loads(json.dumps(self.identity)):
            raise InputError(
                f"checkpoint '{self.path}' belongs to another run (model, data or settings differ); "
                "delete it or choose another name."
            )
        return tensors, notes["progress"]

    def save(self, state: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]], now: bool = False) -> None:
        """Write the state if it is time, or `now`."""
        if self.path is None or not (now or time.monotonic() - self.last > self.every_seconds):
            return
        tensors, progress = state()
        notes = json.dumps({"identity": self.identity, "progress": progress})
        with replacing(self.path) as aside:
            save_file({k: t.contiguous().clone() for k, t in tensors.items()}, aside, {"lowbit.checkpoint": notes})
        self.last = time.monotonic()

    def remove(self) -> None:
        """The run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
