"""Deep Compression of a network, phase after phase: masks, codes, values; and how a run that was killed resumes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lowbit.engines.compile import Batch
from lowbit.flows.compression import Progress, epochs, rate
from lowbit.flows.fit_size import fit_size
from lowbit.flows.masks import Masks
from lowbit.network.calibrate import solve_weights
from lowbit.network.network import Network
from lowbit.network.stored import WeightQuant
from lowbit.numerics import QuantTensor, parse_format, spell_format
from lowbit.recipe import Recipe
from lowbit.solve import NEED_MOMENTS
from lowbit.solve.kmeans import as_codebook, refit
from lowbit.training.checkpoints import Checkpoints, State
from lowbit.training.loop import Loop, Training
from lowbit.training.optimizer import Optimizer, Pace, trainable
from lowbit.training.schedule import Schedule, cosine

PHASES = {"prune": 1.0, "codes": 0.5, "values": 0.25}
"""In order: masks change; codes change; the values that codes mean change. Learning rates relative to the first."""
REFIT_STEPS = 32


class Compressor:
    """A network on its way from float to codes; `to_end` takes it there.

    batches   inputs that sensitivities and moments are measured on
    training  None where nothing is trained
    measure   bytes of the packed file of what the network holds
    """

    def __init__(
        self,
        network: Network,
        batches: Sequence[Batch],
        training: Training | None,
        recipe: Recipe,
        schedule: Schedule,
        measure: Callable[[], int],
        progress: Progress,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.network, self.batches, self.training = network, batches, training
        self.recipe, self.schedule, self.measure, self.progress = recipe, schedule, measure, progress
        self.weights: dict[str, WeightQuant] = {name: q for name, (_, q) in network.constants().items()}
        self.masks = Masks.of(network, recipe, batches)
        stored = any(quantizer.spec.format is not None for quantizer in self.weights.values())
        happens = {"prune": bool(self.masks.groups), "codes": stored, "values": stored}
        self.steps = {
            phase: math.ceil(passes * training.steps_an_epoch) if training and happens[phase] else 0
            for phase, passes in epochs(recipe, schedule).items()
        }
        inputs = [] if training is None else training.samples.inputs
        identity = {
            "recipe": recipe.to_toml(),
            "schedule": asdict(schedule),
            "source": {key: float(p.detach().double().abs().sum()) for key, p in network.module.named_parameters()},
            "samples": [(len(x), float(x[0].double().sum())) for x in inputs],
        }
        self.checkpoints = Checkpoints(None if checkpoint is None else Path(checkpoint), identity)

    def to_end(self) -> None:
        """All phases; what a checkpoint holds is not done again."""
        reached, step, optimizer = self._resume()
        begin = {"prune": lambda: None, "codes": self._choose_codes, "values": self._keep_codes}
        phases = list(PHASES)
        for phase in phases[phases.index(reached) :]:
            if step == 0:
                begin[phase]()
            self._phase(phase, step, optimizer)
            step, optimizer = 0, None
        for name, weight in self.weights.items():
            if weight.stored is not None:
                weight.store(weight.current(self.network.parameter(name)))

    def _phase(self, phase: str, start: int, optimizer: Optimizer | None) -> None:
        total = self.steps[phase]
        if self.training is not None and start < total:
            moving = optimizer or Optimizer.relative(self.network.module)
            highest = rate(self.recipe, self.schedule) * PHASES[phase]
            loop = Loop(
                self.network.module,
                self.training,
                moving,
                rate=lambda step: highest * cosine(step, total),
                checkpoints=self.checkpoints,
                state=lambda done: self._state(phase, done, moving),
                seed=3 * self.schedule.seed + list(PHASES).index(phase),
                before=lambda step: self._before(phase, step),
                after=lambda done, _: self.progress(phase, done, total),
                clip=self.schedule.clip,
            )
            with self.network.mode("quantize"):
                loop.run(start, total)
        if phase == "prune":
            self.masks.update(total, total)
            self.masks.prune()

    def _before(self, phase: str, step: int) -> None:
        """What changes besides parameters, and when."""
        if phase == "prune":
            self.masks.update(step, self.steps[phase])
        elif phase == "codes" and step % REFIT_STEPS == 0:
            self._refit()

    def _choose_codes(self) -> None:
        """Codes for every weight: multiples of a step where the size is given, else by its format and solver."""
        if self.recipe.ratio:
            fit_size(self.network, self.batches, self.recipe.ratio, self.measure, self.progress)
        else:
            solve_weights(self.network, self.batches)
        for name, quantizer in self.weights.items():
            if self.steps["codes"] and quantizer.stored is not None:
                quantizer.store(quantizer.stored, "codes")
                if quantizer.spec.solve in NEED_MOMENTS:  # from where feedback brought it
                    with torch.no_grad():
                        self.network.parameter(name).copy_(torch.as_tensor(quantizer.stored.dequantize()))

    def _refit(self) -> None:
        """Shared values move to the means of the weights that round to them."""
        for name, quantizer in self.weights.items():
            if quantizer.stored is not None and quantizer.stored.table is not None:
                weight = self.network.parameter(name).detach()
                quantizer.store(refit(quantizer.current(weight), weight), quantizer.trains)

    def _keep_codes(self) -> None:
        """From now on codes stay, and the values that they mean train."""
        for name, quantizer in self.weights.items():
            if quantizer.stored is not None:
                stored = quantizer.current(self.network.parameter(name))
                if self.steps["values"]:
                    quantizer.store(as_codebook(stored), "values")
                else:
                    quantizer.store(stored)

    def _state(self, phase: str, step: int, optimizer: Optimizer) -> State:
        tensors = {f"parameter/{key}": p.detach() for key, p in self.network.module.named_parameters()}
        formats = {}
        for name, quantizer in self.weights.items():
            stored = quantizer.stored
            held = {"mask": quantizer.mask}
            if stored is not None:
                formats[name] = [spell_format(stored.format), quantizer.trains]
                held |= {part: getattr(stored, part) for part in ("codes", "scale", "zero", "table")}
            tensors |= {f"{part}/{name}": tensor for part, tensor in held.items() if tensor is not None}
        moments, paces = optimizer.state()
        return tensors | moments, {"phase": phase, "step": step, "formats": formats, "paces": paces}

    def _resume(self) -> tuple[str, int, Optimizer | None]:
        found = self.checkpoints.load()
        if found is None:
            return "prune", 0, None
        tensors, notes = found
        for name, quantizer in self.weights.items():
            quantizer.mask = tensors.get(f"mask/{name}")
            if name in notes["formats"]:
                words, trains = notes["formats"][name]
                kind, codes = parse_format(words), tensors[f"codes/{name}"]
                assert kind.block is not None
                parts = (tensors.get(f"{part}/{name}") for part in ("scale", "zero", "table"))
                quantizer.store(QuantTensor(codes, kind, kind.block.tile(tuple(codes.shape)), *parts), trains)
        with torch.no_grad():
            for key, parameter in self.network.module.named_parameters():
                parameter.copy_(tensors[f"parameter/{key}"])
        paces = {key: Pace(*pace) for key, pace in notes["paces"].items()}
        optimizer = Optimizer("adam", trainable(self.network.module), paces).resume(tensors)
        return notes["phase"], notes["step"], optimizer
