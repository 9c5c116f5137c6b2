"""Post-training quantization, the whole story: passes, placement, one calibration pass, codes, file, proof."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lowbit
from lowbit.data import Data
from lowbit.flows.calibrate import Batch, observe, solve_weights
from lowbit.flows.correct_bias import correct_bias
from lowbit.flows.export import export, ledger
from lowbit.flows.ranges import choose_ranges
from lowbit.flows.verify import verify
from lowbit.graph import PASSES
from lowbit.model import Model
from lowbit.recipe import Recipe, find_recipe
from lowbit.simulate.fakequant import Simulation
from lowbit.simulate.place import place

HELD_SAMPLES = 64  # kept from the calibration data for the proof that file and simulation agree


def quantize(
    model: Model, calibration: Any, recipe: "str | Path | Recipe" = "int8", *, target: str | None = None
) -> Model:
    """A model in integers that a standard engine runs.

    calibration   some hundred typical inputs, unlabelled: arrays, tensors, dicts, a DataLoader, any iterable of batches
    recipe        a preset ("int8"), a TOML file or a Recipe
    target        engine profile, see lowbit.TARGETS; None: the recipe's own

    The deployed program is run against the simulation before it is returned; MismatchError if they differ by more than
    one step anywhere. What became of each tensor is in `.ledger`, and travels in the saved file.
    """
    chosen = find_recipe(recipe, target)
    prepared = model.copy()
    notes = [line for name in chosen.passes for line in PASSES[name](prepared.program)]
    simulation = Simulation(prepared.program, place(prepared.program, chosen))
    held: list[Batch] = []
    observe(simulation, _keep_some(Data.of(calibration, model.inputs), held))
    solve_weights(simulation)
    choose_ranges(simulation, held)
    correct_bias(simulation, held)
    program = export(simulation)
    parity = verify(simulation, program, held)
    program.metadata_props.update(
        {
            "lowbit.version": lowbit.__version__,
            "lowbit.recipe": chosen.to_toml(),
            "lowbit.ledger": json.dumps(ledger(simulation)),
            "lowbit.passes": json.dumps(notes),
            "lowbit.parity": json.dumps(asdict(parity)),
        }
    )
    return Model(program, model.source)


def _keep_some(data: Data, held: list[Batch]) -> Iterator[Batch]:
    """The batches of the data; the first few samples are also appended to `held`."""
    kept = 0
    for samples in data.samples():
        if kept < HELD_SAMPLES:
            held.append(data.cut(samples, HELD_SAMPLES - kept).inputs)
            kept += samples.count
        yield samples.inputs
