"""Post-training quantization, the whole story: passes, placement, one calibration pass, codes, file, proof."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lowbit
from lowbit.data import Data
from lowbit.deploy.compact import compact
from lowbit.deploy.export import export, ledger
from lowbit.deploy.proof import check_arithmetic, verify
from lowbit.engines.read_back import read_back
from lowbit.errors import InputError, UnsupportedError
from lowbit.flows.given import float_model_and_data
from lowbit.flows.kept_samples import BATCH, batches, first, keep, passing, room
from lowbit.graph import PASSES
from lowbit.metadata import to_text
from lowbit.model import Model
from lowbit.network.calibrate import Batch, observe, solve_weights, tensors
from lowbit.network.footprint import footprint
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.why_float import nothing_quantized
from lowbit.numerics import Format
from lowbit.recipe import IMPROVE, Recipe, find_recipe
from lowbit.repair.correct_bias import correct_bias
from lowbit.repair.improve import float_outputs, keep_if_better, output_error
from lowbit.repair.leave_in_float import leave_in_float
from lowbit.repair.ranges import choose_ranges
from lowbit.repair.smooth import smooth_activations
from lowbit.repair.widen_scales import widen_scales_for_biases
from lowbit.targets import find_target

LEAST_MEMORY = 2**10  # bytes; a single sample may take more
MEMORY = 2**30  # bytes that samples and activations may take, beside the network itself and what libraries take
# Samples that ranges and biases are fitted to: as many as make this many bytes of activations on their way through the
# network, within limits. Each costs about six passes, and a small network gains from more: a keyword spotter's outputs
# 33.5 dB with 32, 34.9 with 64, 35.3 with 184 (same answer as float 98.9 % with 64, 99.5 % with 184).
FITTED_BYTES = 2**31
FITTED = (8, 200)
LEAST_JUDGING = 8  # samples that judge a large network; of small ones all that were kept for it
PROOF_SAMPLES = 8  # that the written file is run on, at most, and as few as 2 of large ones: millions of codes

Stage = Callable[[str], object]


def _silent(step: str) -> None:
    pass


def quantize(
    model: Any,
    calibration: Any = None,
    recipe: "str | Path | Format | Recipe" = "int8",
    *,
    target: str | None = None,
    memory: int = MEMORY,
    stage: Stage = _silent,
) -> Model:
    """A model in integers that a standard engine runs.

    model         a Model, whatever `load` takes, or a torch module: its example inputs are the first of the data
    calibration   some hundred typical inputs, unlabelled: arrays, tensors, dicts, a DataLoader, any iterable of
                  batches; None where the recipe quantizes weights alone
    recipe        a preset ("int8"), a format for all weights ("mxfp4"), a TOML file or a Recipe
    target        engine profile, see lowbit.TARGETS; None: the recipe's own
    memory        bytes that samples and activations may take; how many go through the network at once follows from it
    stage         called with a word or two when another step begins

    The deployed program is run against the simulation before it is returned; MismatchError if they differ by more than
    one step anywhere. What became of each tensor is in the ledger, which travels in the saved file.
    """
    model, data, chosen = _given(model, calibration, recipe, target)
    chosen.check_deployable()
    ready = _calibrated(model, data, chosen, memory, stage)
    if calibration is None:
        ready.notes.append("no data was given: the proof ran the file on made-up inputs")
    stage("writing and proving")
    program = export(ready.simulation)
    parity = verify(ready.simulation, program, ready.proof)
    program = compact(program, ready.simulation.program)
    runs = read_back(program, find_target(ready.recipe.target).engine)
    rows = ledger(ready.simulation, runs)
    check_arithmetic(ready.simulation, rows, runs)
    program.metadata_props.update(
        {
            "lowbit.version": lowbit.__version__,
            "lowbit.recipe": ready.recipe.to_toml(),
            "lowbit.ledger": to_text(rows),
            "lowbit.passes": json.dumps(ready.notes),
            "lowbit.parity": json.dumps(asdict(parity) | {"read_back": runs.unread or runs.engine}),
        }
    )
    return Model(program, model.source)


def simulation(
    model: Any,
    calibration: Any = None,
    recipe: "str | Path | Format | Recipe" = "int8",
    *,
    target: str | None = None,
    memory: int = MEMORY,
) -> Network:
    """The quantized network as a torch module, also in formats that no engine computes; arguments as in `quantize`.

    `with simulation.mode("quantize"): simulation.module(x)` gives {output: tensor}.
    """
    return _calibrated(*_given(model, calibration, recipe, target), memory).simulation


def _given(
    model: Any, calibration: Any, recipe: "str | Path | Format | Recipe", target: str | None
) -> tuple[Model, Data, Recipe]:
    chosen = find_recipe(recipe, target)
    return *float_model_and_data(model, calibration, chosen), chosen


@dataclass(frozen=True)
class _Calibrated:
    """A simulation with every scale and code chosen, and what exporting it needs to tell."""

    recipe: Recipe
    simulation: Network
    notes: list[str]
    proof: list[Batch]


def _calibrated(model: Model, data: Data, chosen: Recipe, memory: int, stage: Stage = _silent) -> _Calibrated:
    if not isinstance(memory, int) or memory < LEAST_MEMORY:
        raise InputError(f"memory={memory!r} is no number of bytes that calibration can work with: 1024 or more.")
    prepared = model.copy()
    stream = data.samples(BATCH, memory // 16)
    kept = keep(data, stream, memory // 4)

    notes = [line for name in chosen.passes if name in PASSES for line in PASSES[name](prepared.program)]
    if "smooth" in chosen.passes:
        notes += smooth_activations(prepared.program, (samples.inputs for samples in kept.fitting))
    placement = place(prepared.program, chosen)
    for told in placement.idle_rules:
        warnings.warn(told, stacklevel=3)
    if not placement.sites:
        why = nothing_quantized(placement.float_reasons)
        raise UnsupportedError(
            f"no tensor of '{model.source}' can be quantized: {why}. `lowbit compress` and `lowbit pack` make it "
            "smaller."
        )
    simulation = Network(prepared.program, placement)
    one = next(first(data, kept.judging, 1))
    size = footprint(simulation.module, tensors(simulation, one.inputs))
    in_batches = partial(batches, data, footprint=size, most_bytes=memory // 2)
    observe(simulation, in_batches(chain(kept.judging, kept.fitting, stream)))
    _warn_of_constant_inputs(simulation)
    affordable = passing(size, one, FITTED_BYTES)
    judging = list(in_batches(first(data, kept.judging, max(affordable, LEAST_JUDGING))))
    exact = float_outputs(simulation, judging) if set(IMPROVE) & set(chosen.passes) else []
    fitted = min(max(affordable, FITTED[0]), FITTED[1])
    by_gradient = list(in_batches(first(data, kept.fitting, fitted)))
    together = min(fitted, room(size, one, memory // 4))  # each twice: exact and quantized
    by_layer = list(in_batches(first(data, kept.fitting, together)))

    def settle(simulation: Network) -> tuple[list[str], float]:
        new = [q for q in simulation.activations().values() if not (q.dynamic or q.statistics.count)]
        if new:  # values that get a quantizer because a layer beside them lost its own
            observe(simulation, in_batches(chain(kept.judging, kept.fitting)), new)
        stage("choosing ranges")
        choose_ranges(simulation, by_gradient)
        stage("solving weights")
        solve_weights(simulation, by_layer)
        said = widen_scales_for_biases(simulation)
        if "correct_bias" not in chosen.passes:
            return said, output_error(simulation, judging, exact) if exact else 0.0
        stage("correcting biases")
        done, error = keep_if_better(simulation, lambda: correct_bias(simulation, by_layer), judging, exact)
        return said + done, error

    if kept.shared and set(IMPROVE) & set(chosen.passes):
        notes.append("judged by the samples that were fitted to: there are no others")
    said, error = settle(simulation)
    notes += said
    if "leave_in_float" in chosen.passes:
        simulation, chosen, said = leave_in_float(simulation, chosen, error, settle, judging)
        notes += said
    proof = list(in_batches(first(data, kept.judging, min(PROOF_SAMPLES, max(2, affordable)))))
    return _Calibrated(chosen, simulation, notes, proof)


def _warn_of_constant_inputs(simulation: Network) -> None:
    """Calibration data of one value only is a slip more often than it is meant."""
    for port in simulation.program.graph.inputs:
        quantizer = simulation.activations().get(str(port.name))
        if quantizer is not None and float(quantizer.statistics.minimum) == float(quantizer.statistics.maximum):
            warnings.warn(
                f"input '{port.name}' is {float(quantizer.statistics.minimum):g} throughout the calibration data; "
                "ranges chosen from it mean nothing for other inputs.",
                stacklevel=4,
            )
