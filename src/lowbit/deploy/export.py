"""From a simulation to a deployable program: codes, scales and the ledger of what became of every tensor."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lowbit.deploy.kernels import REWRITES
from lowbit.deploy.write import ExpandedTensor, IntegerTensor, write
from lowbit.engines.read_back import BY_BLOCK, FLOAT, INTEGERS, ReadBack
from lowbit.errors import UnsupportedError
from lowbit.graph.layer import LAYERS, MULTIPLYING, layers_of
from lowbit.network.fakequant import FakeBias, FakeQuant, Simulation
from lowbit.network.sites import Site
from lowbit.network.weights import has_one_scale_an_output
from lowbit.network.why_float import constant_in_float
from lowbit.numerics import TENSOR, Format, Int, describe_format, group
from lowbit.ranges import range_words

Row = dict[str, Any]


def export(simulation: Simulation) -> ir.Model:
    """The program with its quantized values in integers, and what the flow changed in float."""
    for name in simulation.edited - simulation.placement.sites.keys():
        tensor = ir.tensor(simulation.parameter(name).detach().numpy(), name=name)
        simulation.program.graph.initializers[name].const_value = tensor
    written = write(simulation.program, integer_tensors(simulation))
    integer = _integer_nodes(simulation)
    for rewrite in REWRITES[simulation.placement.engine]:
        rewrite(written, integer)
    return written


def _integer_nodes(simulation: Simulation) -> set[str]:
    """The nodes that compute in integers: those of the placement whose weights an integer kernel can read."""
    weights = (site for site, _ in simulation.constants().values() if site.role == "weight")
    in_float = {site.layer for site in weights if _arithmetic(simulation, site) == FLOAT}
    return set(simulation.placement.integer - in_float)


def integer_tensors(simulation: Simulation) -> Iterator[IntegerTensor | ExpandedTensor]:
    """What to write for each site, in the order of the placement.

    onnxruntime's kernels for x86 read uint8: it turns int8 activations into that by itself, but not those that two
    nodes read or that are clipped, and a kernel between one it turned and one it did not stays in float.
    """
    unsigned = simulation.placement.engine == "onnxruntime"
    constants = [site for site, _ in simulation.constants().values()]
    by_block = {site.layer for site in constants if _arithmetic(simulation, site) == BY_BLOCK}
    for name, site in simulation.placement.sites.items():
        quantizer = simulation.quantizers[name]
        if isinstance(quantizer, FakeBias):
            yield _bias(simulation, site, quantizer)
        elif site.role != "activation":
            constant = _constant(simulation, site, quantizer)
            if unsigned and site.role == "constant" and isinstance(constant, IntegerTensor):
                constant = constant.unsigned()
            yield constant
        elif not (quantizer.dynamic and site.readers and {layer for layer, _ in site.readers} <= by_block):
            activation = _activation(site, quantizer)
            yield activation.unsigned() if unsigned else activation  # else the kernel of blocks quantizes it


def _activation(site: Site, quantizer: FakeQuant) -> IntegerTensor:
    grid = quantizer.format.grid
    if not isinstance(grid, Int) or quantizer.dynamic:
        raise UnsupportedError(
            f"'{site.value}': an activation in {describe_format(quantizer.format)} can be simulated, but no engine "
            "computes it. Use an integer format for activations that are to be deployed; 'int8 group:32' for a MatMul "
            "whose weights are in 'int4 group:32'."
        )
    scale, zero = quantizer.scale.numpy(), quantizer.zero.numpy()
    return IntegerTensor(site.value, scale, zero, grid.bits, grid.signed, narrow=grid.narrow, readers=site.readers)


def _constant(simulation: Simulation, site: Site, quantizer: FakeQuant) -> IntegerTensor | ExpandedTensor:
    stored, arithmetic = quantizer.stored, _arithmetic(simulation, site)
    assert stored is not None
    if arithmetic == FLOAT:
        return ExpandedTensor(site.value, stored, site.readers)
    grid = stored.format.grid
    assert isinstance(grid, Int)
    scale, zero, codes = (np.asarray(t) for t in (stored.scale_values(), stored.zero_values(), stored.codes))
    axis: int | None
    if arithmetic == BY_BLOCK:
        (axis, block), *_ = [pair for pair in enumerate(stored.tile) if pair[1] > 1]
    else:
        axis, block = next((axis for axis, count in enumerate(stored.tiles) if count > 1), None), 0
        scale, zero = (t.reshape(() if axis is None else -1) for t in (scale, zero))
    return IntegerTensor(
        site.value, scale, zero, grid.bits, grid.signed, codes, axis=axis, block=block, readers=site.readers
    )


def _arithmetic(simulation: Simulation, site: Site) -> str:
    """What an engine computes in where it multiplies with a constant.

    INTEGERS   codes of at most 8 bits, one scale a tensor or output channel, and such activations
    BY_BLOCK   onnxruntime's MatMulNBits: 4-bit weights in blocks along the sum, activations in int8 in equal blocks
    FLOAT      everything else
    """
    quantizer = simulation.quantizers[site.value]
    assert isinstance(quantizer, FakeQuant)
    weights, stored = quantizer.format, quantizer.stored
    assert stored is not None
    node = next(n for n in simulation.program.graph if n.name == site.layer)
    activations = _activations_beside(simulation, site, node)
    if site.role == "constant":
        return INTEGERS if _fit_in_8_bits(weights, *_quantized_around(simulation, node)) else FLOAT
    if activations is None or not all(isinstance(kind.grid, Int) for kind in (weights, activations)):
        return FLOAT
    output, summed = next((w.output_axis, w.summed_axis) for w in layers_of(node) if w.value.name == site.value)
    if activations.block == TENSOR:
        if simulation.placement.engine == "openvino" and np.any(np.asarray(stored.zero_values())):
            return FLOAT  # its convolutions in integers read weights without a zero point
        whole = has_one_scale_an_output(weights.block, stored.shape, output)
        return INTEGERS if whole and _fit_in_8_bits(weights, *_quantized_around(simulation, node)) else FLOAT
    length = stored.tile[summed]
    equal = [length if axis == summed else 1 for axis in range(len(stored.tile))] == list(stored.tile)
    fits = equal and stored.shape[summed] % length == 0 and activations.block == group(length)
    return BY_BLOCK if fits and weights.grid.bits == 4 and activations.grid == Int(8) else FLOAT


def _fit_in_8_bits(*formats: Format | None) -> bool:
    return all(kind is not None and isinstance(kind.grid, Int) and kind.grid.bits <= 8 for kind in formats)


def _quantized_around(simulation: Simulation, node: ir.Node) -> list[Format | None]:
    """Formats of the activations that a node reads and writes, the latter also behind its clip."""
    sites = simulation.placement.sites
    clips = [use.node for value in node.outputs for use in value.uses() if use.node.op_type in ("Relu", "Clip")]
    values = [v for n in (node, *clips) for v in (*n.inputs, *n.outputs) if v is not None]
    found = [sites[str(v.name)] for v in values if v.name in sites]
    return [site.spec.format for site in found if site.role == "activation"]


def _activations_beside(simulation: Simulation, site: Site, node: ir.Node) -> Format | None:
    """The format of what a weight is multiplied with; None: float."""
    data = simulation.placement.sites.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
    linear = node.op_type in LAYERS and LAYERS[node.op_type].reads is not None
    if not linear or data is None or site.layer not in simulation.placement.integer:
        return None
    return data.spec.format


def _bias(simulation: Simulation, site: Site, quantizer: FakeBias) -> IntegerTensor:
    bias = simulation.parameter(site.value).detach()
    scale = quantizer.scale().expand(bias.shape)
    codes = quantizer.codes(bias).numpy()
    return IntegerTensor(site.value, scale.numpy(), np.zeros(bias.shape, np.int32), 32, True, codes, axis=0)


def ledger(simulation: Simulation, runs: ReadBack | None = None) -> list[Row]:
    """A row for every stored tensor and every quantized value: what became of it and why.

    runs   what the engine made of the file; an operator that could run in integers and does not is then named
    """
    rows = [_site_row(simulation, site) for site in simulation.placement.sites.values()]
    if runs is not None and not runs.unread:
        for row in rows:
            if row["role"] == "constant":
                row["arithmetic"] = runs.of(row["layer"])
            elif row["role"] == "activation" and row["layer"] in simulation.placement.integer:
                row |= {} if runs.of(row["layer"]) == INTEGERS else {"arithmetic": runs.of(row["layer"])}
    reasons = simulation.placement.float_reasons
    multiplied = {
        w.value.name for node in simulation.program.graph for w in layers_of(node) if node.op_type in MULTIPLYING
    }
    for value in (v for graph in simulation.program.graphs() for v in graph.initializers.values()):
        if value.name not in simulation.placement.sites and value.const_value is not None:
            rows.append(_constant_row(value, value.const_value, simulation))
            rows[-1] |= {"arithmetic": FLOAT} if value.name in multiplied else {}
    for node in simulation.program.graph:
        if node.name in reasons:
            rows.append({"tensor": node.outputs[0].name, "role": "activation", "layer": node.name, "format": "float32",
                         "bits": 32, "bytes": 0, "status": "float", "reason": reasons[str(node.name)]})  # fmt: skip
    return rows


def _constant_row(value: ir.Value, tensor: ir.TensorProtocol, simulation: Simulation) -> Row:
    """A constant without a quantizer, also inside the body of an If, a Loop or a Scan."""
    return {
        "tensor": value.name,
        "role": "value",
        "layer": next((str(use.node.name) for use in value.uses()), ""),
        "format": str(tensor.dtype.name).lower(),
        "bits": tensor.dtype.bitwidth,
        "bytes": tensor.nbytes,
        "status": "float" if tensor.dtype.is_floating_point() else "kept",
        "reason": constant_in_float(value, simulation.program, simulation.placement.float_reasons),
    }


def _site_row(simulation: Simulation, site: Site) -> Row:
    quantizer = simulation.quantizers[site.value]
    row: Row = {"tensor": site.value, "role": site.role, "layer": site.layer, "status": "quantized", "reason": ""}
    if isinstance(quantizer, FakeBias):
        count = simulation.parameter(site.value).numel()
        return row | {"format": "int32", "bits": 32.0, "bytes": 4 * count, "range": "", "solver": "", "sqnr_db": None}
    row |= {"format": describe_format(quantizer.format), "range": range_words(quantizer.spec.range)}
    if site.role == "activation":
        row |= {"bits": quantizer.format.bits_per_element(), "bytes": 0, "group": site.group}
        return row if quantizer.dynamic else row | dict(zip(("lo", "hi"), quantizer.limits(), strict=True))
    weight, stored = simulation.parameter(site.value).detach(), quantizer.stored
    assert stored is not None
    noise = (weight - torch.as_tensor(np.asarray(stored.dequantize()))).square().sum().item()
    power = weight.square().sum().item()
    return row | {
        "arithmetic": _arithmetic(simulation, site),
        "solver": quantizer.spec.solve,
        "bits": stored.format.bits_per_element(stored.shape),
        "bytes": round(stored.bits / 8),
        "sqnr_db": round(10 * np.log10(power / noise), 2) if noise and power else None,
    }
