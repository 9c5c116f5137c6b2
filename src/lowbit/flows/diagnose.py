"""Diagnosis: where the error of a quantized network arises, why, and what to do; each number is measured.

The file that would be deployed is made and run. What each tensor's rounding costs is estimated from a few backward
passes (`repair.sensitivity`); the error at each layer is read off the file beside the float network.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from lowbit.data import Data
from lowbit.engines.compile import ENGINES, Batch
from lowbit.engines.profile import OperatorTime, operator_times
from lowbit.errors import DataError, LowbitError, UnsupportedError
from lowbit.flows.causes import Context, Finding, Remedy, dead_channels, explain, too_few_samples, with_lines
from lowbit.flows.compare import Comparison, compare
from lowbit.flows.diagnosis import Diagnosis, LayerRow, Shifted
from lowbit.flows.fidelity import layer_fidelity
from lowbit.flows.inputs import InputFacts, input_facts, prepared_unlike
from lowbit.flows.metrics import Metric
from lowbit.flows.operations import Operations, multiply_adds, operations
from lowbit.flows.ptq import MEMORY, Observed, Stage, _silent, given, observed, settled, written
from lowbit.flows.shifts import Shift, shifted, usual_shifts
from lowbit.flows.tensor_facts import TensorFacts, Walked, growth, tensor_facts, walk_once
from lowbit.graph.layer import layer_names
from lowbit.graph.smooth import smoothable
from lowbit.model import Model
from lowbit.network.network import Network
from lowbit.numerics import Format
from lowbit.numerics.noise import decibels
from lowbit.recipe import Recipe
from lowbit.repair.prove import Outputs, output_error
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.repair.wider import layers_around
from lowbit.report.ledger import Ledger

SAMPLES = 200  # that shifts are tried on, and that are compared where there is no test data
SLOW = frozenset({"adaround"})  # solvers that take minutes
TRIED = 4  # remedies: each calibrates anew, but for the pass over the data


def diagnose(
    model: Any,
    calibration: Any,
    recipe: "str | Path | Format | Recipe" = "int8",
    *,
    test: Any = None,
    metric: str | Metric | Callable[..., float] | None = None,
    target: str | None = None,
    shifts: Sequence[str] | None = None,
    tries: Iterable[Any] = (),
    latency: bool = True,
    memory: int = MEMORY,
    stage: Stage = _silent,
) -> Diagnosis:
    """Quantize a network and say where its error arises, why, and what to do.

    model, calibration, recipe, target, memory, stage   as in `quantize`
    test     other samples, with labels where there are any; None: the calibration data are compared on
    metric   as in `compare`
    shifts   "noise:0.5", "blur:1", "brightness:0.5", "contrast:0.5", "length:2"; None: the usual ones; (): none
    tries    rows of a search: mappings or dataclasses of (what, metric, bytes, latency, seconds)
    latency  measure it, of the whole networks and of their operators
    """
    if calibration is None:
        raise DataError("diagnose measures on samples: give some hundred typical inputs as calibration data.")
    asked = None if shifts is None else [Shift.parse(words) for words in shifts]
    model, data, chosen = given(model, calibration, recipe, target)
    chosen.check_deployable()
    if test is None and not data.source.repeatable:
        raise DataError("the data can be read only once: give a list or a DataLoader, or other samples as test.")
    ready = settled(seen := observed(model, data, chosen, memory, stage), chosen)
    quantized = written(ready, stage)
    stage("comparing")
    judged = _few(data) if test is None else Data.of(test, model.inputs)
    comparison = compare(model, quantized, judged, metric, layers=False, latency=latency)
    recipe_name = Path(recipe).stem if isinstance(recipe, (str, Path)) else "a recipe"
    kept = list(ready.calibration.observed())
    inputs = input_facts(kept, model.inputs)
    tested = input_facts((s.inputs for s in _few(judged).samples()), model.inputs)
    stage("measuring tensors")
    walked = walk_once(ready.network, kept[0])
    facts, measured = _facts(ready, kept, walked)
    samples = data.count or sum(map(_count, kept))
    findings = _findings(ready.network, facts, samples)
    ledger = Ledger.of(quantized)
    counts = multiply_adds(ready.network.program, walked.shapes, _count(kept[0]))
    layers = _layers(ready.network, quantized, facts, counts, kept[0], ledger)
    stage("trying remedies")
    findings = _tried(findings, model, data, seen, ready, memory)
    stage("shifting inputs")
    return Diagnosis(
        source=model.source,
        recipe_name=recipe_name,
        recipe=quantized.metadata["lowbit.recipe"],
        samples=samples,
        on_test_data=test is not None,
        comparison=_called(comparison, f"{Path(model.source).name} in {recipe_name}"),
        layers=tuple(layers),
        tensors=tuple(facts),
        findings=(*prepared_unlike(inputs, tested), *findings, *dead_channels(facts)),
        measured_db=decibels(measured),
        estimated_db=decibels(sum(x.cost or 0.0 for x in facts)),
        shifts=tuple(_shifts(model, quantized, judged, asked, inputs, metric)),
        operations=_operations(ready.network, layers, counts, ledger),
        times=_times(model, quantized, judged) if latency else ((), ()),
        bytes_by_kind=ledger.bytes_by_kind(),
        left_in_float=tuple(row for row in ledger.rows if row.get("status") == "float"),
        steps=tuple(ready.notes),
        tries=tuple(map(_flat, tries)),
    )


def _called(comparison: Comparison, name: str) -> Comparison:
    return replace(comparison, candidate=replace(comparison.candidate, name=name))


def _times(model: Model, quantized: Model, judged: Data) -> tuple[tuple[OperatorTime, ...], tuple[OperatorTime, ...]]:
    """Of each operator of both networks, on one sample."""
    sample = judged.cut(next(judged.samples(1)), 1).inputs
    return tuple(operator_times(model.program, sample)), tuple(operator_times(quantized.program, sample))


def _findings(network: Network, facts: Sequence[TensorFacts], samples: int) -> list[Finding]:
    """Causes, the one with the largest share of the error first."""
    found = [*explain(facts, _context(network)), *too_few_samples(facts, samples)]
    return sorted(found, key=lambda finding: -(finding.share or 0.0))


def _few(data: Data) -> Data:
    """The first SAMPLES, or as many of them as the network takes at once a whole number of times."""
    at_once = data.fixed_batch or 1
    return data.take(max(at_once, SAMPLES - SAMPLES % at_once))


def _flat(row: Any) -> dict[str, Any]:
    """A row of a search, what it measured beside the rest; recipes are too long for a table."""
    flat: dict[str, Any] = {}
    for key, value in (row if isinstance(row, Mapping) else asdict(row)).items():
        flat |= value if isinstance(value, Mapping) else {} if key == "recipe" or value is None else {key: value}
    return flat


def _count(batch: Batch) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)


def _facts(ready: Observed, kept: Sequence[Batch], walked: Walked) -> tuple[list[TensorFacts], float]:
    """What is measured of each tensor, and the error of the outputs with all of them quantized."""
    network, judging = ready.network, ready.calibration.judging
    outputs = sum(v.dtype is not None and v.dtype.is_floating_point() for v in network.program.graph.outputs)
    batches = ready.calibration.single or judging
    sums = quantizer_costs(network, batches)
    costs = {name: cost / len(batches) / max(1, outputs) for name, cost in sums.items()}
    facts = tensor_facts(network, costs, walked, growth(network, kept))
    return facts, output_error(network, judging, _exact(network, judging))


def _tried(
    findings: Sequence[Finding], model: Model, data: Data, seen: Observed, ready: Observed, memory: int
) -> list[Finding]:
    """The findings; of the first TRIED remedies that have lines for the recipe, with the outputs that these give.

    Ranges, codes and steps are found anew: taking one tensor out of the quantized network would not do, since its
    biases, and what GPTQ made of the layers behind, make up for that tensor's error too.
    """
    recipe, judging = ready.network.placement.recipe, ready.calibration.judging
    exact, left = _exact(ready.network, judging), TRIED

    def tried(remedy: Remedy) -> Remedy:
        nonlocal left
        if not left or not remedy.recipe:
            return remedy
        better = with_lines(recipe, remedy.recipe)
        if any(rule.weights is not None and rule.weights.solve in SLOW for rule in better.rules[len(recipe.rules) :]):
            return replace(remedy, told=f"{remedy.told} It takes minutes, and was not tried here.")
        left -= 1
        try:
            again = seen.again(better) if better.passes == recipe.passes else observed(model, data, better, memory)
            error = output_error(settled(again, better).network, judging, exact)
        except UnsupportedError:
            return Remedy(f"{remedy.told} Nothing would be left in integers.")
        return replace(remedy, outputs_db=decibels(error))

    return [replace(finding, remedies=tuple(map(tried, finding.remedies))) for finding in findings]


def _exact(network: Network, batches: Sequence[Batch]) -> Outputs:
    """What the float network gives: its program, since steps may have corrected the network's own biases."""
    run = ENGINES["onnxruntime"].compile(network.program)
    return [{name: torch.from_numpy(array) for name, array in run(dict(batch)).items()} for batch in batches]


