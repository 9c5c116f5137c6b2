"""One training run of a network that is being compressed: its phases, its state, and how it resumes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.flows.compression import Compression, Progress
from lowbit.flows.fit_size import BATCH, MOST_SAMPLES, fit_size
from lowbit.model import Model
from lowbit.network.build import build
from lowbit.network.compressed import CompressedNetwork
from lowbit.repair.sensitivity import squared_gradients
from lowbit.solve.prune import cubic_sparsity
from lowbit.solve.share import Shared, refit, share
from lowbit.train.distill import Task
from lowbit.train.loop import Adam, Checkpoints, Samples, order

RATES = {"prune": 1.0, "settle": 0.5, "share": 0.25}
"""Phases in order, and their learning rates relative to the first."""
REFIT_STEPS = 32


class Run:
    """A network on its way from float to codes; `train` takes it there."""

    def __init__(
        self,
        prepared: Model,
        weights: Mapping[str, int],
        samples: Samples,
        settings: Compression,
        checkpoint: str | Path | None,
        progress: Progress,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None,
        measure: Callable[[Mapping[str, Shared]], int],
    ) -> None:
        """measure  bytes of the packed file with these codes and values in it"""
        module = build(prepared.program).eval()
        self.keys: dict[str, str] = module.meta["keys"]
        self.axes = {self.keys[name]: axis for name, axis in weights.items() if name in self.keys}
        self.network = CompressedNetwork(module)
        self.samples, self.settings, self.progress, self.augment = samples, settings, progress, augment
        self.layers = {self.keys[layer.name]: layer for layer in settings.layers if layer.name in self.keys}
        if unknown := [layer.name for layer in settings.layers if self.keys.get(layer.name) not in self.axes]:
            raise InputError(f"'{unknown[0]}' is not a weight that can be compressed; these are: {', '.join(weights)}.")
        self.prunes = settings.pruning.sparsity > 0 or any(layer.sparsity for layer in settings.layers)
        self.sensitivity = (
            squared_gradients(
                self.network, self.network.parameters, list(self.axes), samples.parts(BATCH, MOST_SAMPLES)
            )
            if self.prunes and settings.pruning.scope == "sensitivity"
            else {}
        )
        self.task = Task.of(self.network, samples, settings.distill, settings.temperature)
        per_epoch = max(1, len(samples) // settings.batch)
        happens = {"prune": self.prunes, "settle": settings.shares, "share": settings.shares}
        self.steps = {
            phase: math.ceil(epochs * per_epoch) if happens[phase] else 0 for phase, epochs in settings.epochs.items()
        }
        identity = {
            "settings": asdict(settings),
            "source": {key: float(p.double().abs().sum()) for key, p in self.network.parameters.items()},
            "samples": [len(samples), *(float(x[0].double().sum()) for x in samples.inputs)],
        }
        self.measure = measure
        self.checkpoints = Checkpoints(None if checkpoint is None else Path(checkpoint), identity)

    def train(self) -> CompressedNetwork:
        """All phases; what a checkpoint holds is not done again."""
        phase, step, adam = self._resume()
        if phase == "prune":
            self._phase("prune", step, adam or Adam.of(self.network.parameters))
            self._start_sharing()
            phase, step, adam = "settle", 0, None
        if phase == "settle":
            self._phase("settle", step, adam or Adam.of(self.network.parameters))
            for key in list(self.network.settling):
                self.network.share(key, self.network.snap(key))
            phase, step, adam = "share", 0, None
        self._phase("share", step, adam or Adam.of(self.network.parameters))
        return self.network

    def _phase(self, phase: str, start: int, adam: Adam) -> None:
        total = self.steps[phase]
        rate = self.settings.rate_of_learning * RATES[phase]
        per_epoch = max(1, len(self.samples) // self.settings.batch)
        rows = order(len(self.samples), start // per_epoch, self._seed(phase))
        for step in range(start, total):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                rows = order(len(self.samples), epoch, self._seed(phase))
            if phase == "prune":
                self._update_masks(step, total)
            elif phase == "settle" and step % REFIT_STEPS == 0 and not self.settings.ratio:
                self._refit()
            part = self.samples.take(rows[place * self.settings.batch : (place + 1) * self.settings.batch])
            if self.augment is not None:
                generator = torch.Generator().manual_seed(self._seed(phase) * 7919 + step)
                part = replace(part, inputs=tuple(self.augment(x, generator) for x in part.inputs))
            chosen = rows[place * self.settings.batch : (place + 1) * self.settings.batch]
            self._step(part, None if self.augment else chosen, adam, rate * _cosine(step, total), step + 1)
            self.progress(phase, step + 1, total)
            self.checkpoints.save(lambda done=step + 1: self._state(phase, done, adam))  # type: ignore[misc]
        if phase == "prune":
            self._update_masks(total, total)

    def _seed(self, phase: str) -> int:
        return self.settings.seed * 3 + list(RATES).index(phase)

    def _step(self, part: Samples, rows: Tensor | None, adam: Adam, rate: float, number: int) -> None:
        parameters = self.network.parameters
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        loss = self.task.loss(self.network(*part.inputs), part, rows)
        keys = list(parameters)
        gradients = torch.autograd.grad(loss, [parameters[key] for key in keys], allow_unused=True)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        with torch.no_grad():
            found = {key: gradient for key, gradient in zip(keys, gradients, strict=True) if gradient is not None}
            adam.step(parameters, found, rate, number)

    def _update_masks(self, step: int, total: int) -> None:
        """Sparsity rises over the first half of the phase; masks may change until four fifths, then they stay."""
        pruning = self.settings.pruning
        every = max(16, total // 200)
        settled = int(0.8 * total)
        if not self.prunes or (step % every and step != total) or (step > settled and self.network.masks):
            return
        reached = 1.0 if step == total else cubic_sparsity(step, max(1, total // 2), 1.0)
        dense = {key: self.network.parameters[key].movedim(axis, 0) for key, axis in self.axes.items()}
        alone = {key: dense.pop(key) for key in self.layers}
        masks = pruning.masks(dense, pruning.sparsity * reached, self.sensitivity) if dense and pruning.sparsity else {}
        for key, weight in alone.items():
            masks |= replace(pruning, scope="layer").masks({key: weight}, self.layers[key].sparsity * reached)
        for key, mask in masks.items():
            self.network.masks[key] = mask.movedim(0, self.axes[key]).contiguous()

    def _refit(self) -> None:
        """Shared values move to the means of the weights that round to them."""
        for key in self.network.settling:
            self.network.settling[key] = refit(self.network.parameters[key], self.network.snap(key))

    def _start_sharing(self) -> None:
        """Shared values for every weight: multiples of a step where the size is given, else found by k-means."""
        if self.settings.ratio:
            batches = self.samples.parts(BATCH, MOST_SAMPLES)
            fitted = fit_size(self.network, self.axes, batches, self.settings.ratio, self.measure, self.progress)
            for key, found in fitted.items():
                self.network.settling[key], self.network.parameters[key] = found.shared, found.weight
            return
        for key in self.axes:
            bits = self.layers[key].codebook if key in self.layers else self.settings.bits
            if not bits:
                continue
            weight, mask = self.network.parameters[key], self.network.masks.get(key)
            tables = self.settings.tables if len(weight) % self.settings.tables == 0 else 1
            settings = self.settings
            shared = share(weight, mask, bits, groups=tables, start=settings.start, rate=settings.rate)
            self.network.settling[key] = shared

    def _state(self, phase: str, step: int, adam: Adam) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = self.network
        groups = {
            "parameter": network.parameters,
            "mask": network.masks,
            "codes": {key: shared.codes for key, shared in network.shared.items()},
            "settling": {key: shared.tables for key, shared in network.settling.items()},
            "first": adam.first,
            "second": adam.second,
        }
        tensors = {f"{group}/{key}": tensor for group, items in groups.items() for key, tensor in items.items()}
        zeros = {key: shared.zero for key, shared in (network.settling | network.shared).items()}
        return tensors, {"phase": phase, "step": step, "sizes": adam.sizes, "zeros": zeros}

    def _resume(self) -> tuple[str, int, Adam | None]:
        found = self.checkpoints.load()
        if found is None:
            return "prune", 0, None
        tensors, notes = found
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = tensor
        for key, codes in groups.get("codes", {}).items():
            self.network.share(key, Shared(codes, groups["parameter"][key], notes["zeros"][key]))
        self.network.parameters.update(groups["parameter"])
        self.network.masks = groups.get("mask", {})
        for key, tables in groups.get("settling", {}).items():
            codes = torch.zeros(groups["parameter"][key].shape, dtype=torch.uint8)
            self.network.settling[key] = Shared(codes, tables, notes["zeros"][key])
        return notes["phase"], notes["step"], Adam(notes["sizes"], groups["first"], groups["second"])


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / max(1, total)))
