"""Parity: the deployed file computes what was simulated, layer by layer, to one step.

Differences of one step are expected and add up along a network, so outputs alone prove nothing about a layer. Here
every layer of the simulation is fed the integers that the engine computed before it, and only its own result is
compared.

A range that is measured at each input is measured in the simulation too. A recurrent layer that quantizes its states
keeps their codes to itself: its outputs are compared instead. In one thread, because with more an LSTM splits a batch
and measures each part for itself.

Equal numbers do not prove that a layer runs in integers, or that it does not: `check_arithmetic` reads that off the
engine's own graph.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lowbit.engines.compile import ENGINES, Batch, Engine
from lowbit.engines.cpu import saturation_advice
from lowbit.engines.read_back import FLOAT, ReadBack
from lowbit.errors import MismatchError
from lowbit.graph.layer import layers_of
from lowbit.network.calibrate import forward, tensors
from lowbit.network.in_step import Walk, in_step
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant
from lowbit.numerics import Int

OUTPUT_NOISE = 1e-4  # of an output's power, given equal integers before it: 40 dB
# Root mean square, h being 1 at most. The integer program's gates have steps of 2^-12, which is 8 steps of h, and its
# tanh is off by 3: toy networks are 3 to 4 steps apart, single values 25. This is 32.
STATE_NOISE = 2.0**-10
FLOAT_SHARE = 1e-3  # of the largest output: float32 sums in another order, through a hundred layers, stay below
# A kernel of blocks rounds activations itself: those that lie on a tie fall on either side, and the difference grows
# from layer to layer (0.006 after 12 products, 0.020 after MiniLM's 36). A wrong code or scale differs by about 1.
BLOCK_SHARE = 0.1


class StatesMismatchError(MismatchError):
    """States of fixed scale leave the simulated ones: each step amplifies what the integer program rounds beside."""


@dataclass(frozen=True)
class Parity:
    """How far an engine is from the simulation.

    one_step   share of compared codes that differ by one
    worst      value name and largest difference in steps
    """

    values: int
    codes: int
    one_step: float
    worst: tuple[str, int]


def verify(
    simulation: Network, program: ir.Model, batches: Iterable[Batch], engine: str | Engine = "onnxruntime"
) -> Parity:
    """Run the written program and hold every quantized value against the simulation; MismatchError beyond one step.

    One step is allowed because engines requantize with a fixed-point multiplier or in float32 in another order of sums;
    a value that lies within float rounding of a tie then falls on either side.

    engine   the name of one that runs ONNX files, where states of fixed scale are float, or one that rounds them too
    """
    runner = ENGINES[engine] if isinstance(engine, str) else engine
    held = simulation.recurrent if isinstance(engine, str) else frozenset(simulation.placement.states)
    values = [name for name in simulation.placement.sites if _has_codes(simulation, name)]
    outputs = {str(v.name) for v in program.graph.outputs}
    outputs |= {name for value in values for name in _parts(simulation, value)}
    outputs |= {name for layer in held for name in _results(simulation, layer).values()}
    run = runner.compile(program, outputs=sorted(outputs), threads=1 if simulation.recurrent else None)
    steps, compared = _Steps(), 0
    with simulation.mode("quantize", simulation.rounding(states=not isinstance(engine, str))):
        for batch in batches:
            deployed = run(dict(batch))
            for name, simulated in _outputs_behind(simulation, batch, deployed, steps, held, runner.name).items():
                compared += simulated.numel()
                if simulated.is_floating_point():
                    _reject_nan(simulation, batch, name, simulated, deployed[name], runner.name)
                    _compare_output(simulation, name, simulated.double().numpy(), deployed[name], runner.name)
    worst, most = steps.worst
    if most > 1:
        site = simulation.placement.sites[worst]
        raise MismatchError(
            f"layer '{site.layer}': {runner.name} and the simulation differ by {most} steps in '{worst}'. "
            f"{saturation_advice()}Leave the layer in float (a rule 'float' for '{site.layer}') and report the model."
        )
    return Parity(len(values), steps.codes or compared, steps.off / max(1, steps.codes), steps.worst)


def check_arithmetic(
    simulation: Network, rows: Iterable[Mapping[str, Any]], runs: ReadBack, elsewhere: Collection[str] = ()
) -> None:
    """MismatchError where a layer runs in integers that the ledger calls float, or the other way round.

    rows        the ledger; those of weights say in which arithmetic their layers compute
    elsewhere   operators that this engine may compute in float: the file is for another, which was not read back
    """
    if runs.unread:
        return
    stated = {row["tensor"]: row["arithmetic"] for row in rows if "arithmetic" in row and row["role"] != "activation"}
    for node in simulation.program.graph:
        for weight in layers_of(node):
            said, found = stated.get(weight.value.name), runs.of(str(node.name))
            if said is None or said == found:
                continue
            if node.op_type in elsewhere and found == FLOAT:
                continue
            what = f"layer '{node.name}' ({node.op_type}, weight '{weight.value.name}')"
            if found == FLOAT:
                raise MismatchError(
                    f"{what}: the ledger says {said}, and {runs.engine} computes it in float. Leave the layer in float "
                    f"(a rule 'float' for '{node.name}'), or choose another target; report the model."
                )
            raise MismatchError(
                f"{what}: the ledger says {said}, and {runs.engine} runs it as {runs.operators[str(node.name)]} "
                f"({found}). Quantize the layer too (drop its rule 'float'), or leave its neighbours in float as well; "
                "report the model."
            )


def _compare_output(
    simulation: Network, name: str, own: np.ndarray[Any, Any], deployed: np.ndarray[Any, Any], engine: str
) -> None:
    """What is computed in float agrees too; behind integers a top-k may still pick another of two equals.

    Where only weights are stored in few bits everything is float, and outputs are equal up to the order of sums. A
    kernel that rounds activations in blocks finds some on the other side of a tie: its outputs have BLOCK_SHARE.
    """
    if own.shape != deployed.shape or not own.size:
        return
    apart, known = np.abs(_differences(own, deployed)), np.abs(own[np.isfinite(own)])
    activations = [s.value for s in simulation.placement.sites.values() if s.role == "activation"]
    if any(_has_codes(simulation, value) for value in activations):
        limit, off = OUTPUT_NOISE, np.square(apart).sum() / max(np.square(known).sum(), 1e-30)
        what = "power, though all integers before it agree. Leave the last layers in float (rules 'float')"
    else:
        limit, off = BLOCK_SHARE if activations else FLOAT_SHARE, apart.max() / max(known.max(initial=0), 1e-30)
        what = "largest value, though both compute in float. Leave layers in float by rules, half of them first,"
        what += " to find which,"
    if not off <= limit:
        raise MismatchError(
            f"output '{name}': {engine} and the simulation differ by {off:.2g} of its {what} and report the model."
        )


def _compare_recurrence(
    simulation: Network,
    layer: str,
    simulated: Tensor | tuple[Tensor, ...],
    deployed: Mapping[str, np.ndarray],
    engine: str,
) -> Tensor | tuple[Tensor, ...]:
    """The engine's outputs of a layer that quantizes its states; a MismatchError beyond OUTPUT_NOISE.

    They agree to float rounding until one state falls on the other side of a tie; all later steps then differ a little.
    Beside states of fixed scale the integer program rounds its gates too: STATE_NOISE is allowed whatever their power.
    """
    floor = STATE_NOISE**2 if layer in simulation.placement.states else 0.0
    own = simulated if isinstance(simulated, tuple) else (simulated,)
    found = list(own)
    for index, name in _results(simulation, layer).items():
        y, found[index] = own[index], torch.from_numpy(deployed[name])
        power = max(float(y.square().sum()), y.numel() * floor / OUTPUT_NOISE, 1e-30)
        off = float((y - found[index]).square().sum()) / power
        if not off <= OUTPUT_NOISE:
            apart = (
                f"layer '{layer}': {engine} and the simulation differ by {off:.2g} of the power of "
                f"'{name.removesuffix('_unquantized')}', and {OUTPUT_NOISE} at most is due to rounding."
            )
            if floor:
                raise StatesMismatchError(
                    f"{apart} States that amplify rounding from step to step want a target that keeps them in float."
                )
            raise MismatchError(
                f"{apart} Leave the layer in float (a rule 'float' for '{layer}') and report the model."
            )
    return tuple(found) if isinstance(simulated, tuple) else found[0]


def _results(simulation: Network, layer: str) -> dict[int, str]:
    """The outputs of a layer that are read, by their place; the file's output of that name may be quantized."""
    values = next(node for node in simulation.program.graph if node.name == layer).outputs
    read = {index: v for index, v in enumerate(values) if v.uses() or v.is_graph_output()}
    sites = {v.name: simulation.placement.sites.get(str(v.name)) for v in read.values() if v.is_graph_output()}
    coded = {name for name, site in sites.items() if site is not None and site.readers is None}  # `write` renames it
    return {index: f"{v.name}_unquantized" if v.name in coded else str(v.name) for index, v in read.items()}


