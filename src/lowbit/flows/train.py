"""Training in low bits, the whole story: prepare, steps down the loss, the file of what was trained, proved.

The network trains with its quantizers in place; the float network teaches. What trains is what is written.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowbit import processes
from lowbit.data import Data
from lowbit.errors import DataError, InputError
from lowbit.flows.given import is_module, model_and_data, refuse_quantized, samples_lead
from lowbit.flows.metrics import Metric
from lowbit.flows.prepare import convert
from lowbit.flows.trainer import Progress, Trainer
from lowbit.flows.watched import Watched
from lowbit.model import Model
from lowbit.numerics import Format
from lowbit.presets import find_recipe
from lowbit.recipe import Recipe
from lowbit.solve.prune import Pruning
from lowbit.training.augment import AUGMENTS
from lowbit.training.checkpoints import Checkpoints
from lowbit.training.loop import Augment
from lowbit.training.samples import Samples
from lowbit.training.schedule import COMPRESSING, Schedule

LEAST = 2  # samples of a batch: a batch norm has no variance of one


def train(
    model: Any,
    data: Any,
    recipe: "str | Path | Format | Recipe" = "w4a4-lsq",
    schedule: "str | Path | Mapping[str, Any] | Schedule | None" = None,
    *,
    test: Any = None,
    metric: "str | Metric | Callable[..., float] | None" = None,
    augment: str | Augment | None = None,
    prune: "Pruning | float | None" = None,
    target: str | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Model:
    """A model in integers that was trained with its quantizers in place, and computes what was trained.

    model       a Model, whatever `load` takes, or a torch module: its example inputs are the first of the data
    data        samples, with class labels where there are any; without, it trains for agreement with the float network
    recipe      as in `quantize`; its steps that repair without training are left out
    schedule    a Schedule, its words 'rate=0.02 optimizer=adamw', or a TOML file; `changes` are its fields: `epochs=30`
    test        labelled samples that are judged after each epoch. They choose nothing: the last weights are deployed,
                unless training is interrupted, which gives those of the best epoch
    metric      of the test; None: top1 where there are class labels
    augment     the schedule's word, or a function (inputs, generator) → inputs, for each batch
    prune       share of the weights that become zero while it trains, or a Pruning; None: the recipe's
    checkpoint  a file to keep the state in: an interrupted run resumes to the same bytes. A finished run's gives its
                model at once. A run that diverged goes on from it with another rate
    progress    called with (phase, steps done, steps of the phase, note)

    Under torchrun all processes share each batch. DivergedError where the loss or a gradient is not finite.
    """
    chosen = replace(Schedule.of(schedule), **changes | ({"augment": augment} if isinstance(augment, str) else {}))
    if unused := [name for name in COMPRESSING if getattr(chosen, name) != getattr(Schedule, name)]:
        raise InputError(f"schedule: '{unused[0]}' is of compress; train has 'epochs'.")
    last = find_recipe(recipe, target)
    recipes = [find_recipe(one, target) for one in chosen.recipes]
    recipes.append(last if prune is None else last.pruned(prune))
    with processes.joined():
        given_model, given = model_and_data(model, data)
        refuse_quantized(given_model)
        samples_lead(given_model, "train takes", "`lb.quantize` takes such a network.")
        samples = _samples(given, chosen)
        watched = None if test is None else Watched.of(Data.of(test, given_model.inputs), metric)
        identity = {
            "model": [float(v.const_value.numpy().astype("f8").sum()) for v in _floats(given_model)],
            "data": [(len(x), float(x[0].double().sum()), float(x[-1].double().sum())) for x in samples.inputs],
            "recipe": [one.to_toml() for one in recipes],
            "schedule": {key: value for key, value in asdict(chosen).items() if key != "rate"},
        }
        trainer = Trainer(
            given_model,
            recipes,
            samples,
            chosen,
            augment if callable(augment) else AUGMENTS.get(chosen.augment),
            watched,
            Checkpoints(None if checkpoint is None else Path(checkpoint), identity),
            progress or (lambda *_: None),
            "keep" if is_module(model) else None,
        )
        found = convert(trainer.to_end())
    found.program.metadata_props["lowbit.schedule"] = chosen.to_toml()
    found.program.metadata_props["lowbit.training"] = json.dumps(trainer.told())
    return found


def _samples(data: Data, schedule: Schedule) -> Samples:
    """All that is trained on; DataError where it makes no batch."""
    samples = Samples.of(data.batches(max(schedule.batch, 64)))
    if len(samples) < LEAST:
        raise DataError(f"{data.source.name} has 1 sample, and a batch norm has no variance of one: give some hundred.")
    if len(samples) < schedule.batch or schedule.batch < LEAST:
        raise DataError(
            f"{data.source.name} has {len(samples)} samples and a batch {schedule.batch}: give more samples, or a "
            f"batch from {LEAST} to {len(samples)}."
        )
    return samples


def _floats(model: Model) -> list[Any]:
    values = model.program.graph.initializers.values()
    return [v for v in values if v.const_value is not None and v.dtype is not None and v.dtype.is_floating_point()]
