"""Training that can be killed at any moment and resumed to the same result, bit for bit, on one process or many.

Nothing depends on what happened outside the state: the order of the samples follows from the seed and the epoch, masks
and learning rates from the step, and a checkpoint holds everything else.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from lowbit import processes
from lowbit.errors import DataError, DivergedError
from lowbit.training.checkpoints import Checkpoints, State
from lowbit.training.distill import Task
from lowbit.training.optimizer import Optimizer
from lowbit.training.samples import Samples

Augment = Callable[[Tensor, torch.Generator], Tensor]

EXPLODED = 1e4
"""A loss above this is on its way to infinity: cross-entropy of chance among a million classes is 14."""


class Training:
    """The loss of each step of training; all about it follows from the number of the step and the seed.

    task      what is trained for
    batch     samples of a step, over all processes
    augment   (inputs, generator) → inputs, for each batch; None: as they are
    bfloat16  products are computed in bfloat16 where torch's autocast says so; parameters and losses stay float32
    """

    def __init__(
        self, task: Task, samples: Samples, batch: int, augment: Augment | None = None, bfloat16: bool = False
    ) -> None:
        self.task, self.samples, self.batch, self.augment, self.bfloat16 = task, samples, batch, augment, bfloat16
        self.steps_an_epoch = max(1, len(samples) // batch)
        self.epoch, self.order = (-1, -1), torch.empty(0)
        if batch % processes.count():
            raise DataError(f"a batch of {batch} samples cannot be shared by {processes.count()} processes evenly.")

    def loss(self, student: nn.Module, step: int, seed: int) -> Tensor:
        """Of a network whose forward gives {output: tensor}; of several processes each takes its part of the batch."""
        part, rows = self.part(step, seed)
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        inputs = tuple(x.to(device) for x in part.inputs)
        part = Samples(inputs, None if part.labels is None else part.labels.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = student(*inputs)
            return self.task.loss(outputs, part, rows)

    def part(self, step: int, seed: int) -> tuple[Samples, Tensor | None]:
        """This process's samples of a step, and their places among all; None for augmented ones."""
        epoch, place = divmod(step, self.steps_an_epoch)
        if self.epoch != (epoch, seed):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self.epoch, self.order = (epoch, seed), torch.randperm(len(self.samples), generator=generator)
        rows = self.order[place * self.batch : (place + 1) * self.batch]
        first, last = (len(rows) * n // processes.count() for n in (processes.number(), processes.number() + 1))
        if self.augment is None:
            return self.samples.take(rows[first:last]), rows[first:last]
        whole = self.samples.take(rows)  # augmented as a whole: what a sample becomes does not depend on who takes it
        generator = torch.Generator().manual_seed(seed * 7919 + step)
        whole = replace(whole, inputs=tuple(self.augment(x, generator) for x in whole.inputs))
        return whole.take(torch.arange(first, last)), None


@dataclass
class Loop:
    """One stretch of training: steps that move a module's parameters down the loss.

    module     what is trained; under torchrun its gradients are averaged over all processes
    rate       step → learning rate
    state      steps done → what a checkpoint has to hold
    before     called with the step, before its loss is computed
    penalty    step → what is added to the loss; None: nothing
    after      called with (steps done, loss) when a step was made
    clip       greatest norm of all gradients together; 0: any
    """

    module: nn.Module
    training: Training
    optimizer: Optimizer
    rate: Callable[[int], float]
    checkpoints: Checkpoints
    state: Callable[[int], State]
    seed: int = 0
    before: Callable[[int], None] | None = None
    penalty: Callable[[int], Tensor] | None = None
    after: Callable[[int, float], None] | None = None
    clip: float = 0.0

    def run(self, start: int, total: int) -> None:
        """Steps start … total. DivergedError where the loss or a gradient is not finite; then nothing has moved."""
        student = self.module
        if processes.count() > 1:
            with warnings.catch_warnings():  # torch 2.13 renamed the option, and says so
                warnings.simplefilter("ignore", FutureWarning)
                student = DistributedDataParallel(student, broadcast_buffers=False, static_graph=True)
        for step in range(start, total):
            if self.before is not None:
                self.before(step)
            loss = self.training.loss(student, step, self.seed)
            if self.penalty is not None:
                loss = loss + self.penalty(step)
            reached = float(processes.mean(loss))
            if not abs(reached) < EXPLODED:
                raise self._diverged(f"the loss is {reached:g}", step)
            self.checkpoints.confirm()  # the state of the step before: its loss is known now
            if bad := self.optimizer.step(loss, self.rate(step), self.clip):
                raise self._diverged(f"the gradient of '{bad}' is not finite", step)
            if self.after is not None:
                self.after(step + 1, reached)
            self.checkpoints.save(lambda done=step + 1: self.state(done))  # type: ignore[misc]
        if start < total and not all(bool(torch.isfinite(p).all()) for p in self.module.parameters()):
            raise self._diverged("its last step made a parameter that is not finite", total - 1)

    def _diverged(self, what: str, step: int) -> DivergedError:
        part, _ = self.training.part(step, self.seed)
        where = first_not_finite(self.module, part.inputs)
        path = self.checkpoints.path
        kept = (
            f" '{path}' holds the last good checkpoint: the run goes on from it."
            if path is not None and path.exists()
            else ""
        )
        return DivergedError(
            f"training stopped at step {step + 1}: {what}{where and f'; {where}'}. The learning rate was "
            f"{self.rate(step):.3g}: try a tenth of it, or clip gradients.{kept}"
        )


def first_not_finite(module: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """In words, the first parameter, or the first value on the way through the module, that has NaN or infinity in it.

    "" where all are finite.
    """
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter '{name}' is not finite"
    found: list[str] = []

    def look(name: str, value: Any) -> None:
        if not found and isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            found.append(f"the first value that is not finite comes out of '{name}'")

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            look(str(n.meta.get("node") or n.meta.get("quantized_value") or n.target), value)
            return value

    device = next((p.device for p in module.parameters()), None)
    hooks = [
        m.register_forward_hook(lambda _, __, out, name=name: look(name, out))
        for name, m in module.named_modules()
        if not any(m.children())
    ]
    graph = next((m for m in module.modules() if isinstance(m, fx.GraphModule)), None)
    run: Any = module if graph is None else Watch(graph).run
    try:
        with torch.no_grad():
            run(*(x.to(device) for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
