"""The steps that a recipe may name, as one table. Each is taken in turn, and stays only where it helps."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from lowbit.network.network import Network
from lowbit.repair.choose_dynamic import choose_dynamic, measuring
from lowbit.repair.correct_bias import correct_bias
from lowbit.repair.correct_recurrent_bias import correct_recurrent_bias
from lowbit.repair.equalize import equalize, equalize_without_ceilings
from lowbit.repair.learn_ranges import learn_ranges
from lowbit.repair.leave_in_float import leave_in_float
from lowbit.repair.prove import Calibration, Step, fit, prove
from lowbit.repair.reconstruct import reconstruct
from lowbit.repair.reestimate_batchnorm import reestimate_batchnorm

STEPS: Mapping[str, Step] = MappingProxyType(
    {
        "choose_dynamic": choose_dynamic,
        "equalize": equalize,
        "equalize_without_ceilings": equalize_without_ceilings,
        "reconstruct": reconstruct,
        "learn_ranges": learn_ranges,
        "reestimate_batchnorm": reestimate_batchnorm,
        "correct_bias": correct_bias,
        "correct_recurrent_bias": correct_recurrent_bias,
        "leave_in_float": leave_in_float,
    }
)

# They change the program, which later placements start from.
LASTING = frozenset({choose_dynamic, equalize, equalize_without_ceilings})


def take_steps(network: Network, names: Iterable[str], calibration: Calibration) -> list[str]:
    """Ranges and codes for a network that has observed, then these steps in order. What was done, in words."""
    network.keep_before_steps()
    notes = fit(network, calibration)
    for step in (STEPS[name] for name in names):
        notes += prove(network, step, calibration)
        if step not in LASTING:
            calibration.earlier.append(step)
    # As it was decided, with nothing to time again.
    network.placement = replace(network.placement, recipe=measuring(network.placement.recipe, ()))
    return notes
