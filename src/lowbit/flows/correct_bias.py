"""Bias correction: give each layer back the mean that its rounding took.

Rounding errors of a weight do not cancel when its inputs are all positive: E[W̃x] − E[Wx] = E[ε x] shifts a whole channel, and
a depthwise layer of nine weights shifts it far. The shift is a constant, so the bias can carry it.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, in its empirical form (appendix D): the means are measured, layer
after layer, each with the corrections before it in place.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lowbit.flows.calibrate import Batch
from lowbit.simulate.fakequant import Simulation

Environment = dict[fx.Node, Any]


def correct_bias(simulation: Simulation, batches: Sequence[Batch]) -> int:
    """Shift every bias by the mean error of its layer's output per channel, in place; the number of layers corrected.

    batches   some dozen samples; all of them go through a layer before any goes on
    """
    layers = {node: (name, axis) for node, name, axis in _layers(simulation.module)}
    values = {key: value for value, key in simulation.module.meta["keys"].items()}
    with torch.no_grad(), simulation.mode("off"):
        wanted = {
            node: _mean([env[node] for env in envs], layers[node][1])
            for node, envs in _lockstep(simulation, batches)
            if node in layers
        }
    with torch.no_grad(), simulation.mode("quantize"):
        for node, envs in _lockstep(simulation, batches):
            if node not in layers:
                continue
            name, axis = layers[node]
            shift = wanted[node] - _mean([env[node] for env in envs], axis)
            bias = simulation.module.get_parameter(name)
            bias += shift.reshape(bias.shape)
            simulation.edited.add(values[name])
            for env in envs:
                env[node] = (env[node].movedim(axis, -1) + shift).movedim(-1, axis)
    return len(layers)


def _mean(outputs: list[Tensor], axis: int) -> Tensor:
    """Mean over samples and positions, per channel."""
    return torch.cat([y.movedim(axis, -1).flatten(0, -2) for y in outputs]).mean(0)


def _layers(module: fx.GraphModule) -> Iterator[tuple[fx.Node, str, int]]:
    """(node behind which the bias is in, name of the bias, axis of the channels) of quantized layers with a bias."""
    for node in module.graph.nodes:
        operator = node.meta.get("op") if node.op == "call_function" else None
        candidates: tuple[Any, ...] = ()
        if operator in ("Conv", "ConvTranspose", "Gemm") and len(node.args) > 2 and _is_quantized(node.args[1]):
            candidates = node.args[2:3]
        elif operator == "Add" and any(_is_quantized_matmul(a) for a in node.args):
            candidates = node.args
        for argument in candidates:
            if (name := _parameter_name(argument)) is not None:
                bias = module.get_parameter(name)
                if bias.numel() == bias.shape[-1] and len(_readers(module, name)) == 1:
                    yield node, name, 1 if operator in ("Conv", "ConvTranspose") else -1


def _readers(module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [user for node in module.graph.nodes if node.op == "get_attr" and node.target == name for user in node.users]


def _is_quantized(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and "quantized_value" in argument.meta


def _is_quantized_matmul(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.meta.get("op") == "MatMul" and _is_quantized(argument.args[1])


def _parameter_name(argument: Any) -> str | None:
    """The bias behind an argument, seen through its quantizer."""
    while _is_quantized(argument):
        argument = argument.args[0]
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def _lockstep(simulation: Simulation, batches: Sequence[Batch]) -> Iterator[tuple[fx.Node, list[Environment]]]:
    """Run all batches node by node: yields each node once all have passed it, with their values so far."""
    inputs = [str(v.name) for v in simulation.program.graph.inputs]
    runs = [fx.Interpreter(simulation.module) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter([torch.from_numpy(np.ascontiguousarray(batch[name])) for name in inputs])
    for node in simulation.module.graph.nodes:
        for run in runs:
            run.env[node] = run.run_node(node)
        yield node, [run.env for run in runs]
        for done in runs[0].user_to_last_uses.get(node, []):
            for run in runs:
                del run.env[done]
