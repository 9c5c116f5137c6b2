"""A run of training: stages with their recipes, what is watched after each epoch, what a checkpoint holds."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.errors import InputError, did_you_mean
from lowbit.flows.given import by_name
from lowbit.flows.masks import Masks
from lowbit.flows.prepare import BatchNorms, prepare
from lowbit.flows.prepared import Prepared
from lowbit.flows.watched import Watched
from lowbit.model import Model
from lowbit.network.build import build
from lowbit.network.quantizers import Quantizer
from lowbit.network.rectifier import plain
from lowbit.network.stored import WeightQuant
from lowbit.numerics import to_rows
from lowbit.recipe import Recipe
from lowbit.training.average import Average
from lowbit.training.checkpoints import Checkpoints, State
from lowbit.training.distill import Task
from lowbit.training.loop import Augment, Loop, Training
from lowbit.training.optimizer import Optimizer, Pace, trainable
from lowbit.training.samples import Samples
from lowbit.training.schedule import Schedule, cosine

Progress = Callable[[str, int, int, str], None]
"""Called with (phase, steps done, steps of the phase, a note: epoch, loss, metric)."""

CALIBRATION = 512  # samples that ranges begin from
BATCH, SENSED = 8, 64  # samples at a time, and in all, that sensitivities are measured on where pruning goes by them


@dataclass
class Trainer:
    """Stages of training, one recipe after the other; `to_end` takes them all."""

    model: Model
    recipes: Sequence[Recipe]
    samples: Samples
    schedule: Schedule
    augment: Augment | None
    watched: Watched | None
    checkpoints: Checkpoints
    progress: Progress
    batchnorm: BatchNorms | None = None  # as in `prepare`
    curve: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    of_float: float | None = None  # what the test says of the float network
    best: tuple[float, dict[str, Tensor]] | None = None
    interrupted: bool = False
    begun: dict[str, Tensor] = field(default_factory=dict)  # what the stage took over from the one before
    losses: list[float] = field(default_factory=list)  # of this epoch

    def to_end(self) -> Prepared:
        """Train each stage from what the one before has reached. Ctrl-C ends with the best epoch of the last stage."""
        found = self.checkpoints.load()
        tensors, notes = found or ({}, {"stage": 0, "step": 0, "curve": []})
        self.curve, self.begun, self.of_float = notes["curve"], _under("begun/", tensors), notes.get("float")
        calibration = self._calibration()
        for number in range(notes["stage"], len(self.recipes)):
            self.progress("preparing", 0, 1, "")
            prepared = prepare(self.model, calibration, self.recipes[number], batchnorm=self.batchnorm)
            if self.begun:
                take_over(prepared, self.begun, calibration)
            stage = _Stage(self, prepared, number)
            step = stage.resume(tensors, notes) if found is not None and number == notes["stage"] else 0
            try:
                stage.train(step)
            except KeyboardInterrupt:
                if self.best is None:
                    raise
                self.interrupted = True
                prepared.load_state_dict(self.best[1], strict=False)
                warnings.warn("training was interrupted: this is the best epoch so far.", stacklevel=3)
                return prepared
            self.begun = own_tensors(prepared)
        return prepared

    def _calibration(self) -> dict[str, Any]:
        """Samples that ranges begin from, by input; drawn from all, since a folder has its classes one by one."""
        rows = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(self.schedule.seed))
        return by_name(self.model, self.samples.take(rows[:CALIBRATION].sort().values).inputs)

    def told(self) -> dict[str, Any]:
        """What happened, for the file and for JSON."""
        named = {} if self.watched is None else {"metric": self.watched.metric.name, "float": self.of_float}
        return {"samples": len(self.samples), **named, "epochs": self.curve, "interrupted": self.interrupted}


class _Stage:
    """One recipe's training."""

    def __init__(self, trainer: Trainer, prepared: Prepared, number: int) -> None:
        self.trainer, self.prepared, self.number = trainer, prepared, number
        self.last = number == len(trainer.recipes) - 1
        schedule = trainer.schedule
        teacher = build(prepared.network.program).eval().requires_grad_(False)
        batches = [by_name(trainer.model, part) for part in trainer.samples.parts(BATCH, SENSED)]
        self.masks = Masks.of(prepared.network, trainer.recipes[number], batches)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for module in (prepared, teacher):
            module.to(self.device)
            if schedule.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = [show(module, schedule.features) for module in (prepared.layers, teacher)]
        keep = trainer.augment is None and not schedule.features and schedule.epochs >= 1 and schedule.distill > 0
        task = Task.of(teacher, trainer.samples, schedule.distill, schedule.temperature, keep)
        self.training = Training(task, trainer.samples, schedule.batch, trainer.augment, schedule.in_bfloat16)
        self.total = max(1, round(schedule.epochs * self.training.steps_an_epoch))
        self.optimizer = Optimizer(schedule.optimizer, trainable(prepared), paces(prepared, schedule))
        self.average = Average(prepared, schedule.average) if schedule.average else None
        self.weights = [module for module in prepared.modules() if isinstance(module, WeightQuant)]

    def train(self, start: int) -> None:
        """Steps start … end; the prepared module then holds what is to be deployed."""
        trainer, schedule = self.trainer, self.trainer.schedule
        steps_an_epoch = self.training.steps_an_epoch
        seen: list[tuple[WeightQuant, Tensor, Tensor]] = []

        def look(weight: WeightQuant, x: tuple[Tensor, ...], rounded: Tensor) -> None:
            if torch.is_grad_enabled():
                seen.append((weight, x[0], rounded))

        hooks = [weight.register_forward_hook(look) for weight in self.weights if schedule.damping]
        if trainer.watched is not None and trainer.of_float is None:  # also shows at once whether it can be judged
            trainer.of_float = trainer.watched.value(self.training.task.teacher)
            told = f"{trainer.watched.metric.name} {trainer.watched.metric.text(trainer.of_float)}"
            trainer.progress("epoch", 0, self.total, f"the float network: {told}")

        def penalty(step: int) -> Tensor:
            total = regularizers(self.prepared)
            if schedule.damping:
                total = total + schedule.damping * (1 - cosine(step, self.total)) * oscillation(seen)
                seen.clear()
            return total

        loop = Loop(
            self.prepared,
            self.training,
            self.optimizer,
            rate=lambda step: schedule.rate_at(step, self.total, steps_an_epoch),
            checkpoints=trainer.checkpoints,
            state=self.state,
            seed=schedule.seed + self.number,
            before=lambda step: self.masks.update(step, self.total),
            penalty=penalty,
            after=self._after,
            clip=schedule.clip,
        )
        self.prepared.train()
        try:
            loop.run(start, self.total)
        finally:
            for hook in hooks:
                hook.remove()
            for hide in self.features:
                hide()
        trainer.checkpoints.save(lambda: self.state(self.total), now=True)
        if self.average is not None:
            self.average.put(self.average.held)

    def _after(self, done: int, loss: float) -> None:
        trainer, each = self.trainer, self.training.steps_an_epoch
        trainer.losses.append(loss)
        if self.average is not None:
            self.average.update()
        stages = len(trainer.recipes)
        stage = f"stage {self.number + 1} of {stages}, " if stages > 1 else ""
        epoch = f"{stage}epoch {1 + (done - 1) // each} of {-(-self.total // each)}"
        if done % each == 0 or done == self.total:
            trainer.progress("epoch", done, self.total, f"{epoch}: {self._end_of_epoch(done)}")
        trainer.progress("training", done, self.total, f"{epoch}, loss {loss:.5f}")

    def _end_of_epoch(self, done: int) -> str:
        """What the test says; the best is kept."""
        trainer, watched = self.trainer, self.trainer.watched
        row = {"stage": self.number, "step": done, "loss": sum(trainer.losses) / len(trainer.losses)}
        told = f"loss {row['loss']:.5f}"
        trainer.losses.clear()
        if watched is not None:
            with nullcontext() if self.average is None else self.average.in_place():
                row["value"] = watched.value(self.prepared)
            told += f", {watched.metric.name} {watched.metric.text(row['value'])}"
        trainer.curve.append(row)
        best = trainer.best is None or watched is None or watched.better(row["value"], trainer.best[0])
        if best and self.last:
            held = self.prepared.state_dict() if self.average is None else self.average.held
            trainer.best = row.get("value", 0.0), {key: tensor.detach().clone() for key, tensor in held.items()}
        return told

    def state(self, done: int) -> State:
        """All that resuming needs."""
        trainer = self.trainer
        tensors = {f"module/{key}": tensor for key, tensor in self.prepared.state_dict().items()}
        tensors |= {f"begun/{key}": tensor for key, tensor in trainer.begun.items()}
        notes: dict[str, Any] = {"stage": self.number, "step": done, "curve": trainer.curve, "losses": trainer.losses}
        notes["float"] = trainer.of_float
        if self.average is not None:
            tensors |= {f"average/{key}": tensor for key, tensor in self.average.held.items()}
            notes["averaged"] = self.average.steps
        if trainer.best is not None:
            tensors |= {f"best/{key}": tensor for key, tensor in trainer.best[1].items()}
            notes["best"] = trainer.best[0]
        moments, _ = self.optimizer.state()
        return tensors | moments, notes

    def resume(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> int:
        """Take over what `state` gave; the steps that are done."""
        for name, module in self.prepared.named_modules():
            if isinstance(module, WeightQuant):  # a buffer that is not there until something is pruned
                mask = tensors.get(f"module/{name}.mask")
                module.mask = None if mask is None else mask.to(self.device)
        self.prepared.load_state_dict(_under("module/", tensors))
        self.optimizer.resume(tensors)
        self.trainer.losses = list(notes["losses"])
        if self.average is not None:
            held = {key: tensor.to(self.device) for key, tensor in _under("average/", tensors).items()}
            self.average.held, self.average.steps = held, notes["averaged"]
        if "best" in notes:
            self.trainer.best = notes["best"], _under("best/", tensors)
        return int(notes["step"])


def paces(prepared: Prepared, schedule: Schedule) -> dict[str, Pace]:
    """Ranges move at their own rate; only weights decay, ranges, norms and biases do not."""
    of_ranges = {id(p) for m in prepared.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    found = {}
    for key, parameter in trainable(prepared).items():
        is_vector = parameter.numel() == max(parameter.shape, default=1)
        of_range = id(parameter) in of_ranges
        decay = 0.0 if is_vector or of_range else schedule.weight_decay
        found[key] = Pace(schedule.range_rate if of_range else 1.0, decay)
    return found


def regularizers(prepared: Prepared) -> Tensor:
    """What the methods of learned ranges add to the loss."""
    learners: list[Any] = [getattr(q, "learner", None) for q in prepared.modules() if isinstance(q, Quantizer)]
    return sum((learner.penalty() for learner in learners if learner is not None), torch.zeros(()))


def oscillation(seen: Sequence[tuple[WeightQuant, Tensor, Tensor]]) -> Tensor:
    """Squared distance of weights to the centres of their bins, of those inside the range.

    seen   quantizers, weights and what they were rounded to

    Source: Nagel et al. 2022 (arXiv 2203.11086), eq. 5: weights that hop between two codes are pulled to one of them.
    """
    total = torch.zeros(())
    for quantizer, weight, rounded in seen:
        assert quantizer.format.block is not None
        x, y = (to_rows(tensor, quantizer.format.block) for tensor in (weight, rounded.detach()))
        inside = torch.clamp(x, y.amin(1, keepdim=True), y.amax(1, keepdim=True))
        total = total.to(x.device) + (inside - y).square().sum()
    return total


def show(module: nn.Module, features: Sequence[str]) -> Callable[[], None]:
    """Let a network give these values (globs) beside its outputs; what makes it give its outputs alone again."""
    assert isinstance(module, fx.GraphModule)
    graph = module
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    before = output.args[0]
    assert isinstance(before, dict)
    inside = {str(n.meta["value"]): n for n in graph.graph.nodes if n.meta.get("op") and "value" in n.meta}
    chosen: dict[str, fx.Node] = {}
    for pattern in features:
        found = {name: node for name, node in inside.items() if fnmatchcase(name, pattern) and name not in before}
        if not found:
            raise InputError(f"feature '{pattern}' is no value inside the network. {did_you_mean(pattern, inside)}")
        chosen |= found

    def give(values: dict[str, Any]) -> None:
        output.args = (values,)
        graph.recompile()

    shown = {name: plain(node) for name, node in chosen.items()}
    if chosen:
        give({**before, **shown})

    def hide() -> None:
        give(before)
        for name, node in shown.items():
            if node is not chosen[name]:
                graph.graph.erase_node(node)
        graph.recompile()

    return hide


def own_tensors(prepared: Prepared) -> dict[str, Tensor]:
    """Parameters and statistics of the network itself, without those of its quantizers."""
    quantizers = {name for name, module in prepared.named_modules() if isinstance(module, Quantizer)}
    return {
        key: tensor.detach().clone()
        for key, tensor in prepared.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in quantizers)
    }


def take_over(prepared: Prepared, tensors: dict[str, Tensor], calibration: Mapping[str, Any]) -> None:
    """Begin with what another stage has trained: its parameters, and ranges that fit them."""
    prepared.load_state_dict(tensors, strict=False)
    inputs = [torch.split(torch.as_tensor(x), 64) for x in calibration.values()]
    with prepared.calibration():
        for batch in zip(*inputs, strict=True):
            prepared(*batch)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