def _context(network: Network) -> Context:
    placement, program = network.placement, network.program
    return Context(
        placement.recipe,
        placement,
        {str(node.name): placement.recipe.specs(layer_names(node)) for node in program.graph},
        {str(node.name): _word(node) for node in program.graph},
        lambda value: layers_around(program, placement, placement.sites[value].group),
        frozenset(smoothable(program)),
    )


def _word(node: ir.Node) -> str:
    """What a rule calls a node: its weight without '.weight', or its own name."""
    names = layer_names(node)
    return names[2] if len(names) > 3 else names[0]


def _layers(
    network: Network,
    quantized: Model,
    facts: Sequence[TensorFacts],
    counts: Mapping[str, int],
    batch: Batch,
    ledger: Ledger,
) -> list[LayerRow]:
    """Rows in the network's order, those of quantized inputs first."""
    sites, names = network.placement.sites, {id(network.quantizers[x.name]): x.name for x in facts}
    made: dict[str, str] = {}
    weights: dict[str, str] = {}
    inputs = [str(v.name) for v in network.program.graph.inputs if v.name in sites]
    found = [LayerRow(name, name, "input", None, name, None, 0, None, "") for name in inputs]
    shown: set[str | None] = set(inputs)
    for site in (site for name, site in sites.items() if name not in inputs):
        (made if site.role == "activation" else weights).setdefault(site.layer, site.value)
    db = {x.value: x.sqnr_db for x in layer_fidelity(network.program, quantized.program, [batch])}
    rows = {str(row["tensor"]): row for row in ledger.rows}
    for node in network.program.graph:
        node_name = str(node.name)
        activation, weight = made.get(node_name), weights.get(node_name)
        tensor = None if activation is None else names.get(id(network.quantizers[activation]))
        if weight is None and node_name not in counts and (tensor is None or tensor in shown):
            continue  # it only moves values
        shown.add(tensor)
        value = activation or str(node.outputs[0].name)
        weight_row = rows.get(weight or "", {})
        read = sites.get(str(node.inputs[0].name)) if node.inputs and node.inputs[0] is not None else None
        kind = None if read is None else read.spec.format
        stored = sites[weight].spec.format if weight is not None else None
        integers = weight_row.get("arithmetic") == "integers"
        reason = rows.get(str(node.outputs[0].name), {}).get("reason") or weight_row.get("reason") or ""
        found.append(
            LayerRow(
                name=_word(node),
                node=node_name,
                operator=node.op_type,
                weight=weight,
                activation=tensor,
                accumulated_db=db.get(value),
                multiply_adds=counts.get(node_name, 0),
                bits=(stored.grid.bits, kind.grid.bits) if integers and stored and kind else None,
                reason=str(reason),
            )
        )
    return found


