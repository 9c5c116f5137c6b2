"""Post-training quantization, the whole story: passes, placement, one calibration pass, codes, file, proof."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir

import lowbit
from lowbit.data import Data
from lowbit.deploy.compact import compact
from lowbit.deploy.export import export, ledger
from lowbit.deploy.proof import StatesMismatchError, check_arithmetic, verify
from lowbit.engines.compile import Batch
from lowbit.engines.profile import layer_seconds
from lowbit.engines.read_back import read_back
from lowbit.errors import InputError, ModelError, ShapeError, UnsupportedError
from lowbit.flows.given import float_model_and_data
from lowbit.flows.kept_samples import BATCH, batches, first, keep, passing, pieces, room
from lowbit.flows.masks import prune_once
from lowbit.flows.rest import round_constants
from lowbit.graph import PASSES
from lowbit.graph.layer import RECURRENT, layer_names
from lowbit.integer.engine import IntegerReference
from lowbit.integer.sizes import sizes_of
from lowbit.metadata import to_text
from lowbit.model import Model
from lowbit.network.calibrate import observe, tensors
from lowbit.network.footprint import footprint
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.sites import Placement
from lowbit.network.why_float import nothing_quantized
from lowbit.numerics import Format
from lowbit.presets import find_recipe
from lowbit.recipe import Recipe, TensorSpec
from lowbit.repair.normalize import normalize_inputs
from lowbit.repair.prove import Calibration, float_outputs
from lowbit.repair.sensitivity import SAMPLES
from lowbit.repair.smooth import smooth_activations
from lowbit.repair.steps import STEPS, take_steps

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
    model, data, chosen = given(model, calibration, recipe, target)
    chosen.check_deployable()
    seen = observed(model, data, chosen, memory, stage)
    if calibration is None:
        seen.notes.append("no data was given: the proof ran the file on made-up inputs")
    return written(settled(seen, chosen), stage)


def written(ready: "Observed", stage: Stage = _silent) -> Model:
    """The file of a network that is settled, run against the simulation and read back from the engine."""
    stage("writing and proving")
    network = ready.network
    final, target = network.placement.recipe, network.placement.target
    program = export(network)
    parity = verify(ready.trained or network, program, ready.proof)
    notes = ready.notes + ([_states_held(ready, program)] if network.placement.states else [])
    program = compact(program, network.program)
    runs = read_back(program, target.engine)
    rows = ledger(network, runs)
    # The integer program has these in integers; onnxruntime, which reads its files back, only in float.
    elsewhere = ("ConvTranspose", *RECURRENT) if target.whole else ()
    check_arithmetic(network, rows, runs, elsewhere)
    program.metadata_props.update(
        {
            "lowbit.version": lowbit.__version__,
            "lowbit.recipe": final.to_toml(),
            "lowbit.ledger": to_text(rows),
            "lowbit.passes": json.dumps(notes),
            "lowbit.parity": json.dumps(asdict(parity) | {"read_back": runs.unread or runs.engine}),
        }
    )
    return Model(program, ready.source)


def _states_held(ready: "Observed", program: ir.Model) -> str:
    """Hold recurrent layers against the integer program, which rounds their states as the simulation does; told so.

    Only samples of one length: the program has fixed sizes. States that leave the simulated ones are a warning: the
    file is what was asked for, and `lowbit compare --engine integer` says what it is worth.
    """
    one, *_ = ready.proof
    alike = [b for b in ready.proof if all(b[name].shape == x.shape for name, x in one.items())]
    try:
        verify(ready.trained or ready.network, program, alike, IntegerReference(sizes=sizes_of(program, one)))
    except (ModelError, ShapeError, UnsupportedError) as why:
        return f"left out: holding the states of recurrent layers against integers: {why}"
    except StatesMismatchError as apart:
        warnings.warn(str(apart), stacklevel=4)
        return str(apart)
    return f"states of recurrent layers were held against integers on {len(alike)} of {len(ready.proof)} samples"


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
    model, data, chosen = given(model, calibration, recipe, target)
    return settled(observed(model, data, chosen, memory), chosen).network


def given(
    model: Any, calibration: Any, recipe: "str | Path | Format | Recipe", target: str | None
) -> tuple[Model, Data, Recipe]:
    """What a flow is given, as it needs it."""
    chosen = find_recipe(recipe, target)
    return *float_model_and_data(model, calibration, chosen), chosen


@dataclass(frozen=True)
class Observed:
    """A network whose activations were observed on all of the data, once: recipes with its passes settle from here.

    notes    what was done so far
    proof    samples to prove a file with
    trained  what the file is held against where that is not the network, but what it was made of
    """

    source: str
    network: Network
    calibration: Calibration
    notes: list[str]
    proof: list[Batch]
    trained: Network | None = None

    def again(self, recipe: Recipe) -> "Observed":
        """The same for another recipe with the same passes: another network, with what this one has observed."""
        return replace(self, network=self.network.placed(placed(self.network.program, recipe, self.source)))


def observed(
    model: Model, data: Data, chosen: Recipe, memory: int = MEMORY, stage: Stage = _silent, *, prunes: bool = True
) -> Observed:
    """The recipe's passes and placement, and one pass over the data.

    prunes   weights are pruned at once, as the recipe's rules say; else later, while they train
    """
    if not isinstance(memory, int) or memory < LEAST_MEMORY:
        raise InputError(f"memory={memory!r} is no number of bytes that calibration can work with: 1024 or more.")
    prepared = model.copy()
    stream = data.samples(BATCH, memory // 16)
    kept = keep(data, stream, memory // 4)

    def activations(node: ir.Node) -> TensorSpec:
        return chosen.specs(layer_names(node))[1]

    notes: list[str] = []
    for name in chosen.passes:  # in their order, before all steps
        if name == "smooth":
            notes += smooth_activations(prepared.program, (samples.inputs for samples in kept.fitting))
        elif name == "normalize":
            inputs = (samples.inputs for samples in kept.fitting)
            notes += normalize_inputs(prepared.program, activations, inputs)
        elif name in PASSES:
            notes += PASSES[name](prepared.program)
    notes += prune_once(prepared.program, chosen) if prunes else []
    placement = placed(prepared.program, chosen, model.source)
    if chosen.rest != Recipe.rest:
        count = round_constants(prepared.program, chosen, placement.sites)
        notes.append(f"{count} constants rounded to {chosen.rest}")
    network = Network(prepared.program, placement)
    one = next(first(data, kept.judging, 1))
    size = footprint(network.module, tensors(network, one.inputs))
    in_batches = partial(batches, data, footprint=size, most_bytes=memory // 2)
    in_pieces = partial(pieces, data, footprint=size)
    observe(network, in_batches(chain(kept.judging, kept.fitting, stream)))
    _warn_of_constant_inputs(network)
    affordable = passing(size, one, FITTED_BYTES)
    fitted = min(max(affordable, FITTED[0]), FITTED[1])
    together = min(fitted, room(size, one, memory // 4))  # each twice: exact and quantized
    judging = list(in_pieces(first(data, kept.judging, max(affordable, LEAST_JUDGING)), most_bytes=memory // 2))
    single = list(in_pieces(first(data, kept.fitting, min(fitted, SAMPLES)), most_bytes=0))
    calibration = Calibration(
        fitting=list(in_batches(first(data, kept.fitting, fitted))),
        together=list(in_batches(first(data, kept.fitting, together))),
        judging=[samples.inputs for samples in judging],
        exact=[],
        observed=lambda: in_batches(chain(kept.judging, kept.fitting)),
        stage=stage,
        single=[samples.inputs for samples in single],
        judging_labels=[samples.labels for samples in judging if samples.labels is not None],
        single_labels=[samples.labels for samples in single if samples.labels is not None],
        made_up_signals=data.made_up and any(port.dtype.kind == "f" for port in model.inputs),
        again=lambda recipe: observed(model, data, recipe, memory, stage, prunes=prunes).network,
        seconds=lambda made, sample: sum(layer_seconds(export(made), (), sample).values()),
    )
    if kept.shared and any(name in STEPS for name in chosen.passes):
        notes.append("judged by the samples that were fitted to: there are no others")
    proved = first(data, kept.judging, min(PROOF_SAMPLES, max(2, affordable)))
    proof = list(in_batches(proved, most_bytes=0) if placement.states else in_batches(proved))  # integers take one
    return Observed(model.source, network, calibration, notes, proof)


def settled(seen: Observed, chosen: Recipe) -> Observed:
    """The network with every scale and code chosen, in place, and what was done."""
    steps = [name for name in chosen.passes if name in STEPS]
    exact = float_outputs(seen.network, seen.calibration.judging) if steps else []
    notes = take_steps(seen.network, steps, replace(seen.calibration, exact=exact, earlier=[]))
    return replace(seen, notes=seen.notes + notes)


def placed(program: ir.Model, recipe: Recipe, source: str) -> Placement:
    """Where the recipe puts quantizers; UnsupportedError where it can put none."""
    if recipe.ratio:
        raise InputError("the recipe's ratio is the size of a packed file: `lowbit compress` takes it.")
    placement = place(program, recipe)
    for told in placement.idle_rules:
        warnings.warn(told, stacklevel=4)
    if not placement.sites:
        why = nothing_quantized(placement.float_reasons)
        raise UnsupportedError(
            f"no tensor of '{source}' can be quantized: {why}. `lowbit compress` and `lowbit pack` make it smaller."
        )
    return placement


def _warn_of_constant_inputs(network: Network) -> None:
    """Calibration data of one value only is a slip more often than it is meant."""
    for port in network.program.graph.inputs:
        quantizer = network.activations().get(str(port.name))
        if quantizer is None or quantizer.dynamic:
            continue
        if float(quantizer.statistics.minimum) == float(quantizer.statistics.maximum):
            warnings.warn(
                f"input '{port.name}' is {float(quantizer.statistics.minimum):g} throughout the calibration data; "
                "ranges chosen from it mean nothing for other inputs.",
                stacklevel=4,
            )
