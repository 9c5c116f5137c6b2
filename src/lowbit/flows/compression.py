"""What compression is asked for: a recipe by size or by the values of codes, and the phases of its training."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from lowbit.errors import InputError, UnsupportedError
from lowbit.numerics import Format, KMeans
from lowbit.presets import find_recipe
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec
from lowbit.solve.prune import Pruning
from lowbit.training.schedule import Schedule

Progress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps of the phase)."""

BY_SIZE = TensorSpec("uint8", solve="gptq")  # multiples of a step, see lowbit.flows.fit_size
PASSES = ("recognize_operators", "fold_batchnorm", "fuse_gemm")
SCHEDULE = Schedule(batch=64)
_SERVE = ("prune_epochs", "code_epochs", "value_epochs", "batch", "rate", "clip", "distill", "temperature", "augment")


def compression(
    recipe: "str | Path | Format | Recipe | None" = None,
    ratio: float | None = None,
    prune: "Pruning | float | None" = None,
    codebook: int | None = None,
) -> Recipe:
    """The recipe that `compress` is asked for.

    recipe     as in `quantize`; None: multiples of a step where there is a ratio, else a codebook for each weight
    ratio      overrides the recipe's
    prune      a share overrides those of the recipe's rules and leaves their patterns. None: the recipe's; without one
               0.9, or 0 where there is a ratio
    codebook   without a recipe: bits of a code, 1 … 8; 0: weights are pruned but stay float32. None: 4
    """
    if codebook is not None and not 0 <= codebook <= 8:
        raise InputError(f"a codebook has 1 to 8 bits, or 0 for none; not {codebook}.")
    if codebook is not None and (ratio or recipe is not None):
        raise InputError("a ratio or a recipe decides how many values each weight has: leave out codebook.")
    if recipe is None:
        values = TensorSpec(f"codebook{codebook or 4}:linear", solve="kmeans") if codebook != 0 else FLOAT
        rule = Rule("*", BY_SIZE if ratio else values, prune=None if ratio else 0.9)
        chosen = Recipe((rule,), PASSES, rest="mantissa:7", ratio=ratio or 0.0)
    else:
        chosen = find_recipe(recipe)
        chosen = chosen if ratio is None else replace(chosen, ratio=ratio)
    chosen = chosen if prune is None else chosen.pruned(prune)
    for rule in chosen.rules:
        if rule.activations not in (None, FLOAT):
            raise UnsupportedError(
                f"rule '{rule.layers}' quantizes activations, and a compressed network computes in float. Leave "
                "activations out of the recipe; or use `lowbit quantize`, and `lowbit pack` for its file."
            )
        if chosen.ratio and rule.weights not in (None, FLOAT, BY_SIZE):
            raise InputError(
                f"rule '{rule.layers}': a ratio decides how many values each weight has: leave out weights, or the "
                "codebook, or the ratio."
            )
    if chosen.ratio and all(rule.weights is None for rule in chosen.rules):
        return replace(chosen, rules=(Rule("*", BY_SIZE), *chosen.rules))
    return chosen


def schedule_of(schedule: object, **changes: object) -> Schedule:
    """How `compress` trains; InputError for what its phases do not have."""
    chosen = replace(Schedule.of(schedule, SCHEDULE), **changes)  # type: ignore[arg-type]
    for field in fields(Schedule):
        if field.name not in (*_SERVE, "seed") and getattr(chosen, field.name) != field.default:
            raise InputError(f"schedule: compress has no '{field.name}'. It has {', '.join(_SERVE)}, seed.")
    return chosen


def epochs(recipe: Recipe, schedule: Schedule) -> dict[str, float]:
    """Phase → passes over the data. A file of a given size is near its best without, and few samples do harm.

    Values train in a codebook; those of other formats are multiples of a scale.
    """
    formats = [rule.weights.format for rule in recipe.rules if rule.weights not in (None, FLOAT)]
    tables = all(kind is not None and isinstance(kind.grid, KMeans) for kind in formats)
    codes, values = 0 if recipe.ratio else 2, 3 if tables and not recipe.ratio else 0
    return {
        "prune": schedule.prune_epochs,
        "codes": codes if schedule.code_epochs is None else schedule.code_epochs,
        "values": values if schedule.value_epochs is None else schedule.value_epochs,
    }


def trains(recipe: Recipe, schedule: Schedule) -> bool:
    """Whether any phase passes over the data."""
    passes = epochs(recipe, schedule)
    prunes = any(rule.prune is not None and rule.prune.sparsity > 0 for rule in recipe.rules)
    stores = any(rule.weights not in (None, FLOAT) for rule in recipe.rules)
    return (prunes and passes["prune"] > 0) or (stores and passes["codes"] + passes["values"] > 0)


def rate(recipe: Recipe, schedule: Schedule) -> float:
    """The learning rate, relative to a tensor's root mean square.

    Weights that are rounded with feedback, for a ratio, are already near their best.
    """
    return (0.002 if recipe.ratio else 0.02) if schedule.rate is None else schedule.rate
