"""From a simulation to a deployable program: codes, scales and the ledger of what became of every tensor."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lowbit.deploy.write import ExpandedTensor, IntegerTensor, write
from lowbit.errors import UnsupportedError
from lowbit.numerics import Int, QuantTensor, describe_format
from lowbit.ranges import range_words
from lowbit.simulate.fakequant import FakeBias, FakeQuant, Simulation
from lowbit.simulate.sites import Site

Row = dict[str, Any]


def export(simulation: Simulation) -> ir.Model:
    """The program with its quantized values in integers, and what the flow changed in float."""
    for name in simulation.edited - simulation.placement.sites.keys():
        tensor = ir.tensor(simulation.parameter(name).detach().numpy(), name=name)
        simulation.program.graph.initializers[name].const_value = tensor
    return write(simulation.program, integer_tensors(simulation))


def integer_tensors(simulation: Simulation) -> Iterator[IntegerTensor | ExpandedTensor]:
    """What to write for each site, in the order of the placement."""
    for name, site in simulation.placement.sites.items():
        quantizer = simulation.quantizers[name]
        if isinstance(quantizer, FakeBias):
            yield _bias(simulation, site, quantizer)
        elif site.role == "activation":
            yield _activation(site, quantizer)
        else:
            yield _constant(simulation, site, quantizer)


def _activation(site: Site, quantizer: FakeQuant) -> IntegerTensor:
    grid = quantizer.format.grid
    if not isinstance(grid, Int) or quantizer.dynamic:
        raise UnsupportedError(
            f"'{site.value}': an activation in {describe_format(quantizer.format)} can be simulated, but no engine "
            "computes it. Use an integer format for activations that are to be deployed."
        )
    return IntegerTensor(
        site.value, quantizer.scale.numpy(), quantizer.zero.numpy(), grid.bits, grid.signed, readers=site.readers
    )


def _constant(simulation: Simulation, site: Site, quantizer: FakeQuant) -> IntegerTensor | ExpandedTensor:
    stored = quantizer.stored
    assert stored is not None
    grid = stored.format.grid
    if not isinstance(grid, Int):
        return ExpandedTensor(site.value, stored, site.readers)
    layout = _layout(stored)
    if not _feeds_integers(simulation, site) and (layout is None or not _is_native(stored)):
        return ExpandedTensor(site.value, stored, site.readers)
    if layout is None:
        raise UnsupportedError(
            f"'{site.value}': blocks of {stored.tile} in a tensor of {stored.shape} have no integer kernel."
        )
    scale, zero, axis, block = layout
    codes = np.asarray(stored.codes)
    return IntegerTensor(
        site.value, scale, zero, grid.bits, grid.signed, codes, axis=axis, block=block, readers=site.readers
    )


def _feeds_integers(simulation: Simulation, site: Site) -> bool:
    """Whether the constant meets quantized activations, in an integer kernel."""
    if site.role == "constant":
        return True
    node = next(n for n in simulation.program.graph if n.name == site.layer)
    data = simulation.placement.sites.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
    return (
        node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")
        and data is not None
        and (data.readers is None or (site.layer, 0) in data.readers)
    )


def _is_native(stored: QuantTensor) -> bool:
    """Whether ONNX's integer types and float scales take no more bytes than the format does."""
    return stored.format.grid.bits in (4, 8, 16) and not isinstance(stored.scale, QuantTensor)


def _layout(stored: QuantTensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int | None, int] | None:
    """(scale, zero, axis, block) as DequantizeLinear wants them: scalars, one a channel, or one a block. Or None."""
    scale, zero = (np.asarray(t) for t in (stored.scale_values(), stored.zero_values()))
    split = [axis for axis, count in enumerate(stored.tiles) if count > 1]
    if not split:
        return scale.reshape(()), zero.reshape(()), None, 0
    if len(split) == 1 and stored.tile[split[0]] == 1:
        return scale.reshape(-1), zero.reshape(-1), split[0], 0
    blocked = [axis for axis, length in enumerate(stored.tile) if length > 1]
    if len(blocked) == 1:
        return scale, zero, blocked[0], stored.tile[blocked[0]]
    return None


def _bias(simulation: Simulation, site: Site, quantizer: FakeBias) -> IntegerTensor:
    bias = simulation.parameter(site.value).detach()
    scale = quantizer.scale().expand(bias.shape)
    codes = quantizer.codes(bias).numpy()
    return IntegerTensor(site.value, scale.numpy(), np.zeros(bias.shape, np.int32), 32, True, codes, axis=0)


def ledger(simulation: Simulation) -> list[Row]:
    """A row for every stored tensor and every quantized value: what became of it and why."""
    rows = [_site_row(simulation, site) for site in simulation.placement.sites.values()]
    reasons = simulation.placement.float_reasons
    for name, value in simulation.program.graph.initializers.items():
        if name in simulation.placement.sites or value.const_value is None:
            continue
        users = [str(u.node.name) for u in value.uses()]
        layer = users[0] if users else ""
        reason = reasons.get(str(name)) or next((reasons[u] for u in users if u in reasons), None)
        rows.append(
            {
                "tensor": name,
                "role": "value",
                "layer": layer,
                "format": str(value.const_value.dtype.name).lower(),
                "bits": value.const_value.dtype.bitwidth,
                "bytes": value.const_value.nbytes,
                "status": "float" if value.const_value.dtype.is_floating_point() else "kept",
                "reason": reason or _why_float(value),
            }
        )
    for node in simulation.program.graph:
        if node.name in reasons:
            rows.append({"tensor": node.outputs[0].name, "role": "activation", "layer": node.name, "format": "float32",
                         "bits": 32, "bytes": 0, "status": "float", "reason": reasons[str(node.name)]})  # fmt: skip
    return rows


def _why_float(value: ir.Value) -> str:
    users = sorted({u.node.op_type for u in value.uses()})
    if value.const_value is not None and not value.const_value.dtype.is_floating_point():
        return "not a floating-point tensor"
    return f"read by {', '.join(users)}, which computes in float on this target" if users else "unused"


def _site_row(simulation: Simulation, site: Site) -> Row:
    quantizer = simulation.quantizers[site.value]
    row: Row = {"tensor": site.value, "role": site.role, "layer": site.layer, "status": "quantized", "reason": ""}
    if isinstance(quantizer, FakeBias):
        count = simulation.parameter(site.value).numel()
        return row | {"format": "int32", "bits": 32.0, "bytes": 4 * count, "range": "", "solver": "", "sqnr_db": None}
    row |= {"format": describe_format(quantizer.format), "range": range_words(quantizer.spec.range)}
    if site.role == "activation":
        lo, hi = quantizer.limits()
        return row | {"bits": quantizer.format.bits_per_element(), "bytes": 0, "lo": lo, "hi": hi, "group": site.group}
    weight, stored = simulation.parameter(site.value).detach(), quantizer.stored
    assert stored is not None
    noise = (weight - torch.as_tensor(np.asarray(stored.dequantize()))).square().sum().item()
    power = weight.square().sum().item()
    return row | {
        "solver": site.spec.solve,
        "bits": stored.format.bits_per_element(stored.shape),
        "bytes": round(stored.bits / 8),
        "sqnr_db": round(10 * np.log10(power / noise), 2) if noise and power else None,
    }
