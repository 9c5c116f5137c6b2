"""Parity: the deployed file computes what was simulated, layer by layer, to one step.

Differences of one step are expected and add up along a network, so outputs alone prove nothing about a layer. Here
every layer of the simulation is fed the integers that the engine computed before it, and only its own result is
compared.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from lowbit.deploy.engines import ENGINES
from lowbit.errors import MismatchError
from lowbit.flows.calibrate import Batch, forward
from lowbit.simulate.fakequant import FakeQuant, Simulation

OUTPUT_NOISE = 1e-4  # of an output's power, given equal integers before it: 40 dB
FLOAT_SHARE = 1e-3  # of the largest output: float32 sums in another order, through a hundred layers, stay below
BLOCK_SHARE = 3e-2


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


def verify(simulation: Simulation, program: ir.Model, batches: Iterable[Batch], engine: str = "onnxruntime") -> Parity:
    """Run the written program and hold every quantized value against the simulation; MismatchError beyond one step.

    One step is allowed because engines requantize with a fixed-point multiplier or in float32 in another order of sums;
    a value that lies within float rounding of a tie then falls on either side.
    """
    sites = [s for s in simulation.placement.sites.values() if _has_codes(simulation, s.value)]
    if not sites:
        return _verify_outputs(simulation, program, batches, engine)
    outputs = [str(v.name) for v in program.graph.outputs]
    run = ENGINES[engine].compile(program, outputs=[*outputs, *(f"{s.value}_quantized" for s in sites)])
    worst, off, compared = ("", 0), 0, 0
    with simulation.mode("quantize"):
        for batch in batches:
            deployed = run(dict(batch))
            checker = _Checker(simulation, deployed)
            arrays = (torch.from_numpy(np.ascontiguousarray(batch[str(v.name)])) for v in program.graph.inputs)
            for name, simulated in checker.run(*arrays).items():
                _compare_output(name, simulated, deployed[name], engine)
            off, compared = off + checker.off, compared + checker.compared
            worst = max(worst, checker.worst, key=lambda pair: pair[1])
    if worst[1] > 1:
        site = simulation.placement.sites[worst[0]]
        raise MismatchError(
            f"layer '{site.layer}': {engine} and the simulation differ by {worst[1]} steps in '{worst[0]}'. "
            "On a CPU without VNNI, u8·s8 products saturate: use target 'onnxruntime-avx2'. Otherwise leave the layer "
            "in float (a rule 'float') and report the model."
        )
    return Parity(len(sites), compared, off / max(1, compared), worst)


def _compare_output(name: str, simulated: Tensor, deployed: np.ndarray[Any, Any], engine: str) -> None:
    """What is computed in float behind the last integers agrees too; a top-k may still pick another of two equals."""
    if not simulated.is_floating_point() or tuple(simulated.shape) != deployed.shape:
        return
    own = simulated.double().numpy()
    noise, power = float(np.square(own - deployed).sum()), float(np.square(own).sum())
    if noise > OUTPUT_NOISE * power:
        raise MismatchError(
            f"output '{name}': {engine} and the simulation differ by {noise / max(power, 1e-30):.2g} of its power, "
            "though all integers before it agree. Leave the last layers in float (rules 'float') and report the model."
        )


def _verify_outputs(simulation: Simulation, program: ir.Model, batches: Iterable[Batch], engine: str) -> Parity:
    """Where only weights are stored in few bits everything is float: the outputs themselves are equal, up to summation.

    A kernel that rounds activations in blocks finds some on the other side of a tie: its outputs have BLOCK_SHARE.
    """
    run = ENGINES[engine].compile(program)
    share = BLOCK_SHARE if any(s.role == "activation" for s in simulation.placement.sites.values()) else FLOAT_SHARE
    compared = 0
    with simulation.mode("quantize"):
        for batch in batches:
            deployed = run(dict(batch))
            for name, simulated in forward(simulation, batch).items():
                compared += simulated.numel()
                if not simulated.is_floating_point() or not simulated.numel():
                    continue
                own, theirs = simulated.double().numpy(), deployed[name].astype(np.float64)
                off = np.abs(own - theirs).max() / max(np.abs(own).max(), 1e-30)
                if not off <= share:
                    raise MismatchError(
                        f"output '{name}': {engine} and the simulation differ by {off:.2g} of its largest value, "
                        "though both compute in float. Leave layers in float by rules, half of them first, to find "
                        "which; report the model."
                    )
    return Parity(0, compared, 0.0, ("", 0))


def _has_codes(simulation: Simulation, value: str) -> bool:
    """Whether the file computes this activation's codes; a kernel of blocks keeps them to itself."""
    quantizer = simulation.quantizers[value]
    site = simulation.placement.sites[value]
    return site.role == "activation" and isinstance(quantizer, FakeQuant) and not quantizer.dynamic


class _Checker(fx.Interpreter):
    """Runs the simulation, replacing each quantized value by the engine's after comparing the two."""

    def __init__(self, simulation: Simulation, deployed: Mapping[str, np.ndarray[Any, Any]]) -> None:
        super().__init__(simulation.module)
        self.simulation, self.deployed = simulation, deployed
        self.worst, self.off, self.compared = ("", 0), 0, 0

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            result = super().run_node(n)
        value = n.meta.get("quantized_value")
        if value is None or not _has_codes(self.simulation, value):
            return result
        quantizer = self.simulation.quantizers[value]
        assert isinstance(quantizer, FakeQuant)
        codes = torch.from_numpy(self.deployed[f"{value}_quantized"].astype(np.float32))
        own = torch.round(result / quantizer.scale) + quantizer.zero
        steps = (own - codes).abs()
        self.off += int((steps > 0).sum())
        self.compared += steps.numel()
        if steps.numel() and steps.max() > self.worst[1]:
            self.worst = (value, int(steps.max()))
        return (codes - quantizer.zero) * quantizer.scale
