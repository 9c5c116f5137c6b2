"""Bias correction: give each layer back the mean that its rounding took.

Rounding errors of a weight do not cancel when its inputs are all positive: E[W̃x] − E[Wx] = E[ε x] shifts a whole
channel, and a depthwise layer of nine weights shifts it far. The shift is a constant, so the bias can carry it.
Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, in its empirical form (appendix D): the shift is measured,
layer after layer, each with the corrections before it in place. Here it is the median error, see `_shift`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lowbit.network.calibrate import Batch
from lowbit.network.fakequant import Simulation

MEDIAN_POSITIONS = 4096  # positions of a layer that its median is taken over
Environment = dict[fx.Node, Any]


def correct_bias(simulation: Simulation, batches: Sequence[Batch]) -> list[str]:
    """Shift every bias by the error of its layer's output per channel, in place. What was done, in words.

    batches   some dozen samples; all of them go through a layer before any goes on
    """
    layers = {node: (name, axis) for node, name, axis in _layers(simulation.module)}
    values = {key: value for value, key in simulation.module.meta["keys"].items()}
    with torch.no_grad(), simulation.mode("quantize"):
        for node, exact, rough in _lockstep(simulation, batches):
            if node not in layers:
                continue
            name, axis = layers[node]
            shift = _shift([(e[node], r[node]) for e, r in zip(exact, rough, strict=True)], axis)
            bias = simulation.module.get_parameter(name)
            if bias.numel() != shift.numel():
                continue  # one number for all outputs: it cannot carry a shift of each
            bias.add_(shift.reshape(bias.shape))
            simulation.edited.add(values[name])
            for env in rough:
                env[node] = (env[node].movedim(axis, -1) + shift).movedim(-1, axis)
    return [f"corrected the biases of {len(layers)} layers"] if layers else []


def _shift(pairs: Sequence[tuple[Tensor, Tensor]], axis: int) -> Tensor:
    """Median of exact − rough over samples and positions, per channel.

    Not the mean: where a few tokens or pixels are clipped far, the mean moves all the others to make up for them
    (MiniLM: cosine of the sentence vectors 0.987 with the mean, 0.993 with the median, which for rounding noise is the
    same).
    """
    positions = sum(exact.numel() // exact.shape[axis] for exact, _ in pairs)
    every = max(1, positions // MEDIAN_POSITIONS) | 1  # odd: positions of a row of pixels take turns
    rows = [[x.movedim(axis, -1).flatten(0, -2)[::every] for x in pair] for pair in pairs]
    return torch.cat([exact - rough for exact, rough in rows]).T.contiguous().median(1).values


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
                if bias.dim() and bias.numel() == bias.shape[-1] and len(_readers(module, name)) == 1:
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


class _Exact(fx.Interpreter):
    """Runs the network as if it had no quantizers."""

    def run_node(self, n: fx.Node) -> Any:
        source = n.args[0] if "quantized_value" in n.meta else None
        return self.env[source] if isinstance(source, fx.Node) else super().run_node(n)


def _lockstep(
    simulation: Simulation, batches: Sequence[Batch]
) -> Iterator[tuple[fx.Node, list[Environment], list[Environment]]]:
    """Run all batches node by node, exactly and quantized: each node once all have passed it, and the values so far."""
    inputs = [str(v.name) for v in simulation.program.graph.inputs]
    exact, rough = ([kind(simulation.module) for _ in batches] for kind in (_Exact, fx.Interpreter))
    for runs in (exact, rough):
        for run, batch in zip(runs, batches, strict=True):
            run.args_iter = iter([torch.from_numpy(np.ascontiguousarray(batch[name])) for name in inputs])
    for node in simulation.module.graph.nodes:
        for run in (*exact, *rough):
            run.env[node] = run.run_node(node)
        yield node, [run.env for run in exact], [run.env for run in rough]
        for done in exact[0].user_to_last_uses.get(node, []):
            for run in (*exact, *rough):
                del run.env[done]
