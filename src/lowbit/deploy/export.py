"""From a network to a deployable program, and the ledger of what became of every tensor."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lowbit.deploy.kernels import REWRITES
from lowbit.deploy.write import ActivationTensor, BiasTensor, MeasuredTensor, StoredTensor, Tensor, write
from lowbit.engines.read_back import BY_BLOCK, FLOAT, INTEGERS, ReadBack
from lowbit.errors import UnsupportedError
from lowbit.graph.halves import store_halves
from lowbit.graph.layer import MULTIPLYING, layers_of
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant
from lowbit.network.sites import Site
from lowbit.network.stored import PIECE, FakeBias, WeightQuant
from lowbit.network.weights import has_one_scale_an_output
from lowbit.network.why_float import constant_in_float
from lowbit.numerics import TENSOR, Format, Int, QuantTensor, describe_format, group
from lowbit.numerics.grids import is_whole
from lowbit.numerics.noise import decibels
from lowbit.ranges import range_words

Row = dict[str, Any]


def export(network: Network, whole_codes: bool = False) -> ir.Model:
    """The program with its quantized values in few bits, and the float parameters that the network has now.

    whole_codes   each code takes 4, 8 or 16 bits, as an entropy coder wants it; else as many as its format says
    """
    written = write(network.program, _tensors(network), _changed(network), whole_codes, network.recurrent)
    integer = _integer_nodes(network)
    for rewrite in REWRITES[network.placement.target.name]:
        rewrite(written, integer)
    if network.placement.recipe.rest == "float16":
        store_halves(written, set(network.program.graph.initializers))
    return written


def _changed(network: Network) -> dict[str, np.ndarray[Any, Any]]:
    """Float initialisers that are not stored in few bits → what the network holds, where that is not the program's."""
    held = {}
    for name in network.module.meta["keys"]:
        value = network.program.graph.initializers.get(name)
        if value is None or value.const_value is None or not value.const_value.dtype.is_floating_point():
            continue
        if not network.is_stored(name):
            now = network.parameter(name).detach().cpu().numpy()
            if not np.array_equal(now, value.const_value.numpy(), equal_nan=True):
                held[name] = now
    return held


def _integer_nodes(network: Network) -> set[str]:
    """The nodes that compute in integers: those of the placement whose weights an integer kernel can read."""
    weights = (site for site, q in network.constants().values() if site.role == "weight" and q.stored is not None)
    in_float = {site.layer for site in weights if _arithmetic(network, site) == FLOAT}
    return set(network.placement.integer - in_float)


def _tensors(network: Network) -> Iterator[Tensor]:
    """What to write for each site, in the order of the placement.

    onnxruntime's kernels for x86 read uint8: it turns int8 activations into that by itself, but not those that two
    nodes read or that are clipped, and a kernel between one it turned and one it did not stays in float.
    """
    unsigned = network.placement.target.engine == "onnxruntime"
    constants = [site for site, q in network.constants().values() if q.stored is not None]
    by_block = {site.layer for site in constants if _arithmetic(network, site) == BY_BLOCK}
    for name, site in network.placement.sites.items():
        quantizer = network.quantizers[name]
        if isinstance(quantizer, FakeBias):
            yield _bias(network, site, quantizer)
        elif isinstance(quantizer, WeightQuant):
            if quantizer.stored is None:
                continue
            arithmetic, lift = _arithmetic(network, site), 0
            if unsigned and site.role == "constant" and arithmetic != FLOAT:
                grid = quantizer.stored.format.grid
                lift = _half_a_grid(grid if isinstance(grid, Int) else Int(8))
            yield StoredTensor(name, quantizer.stored, site.readers, arithmetic, lift)
        elif site.spec.dynamic:
            assert site.readers is not None
            if readers := frozenset(pair for pair in site.readers if pair[0] not in network.recurrent):
                yield MeasuredTensor(name, readers)  # else a recurrent layer quantizes it
        elif not (quantizer.dynamic and site.readers and {layer for layer, _ in site.readers} <= by_block):
            yield _activation(site, quantizer, unsigned)  # else the kernel of blocks quantizes it


def _activation(site: Site, quantizer: FakeQuant, unsigned: bool) -> ActivationTensor:
    grid = quantizer.format.grid
    if not isinstance(grid, Int) or quantizer.dynamic:
        raise UnsupportedError(
            f"'{site.value}': an activation in {describe_format(quantizer.format)} can be simulated, but no engine "
            "computes it. Use an integer format for activations that are to be deployed; 'int8 group:32' for a MatMul "
            "whose weights are in 'int4 group:32'."
        )
    scale, zero = quantizer.scale.numpy(), quantizer.zero.numpy()
    return ActivationTensor(site.value, scale, zero, grid, site.readers, _half_a_grid(grid) if unsigned else 0)