def _reject_nan(
    simulation: Network, batch: Batch, name: str, simulated: Tensor, deployed: np.ndarray[Any, Any], engine: str
) -> None:
    """MismatchError for a NaN in an output, unless the float network gives one too."""
    where = np.isnan(deployed)
    if bool(simulated.isnan().any()) or where.any():
        with simulation.mode("off"):
            exact = forward(simulation, batch)[name]
        if not bool(exact.isnan().any()):
            raise MismatchError(
                f"output '{name}': {int(where.sum())} of {where.size} values are NaN in {engine}, "
                f"{int(simulated.isnan().sum())} in the simulation, none in the float network. Leave the layers in "
                "float (rules 'float') that divide, or take roots or logarithms; report the model."
            )


def _differences(own: np.ndarray[Any, Any], deployed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """deployed − own; 0 where both are the same infinity, or both no number."""
    same = (own == deployed) | (np.isnan(own) & np.isnan(deployed))
    apart: np.ndarray[Any, Any] = np.subtract(deployed, own, where=~same, out=np.zeros_like(own))
    return apart


def _has_codes(simulation: Network, value: str) -> bool:
    """Whether the file computes this activation's codes; kernels of blocks and recurrent layers keep theirs."""
    quantizer = simulation.quantizers[value]
    site = simulation.placement.sites[value]
    if site.spec.dynamic:
        return any(layer not in simulation.recurrent for layer, _ in site.readers or ())
    return site.role == "activation" and isinstance(quantizer, FakeQuant) and not quantizer.dynamic


def _parts(simulation: Network, value: str) -> list[str]:
    """What to ask the engine for of a value: its codes, and scale and zero where these are computed."""
    dynamic = simulation.placement.sites[value].spec.dynamic
    return [f"{value}_{part}" for part in (("quantized", "scale", "zero") if dynamic else ("quantized",))]


@dataclass
class _Steps:
    """Steps between the simulation's codes and the engine's, counted over batches."""

    worst: tuple[str, int] = ("", 0)
    off: int = 0
    codes: int = 0

    def compare(
        self, quantizer: FakeQuant, value: str, x: Tensor, simulated: Tensor, found: Sequence[np.ndarray[Any, Any]]
    ) -> Tensor:
        """Count the differences in one value; what the engine's codes mean.

        x, simulated   the value before and after it was rounded
        found          the engine's codes, and their scale and zero where it measured them
        """
        scale, zero = quantizer.scale_and_zero(x)
        measured = [torch.from_numpy(np.array(number, np.float32)) for number in found[1:]]
        codes = torch.empty_like(simulated).copy_(torch.from_numpy(found[0]))  # in the simulation's order of memory
        assert isinstance(quantizer.grid, Int)
        if quantizer.grid.signed and found[0].dtype == np.uint8:
            codes -= 1 << (quantizer.grid.bits - 1)  # written unsigned
        steps = simulated.div(scale).round_().add_(zero).sub_(codes).abs_()
        self.off += int((steps > 0).sum())
        self.codes += steps.numel()
        if steps.numel() and not steps.max() <= self.worst[1]:
            self.worst = (value, int(steps.nan_to_num(nan=float(2**31)).max()))
        scale, zero = measured or (scale, zero)
        return codes.sub_(zero).mul_(scale)


def _outputs_behind(
    simulation: Network,
    batch: Batch,
    deployed: Mapping[str, np.ndarray[Any, Any]],
    steps: _Steps,
    recurrent: Collection[str],
    engine: str,
) -> dict[str, Tensor]:
    """The simulation's outputs, each quantized value replaced by the engine's after the two were compared."""
    walk = Walk(simulation.module, tensors(simulation, batch))
    for node in in_step(walk):
        value = node.meta.get("quantized_value")
        if value is not None and _has_codes(simulation, value):
            quantizer = simulation.quantizers[value]
            assert isinstance(quantizer, FakeQuant)
            simulated, found = walk.compute(node), [deployed[name] for name in _parts(simulation, value)]
            (source,) = node.all_input_nodes
            walk.env[node] = steps.compare(quantizer, value, walk.compute(source), simulated, found)
        elif node.meta.get("node") in recurrent and node.op == "call_module":
            layer, simulated = str(node.meta["node"]), walk.compute(node)
            walk.env[node] = _compare_recurrence(simulation, layer, simulated, deployed, engine)
    outputs: dict[str, Tensor] = walk.env[node]
    return outputs