def _operations(
    network: Network, layers: Sequence[LayerRow], counts: Mapping[str, int], ledger: Ledger
) -> tuple[Operations, Operations]:
    """Of the float network, and of the quantized one."""
    weights = [value.const_value for value in network.program.graph.initializers.values()]
    float_bytes = sum(w.nbytes for w in weights if w is not None and w.dtype.is_floating_point())
    stored_bytes = sum(row["bytes"] for row in ledger.stored("quantized", "float"))
    bits = {row.node: row.bits for row in layers if row.bits is not None}
    return operations(counts, {}, float_bytes), operations(counts, bits, stored_bytes)


def _shifts(
    model: Model,
    quantized: Model,
    data: Data,
    asked: Sequence[Shift] | None,
    inputs: Mapping[str, InputFacts],
    metric: Any,
) -> Iterator[Shifted]:
    """Both networks on the samples as they are, then on each shift; None asked: the usual ones.

    A network that cannot take a shift, as a position beyond its table, is told, not hidden.
    """
    kinds = usual_shifts(model.inputs, inputs) if asked is None else asked
    for shift in (None, *kinds) if kinds else ():
        samples = _few(data) if shift is None else shifted(_few(data), shift, model.inputs, inputs)
        try:
            yield Shifted(str(shift or "none"), compare(model, quantized, samples, metric, latency=False, layers=False))
        except LowbitError as problem:
            yield Shifted(str(shift), None, str(problem))