def _half_a_grid(grid: Int) -> int:
    """What makes signed codes of at most 8 bits unsigned."""
    return 1 << (grid.bits - 1) if grid.signed and grid.bits <= 8 else 0


def _arithmetic(network: Network, site: Site) -> str:
    """What an engine computes in where it multiplies with a constant.

    INTEGERS   codes of at most 8 bits, one scale a tensor or output channel, and such activations
    BY_BLOCK   onnxruntime's MatMulNBits: 4-bit weights in blocks along the sum, activations in int8 in equal blocks
    FLOAT      everything else
    """
    quantizer = network.quantizers[site.value]
    assert isinstance(quantizer, WeightQuant)
    stored = quantizer.stored
    assert stored is not None
    weights = stored.format
    node = next(n for n in network.program.graph if n.name == site.layer)
    beside = _site_beside(network, site, node)
    if beside is not None and (beside.spec.dynamic or node.name in network.recurrent):
        return _measured(site, node, stored)
    if site.role == "constant":
        return INTEGERS if _fit_in_8_bits(weights, *_quantized_around(network, node)) else FLOAT
    read = None if beside is None else beside.spec.format
    if read is None or not all(is_whole(kind.grid) for kind in (weights, read)):
        return FLOAT
    output, summed = next((w.output_axis, w.summed_axis) for w in layers_of(node) if w.value.name == site.value)
    if read.block == TENSOR:
        if network.placement.target.engine == "openvino" and np.any(np.asarray(stored.zero_values())):
            return FLOAT  # its convolutions in integers read weights without a zero point
        whole = has_one_scale_an_output(weights.block, stored.shape, output)
        return INTEGERS if whole and _fit_in_8_bits(weights, *_quantized_around(network, node)) else FLOAT
    length = stored.tile[summed]
    equal = [length if axis == summed else 1 for axis in range(len(stored.tile))] == list(stored.tile)
    fits = equal and stored.shape[summed] % length == 0 and read.block == group(length)
    four = isinstance(weights.grid, Int) and weights.grid.bits == 4
    return BY_BLOCK if fits and four and read.grid == Int(8) else FLOAT


def _measured(site: Site, node: ir.Node, stored: QuantTensor) -> str:
    """INTEGERS, for a weight whose layer measures the range of each input; UnsupportedError where no kernel does."""
    output = next(w.output_axis for w in layers_of(node) if w.value.name == site.value)
    whole = _fit_in_8_bits(stored.format) and has_one_scale_an_output(stored.format.block, stored.shape, output)
    if whole and (node.op_type in ("MatMul", "Gemm") or not np.any(np.asarray(stored.zero_values()))):
        return INTEGERS
    raise UnsupportedError(
        f"'{site.value}': weights in {describe_format(stored.format)} beside activations whose range each input has "
        "for itself can be simulated, but no engine computes them. Use 'int8 channel:0', or leave the activations of "
        f"'{site.layer}' in float."
    )


def _fit_in_8_bits(*formats: Format | None) -> bool:
    return all(kind is not None and is_whole(kind.grid) and kind.grid.bits <= 8 for kind in formats)


def _quantized_around(network: Network, node: ir.Node) -> list[Format | None]:
    """Formats of the activations that a node reads and writes, the latter also behind its clip."""
    sites = network.placement.sites
    clips = [use.node for value in node.outputs for use in value.uses() if use.node.op_type in ("Relu", "Clip")]
    values = [v for n in (node, *clips) for v in (*n.inputs, *n.outputs) if v is not None]
    found = [sites[str(v.name)] for v in values if v.name in sites]
    return [site.spec.format for site in found if site.role == "activation"]


def _site_beside(network: Network, site: Site, node: ir.Node) -> Site | None:
    """What a weight is multiplied with; None: it stays float."""
    data = network.placement.sites.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
    return data if site.layer in network.placement.integer else None


def _bias(network: Network, site: Site, quantizer: FakeBias) -> BiasTensor:
    bias = network.parameter(site.value).detach()
    return BiasTensor(site.value, quantizer.codes(bias).numpy(), quantizer.scale().expand(bias.shape).numpy())


