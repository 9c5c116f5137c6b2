"""A search over a recipe's settings with optuna: two objectives, the drop of the metric, and bytes or latency.

The parameters are what a recipe says: the weight format of each group of layers, ranges, solver, steps. Machines that
name the same storage share one study; each row of it carries its recipe, from which any of them makes the file.
"""

import json
import logging
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lowbit.errors import InputError
from lowbit.flows.bench import Bench
from lowbit.flows.tries import Tries, Try
from lowbit.graph.layer import layers_of
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec
from lowbit.repair.wider import literal
from lowbit.targets import find_target

if TYPE_CHECKING:
    import optuna

NAME = "lowbit"
GROUPS = 6  # of layers in the network's order, each with a weight format of its own
WEIGHTS = ("8 bits", "4 bits", "float")
RANGES = ("auto", "auto:cross_entropy", "minmax", "percentile:99.99", "mse")
SOLVERS = ("nearest", "gptq", "adaround")
STEPS = ("smooth", "equalize_weights", "correct_bias")


def study(bench: Bench, tries: Tries, trials: int, storage: str | None) -> None:
    """Run so many trials, the first with the recipe as asked; the rows of all machines are tries afterwards."""
    try:
        import optuna
    except ImportError:
        raise InputError("a search over settings needs optuna: pip install 'lowbit[search]'.") from None
    if trials < 1:
        raise InputError(f"trials={trials}: give 1 or more.")
    optuna.logging.set_verbosity(logging.WARNING)
    found = _opened(optuna, storage, tries)
    groups = layer_groups(bench.observed(bench.recipe).network.program)
    if not found.trials:
        found.enqueue_trial(as_asked(len(groups)))

    def objective(trial: "optuna.Trial") -> tuple[float, float]:
        recipe = suggested(trial, bench.recipe, groups)
        bench.title = f"trial {trial.number + 1}"
        row = tries.attempt(bench.title, recipe, bench.make)
        trial.set_user_attr("try", json.dumps(asdict(row)))
        if row.measured is None or row.failed:
            raise optuna.TrialPruned(row.failed)
        return row.drop, float(row.measured.bytes) if tries.prefer == "bytes" else 1 / row.measured.times_faster

    try:
        found.optimize(objective, n_trials=trials)
    finally:
        _gather(found, tries)


def suggested(trial: "optuna.Trial", asked: Recipe, groups: list[list[str]]) -> Recipe:
    """The recipe that a trial's parameters stand for."""
    target = find_target(asked.target)
    solve = trial.suggest_categorical("solver", SOLVERS)
    weights = TensorSpec(target.weights, trial.suggest_categorical("range of weights", ("minmax", "mse")), solve)
    activations = TensorSpec(target.activations, trial.suggest_categorical("range of activations", RANGES))
    rules = [Rule("*", weights, activations)]
    rules += [Rule("*", prune=rule.prune) for rule in asked.rules if rule.layers == "*" and rule.prune is not None]
    for number, layers in enumerate(groups, 1):
        stored = trial.suggest_categorical(f"weights of group {number}", WEIGHTS)
        if stored == "float":
            rules += [Rule(literal(name), FLOAT, FLOAT) for name in layers]
        elif stored == "4 bits":
            rules += [Rule(literal(name), TensorSpec("int4 channel:0", "mse", solve)) for name in layers]
    rules += [rule for rule in asked.rules if rule.layers != "*"]
    chosen = [name for name in STEPS if trial.suggest_categorical(name, (True, False))]
    passes = [name for name in asked.passes if name not in (*STEPS, "leave_in_float")]
    return replace(asked, rules=tuple(rules), passes=(*passes, *chosen))


def as_asked(groups: int) -> dict[str, Any]:
    """The parameters of plain int8."""
    settings = {"solver": "nearest", "range of weights": "minmax", "range of activations": "auto"}
    settings |= {f"weights of group {number}": "8 bits" for number in range(1, groups + 1)}
    return settings | {name: name != "equalize_weights" for name in STEPS}


def layer_groups(program: ir.Model) -> list[list[str]]:
    """Names of the nodes with weights, in the network's order, in at most GROUPS runs of about equal length.

    The first and the last layer are groups of their own: they are often the sensitive ones.
    """
    names = [str(node.name) for node in program.graph if any(layers_of(node))]
    inner, runs = names[1:-1], max(1, min(GROUPS - 2, len(names) - 2))
    cuts = [round(i * len(inner) / runs) for i in range(runs + 1)]
    parts = [names[:1], *(inner[a:b] for a, b in pairwise(cuts)), names[1:][-1:]]
    return [part for part in parts if part]


def _opened(optuna: Any, storage: str | None, tries: Tries) -> "optuna.Study":
    """The study of this network and data; InputError where the storage holds another's, or cannot be opened."""
    sampler = optuna.samplers.TPESampler(seed=0 if storage is None else None)  # machines must not repeat each other
    try:
        found = optuna.create_study(
            storage=storage, study_name=NAME, directions=["minimize"] * 2, load_if_exists=True, sampler=sampler
        )
    except Exception as error:
        raise InputError(
            f"storage '{storage}' cannot be opened: {type(error).__name__}: {error}".splitlines()[0]
        ) from None
    of = found.user_attrs.get("of")
    if of is None:
        found.set_user_attr("of", tries.key | {"small": tries.prefer})
    elif other := [name for name, value in (tries.key | {"small": tries.prefer}).items() if of.get(name) != value]:
        raise InputError(
            f"storage '{storage}' holds the study of another {', '.join(other)}. Name another storage, as "
            "sqlite:///other.db, or start with the same network, data and options."
        )
    return found


def _gather(found: "optuna.Study", tries: Tries) -> None:
    """Rows that other machines made."""
    for trial in found.get_trials(deepcopy=False):
        row = Try.of(json.loads(trial.user_attrs["try"])) if "try" in trial.user_attrs else None
        if row is not None and not any(row.recipe == known.recipe for known in tries.rows):
            tries.rows.append(row)