def ledger(network: Network, runs: ReadBack | None = None) -> list[Row]:
    """A row for every stored tensor and every quantized value: what became of it and why.

    runs   what the engine made of the file; an operator that could run in integers and does not is then named
    """
    rows = [_site_row(network, site) for site in network.placement.sites.values()]
    if runs is not None and not runs.unread:
        for row in rows:
            if row["role"] == "constant":
                row["arithmetic"] = runs.of(row["layer"])
            elif row["role"] == "activation" and row["layer"] in network.placement.integer:
                row |= {} if runs.of(row["layer"]) == INTEGERS else {"arithmetic": runs.of(row["layer"])}
    rows += [
        {"tensor": f"{layer}.{state}", "role": "activation", "layer": layer, "format": describe_format(spec.format),
         "bits": spec.format.bits_per_element(), "bytes": 0, "status": "quantized", "reason": "", "range": "fixed"}
        for layer, specs in network.placement.states.items()
        for state, spec in specs.items()
        if spec.format is not None
    ]  # fmt: skip
    reasons = network.placement.float_reasons
    products = (node for node in network.program.graph if node.op_type in MULTIPLYING)
    multiplied = {weight.value.name for node in products for weight in layers_of(node)}
    for value in (v for graph in network.program.graphs() for v in graph.initializers.values()):
        if value.name not in network.placement.sites and value.const_value is not None:
            rows.append(_constant_row(value, value.const_value, network))
            rows[-1] |= {"arithmetic": FLOAT} if value.name in multiplied else {}
    for node in network.program.graph:
        if node.name in reasons:
            rows.append({"tensor": node.outputs[0].name, "role": "activation", "layer": node.name, "format": "float32",
                         "bits": 32, "bytes": 0, "status": "float", "reason": reasons[str(node.name)]})  # fmt: skip
    return rows


def _constant_row(value: ir.Value, tensor: ir.TensorProtocol, network: Network) -> Row:
    """A constant without a quantizer, also inside the body of an If, a Loop or a Scan."""
    return {
        "tensor": value.name,
        "role": "value",
        "layer": next((str(use.node.name) for use in value.uses()), ""),
        "format": str(tensor.dtype.name).lower(),
        "bits": tensor.dtype.bitwidth,
        "bytes": tensor.nbytes,
        "status": "float" if tensor.dtype.is_floating_point() else "kept",
        "reason": constant_in_float(value, network.program, network.placement.float_reasons),
    }


def _site_row(network: Network, site: Site) -> Row:
    quantizer = network.quantizers[site.value]
    row: Row = {"tensor": site.value, "role": site.role, "layer": site.layer, "status": "quantized", "reason": ""}
    if isinstance(quantizer, FakeBias):
        count = network.parameter(site.value).numel()
        return row | {"format": "int32", "bits": 32.0, "bytes": 4 * count, "range": "", "solver": "", "sqnr_db": None}
    if isinstance(quantizer, FakeQuant):
        when = "dynamic " * quantizer.spec.dynamic
        row |= {"format": describe_format(quantizer.format), "range": when + range_words(quantizer.spec.range)}
        row |= {"bits": quantizer.format.bits_per_element(), "bytes": 0, "group": site.group}
        return row if quantizer.dynamic else row | dict(zip(("lo", "hi"), quantizer.limits(), strict=True))
    weight, stored = network.parameter(site.value).detach(), quantizer.stored
    weight = weight if weight.ndim else weight.reshape(1)  # a number has no rows
    if quantizer.mask is not None:
        values = weight if stored is None else torch.as_tensor(stored.dequantize())
        row["sparsity"] = float((values == 0).float().mean())
    if stored is None:
        row |= {"format": "float32", "bits": 32, "bytes": 4 * weight.numel(), "status": "float"}
        return row | {"reason": "pruned, and stored in float"}
    noise = power = 0.0
    for rows, piece in stored.by_rows(max(1, PIECE // max(1, weight[0].numel()))):
        noise += (weight[rows] - torch.as_tensor(piece.dequantize())).square().sum().item()
        power += weight[rows].square().sum().item()
    node = next(n for n in network.program.graph if n.name == site.layer)
    beside = _site_beside(network, site, node)
    row |= {"dynamic": True} if beside is not None and beside.spec.dynamic else {}
    return row | {
        "format": describe_format(stored.format),
        "range": range_words(quantizer.spec.range),
        "arithmetic": _arithmetic(network, site),
        "solver": quantizer.spec.solve,
        "bits": stored.format.bits_per_element(stored.shape),
        "bytes": round(stored.bits / 8),
        "sqnr_db": round(decibels(noise, power), 2) if noise and power else None,
    }
