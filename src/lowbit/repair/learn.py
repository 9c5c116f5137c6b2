"""Learning a part of the network: weights, steps of activations and biases, so that what it makes comes close to float.

No labels: what a part should make is what the exact network makes there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.network.blocks import Block
from lowbit.network.in_step import Walk
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant
from lowbit.network.stored import FakeBias, WeightQuant

# Rates, picked among about 13 settings on the 300 photos that also score MobileNet v1 0.25 in W4A8: in simulation 66 %
# of the answers as float's before, 69 to 71 % after. The deployed preset has 67 %. Not validated on other networks.
WEIGHT_RATE = 0.001  # of a weight, in steps of its grid
FACTOR_RATE = 0.0005  # of the scales of weights, relative to them
SCALE_RATE = 0.001  # of the step of an activation, relative to it
BIAS_RATE = 0.0005  # relative to the root mean square of the bias
SLACK = 1 << 16  # places in the random bits at which a mixture may begin


@dataclass(frozen=True)
class Lesson:
    """For each batch what a block reads, exact and as the quantized network has it, and what it should make."""

    block: Block
    exact: list[dict[fx.Node, Any]]
    quantized: list[dict[fx.Node, Any]]
    wanted: list[dict[fx.Node, Tensor]]

    def power(self) -> dict[fx.Node, float]:
        """Of each value that it should make, over all batches."""
        return {n: max(1e-30, sum(float(w[n].square().sum()) for w in self.wanted)) for n in self.wanted[0]}


def floats_of(walk: Walk, nodes: Iterable[fx.Node]) -> dict[fx.Node, Tensor]:
    """Those of the nodes' values that are float tensors."""
    return {n: y for n in nodes if isinstance(y := walk.env[n], Tensor) and y.is_floating_point()}


@dataclass(frozen=True)
class Parts:
    """The quantizers of a block that may learn."""

    weights: dict[WeightQuant, Tensor]
    scales: list[FakeQuant]
    biases: list[nn.Parameter]

    @staticmethod
    def of(network: Network, block: Block, settled: Iterable[nn.Module] = ()) -> "Parts":
        """All that only this block reads; without those that earlier blocks settled."""
        module, done = network.module, set(settled)
        nodes = [n for n in _with_constants(block) if "quantized_value" in n.meta]
        parts = Parts({}, [], [])
        for node in nodes:
            quantizer, read = module.get_submodule(str(node.target)), node.args[0]
            assert isinstance(read, fx.Node)
            if quantizer in done:
                continue
            if (
                isinstance(quantizer, FakeQuant)
                and quantizer.ready
                and not quantizer.dynamic
                and quantizer not in parts.scales
            ):
                parts.scales.append(quantizer)
            elif isinstance(quantizer, WeightQuant) and quantizer.stored is not None:
                parts.weights[quantizer] = module.get_parameter(str(read.target))
            elif isinstance(quantizer, FakeBias):
                parts.biases.append(module.get_parameter(str(read.target)))
        return parts

    def begin(self) -> list[dict[str, Any]]:
        """Let them learn: groups of parameters and their rates."""
        groups: list[dict[str, Any]] = []
        for quantizer, weight in self.weights.items():
            latent, *factor = quantizer.follow(weight)
            groups += [{"params": [latent], "rate": WEIGHT_RATE}, {"params": factor, "rate": FACTOR_RATE}]
        groups += [{"params": list(q.learn().parameters()), "rate": SCALE_RATE} for q in self.scales]
        return groups + [
            {"params": [b], "rate": BIAS_RATE * float(b.detach().square().mean().sqrt())} for b in self.biases
        ]

    def settle(self) -> None:
        """Keep what was learned."""
        for quantizer, weight in self.weights.items():
            quantizer.store(quantizer.current(weight))
        for step in self.scales:
            step.settle()


class Learner(Walk):
    """A block of one batch; an activation passes by its quantizer unquantized in some places, drawn anew each time.

    keep_exact  the share of these places
    """

    def __init__(self, module: fx.GraphModule, block: Block, keep_exact: float) -> None:
        super().__init__(module, ())
        self.block, self.keep_exact, self.bits = block, keep_exact, torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    def make(self, reads: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """All values of the block."""
        self.env = dict(reads)
        for node in self.block.nodes:
            self.compute(node)
        return self.env

    def compute(self, node: fx.Node) -> Any:
        if node not in self.env:
            for source in node.all_input_nodes:
                self.compute(source)
            y = self.run_node(node)
            if (
                self.keep_exact
                and "quantized_value" in node.meta
                and isinstance(self.module.get_submodule(str(node.target)), FakeQuant)
            ):
                y = self.mixed(self.env[node.all_input_nodes[0]], y)
            self.env[node] = y
        return self.env[node]

    def mixed(self, exact: Any, quantized: Any) -> Any:
        """Each number from one of the two."""
        if not self.keep_exact or exact is quantized or not quantized.is_floating_point():
            return quantized
        if len(self.bits) < exact.numel() + SLACK:
            self.bits = (torch.rand(exact.numel() + SLACK, generator=self.generator) >= self.keep_exact).float()
        # The bits are drawn once and read from another place each time: drawing takes longer than the layer.
        start = int(torch.randint(SLACK, (1,), generator=self.generator))
        bits = self.bits[start : start + exact.numel()]
        if exact.dim() == 4 and exact.is_contiguous(memory_format=torch.channels_last):
            return torch.lerp(exact, quantized, bits.as_strided(exact.shape, exact.stride()))
        return torch.lerp(exact, quantized, bits.reshape(exact.shape))


def learn(network: Network, lesson: Lesson, parts: Parts, steps: int, keep_exact: float) -> bool:
    """Learn a block by Adam, a batch at each step; whether it is better than before, otherwise it is as it was."""
    learner, power = Learner(network.module, lesson.block, keep_exact), lesson.power()
    before, undo = _error(lesson, learner, power), network.undo()
    if not before:
        return False
    groups = parts.begin()
    parameters = [p for group in groups for p in group["params"]]
    adam = torch.optim.Adam(groups, lr=0.0, eps=1e-12)
    generator, order = torch.Generator().manual_seed(0), list[int]()
    for step in range(steps):
        order = order or torch.randperm(len(lesson.wanted), generator=generator).tolist()
        batch = order.pop()
        reads = {n: learner.mixed(lesson.exact[batch][n], x) for n, x in lesson.quantized[batch].items()}
        loss = _squared_error(learner.make(reads), lesson.wanted[batch], power) / before
        if not loss.requires_grad:  # an operator outside the table is behind all that could learn
            break
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for group in adam.param_groups:
            group["lr"] = group["rate"] * (1 + cos(pi * step / steps)) / 2
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
    for parameter in parameters:
        parameter.grad = None
    parts.settle()
    if _error(lesson, learner, power) < before:
        return True
    undo()
    return False


@torch.no_grad()
def _error(lesson: Lesson, learner: Learner, power: Mapping[fx.Node, float]) -> float:
    """Of the block as it is deployed, with what the quantized network gives it."""
    keep, learner.keep_exact = learner.keep_exact, 0.0
    pairs = zip(lesson.quantized, lesson.wanted, strict=True)
    error = sum(float(_squared_error(learner.make(reads), wanted, power)) for reads, wanted in pairs)
    learner.keep_exact = keep
    return error


def _squared_error(made: dict[fx.Node, Any], wanted: dict[fx.Node, Tensor], power: Mapping[fx.Node, float]) -> Tensor:
    """Of each value relative to its power in all batches."""
    return sum(((made[n] - y).square().sum() / power[n] for n, y in wanted.items()), torch.zeros(()))


def _with_constants(block: Block) -> list[fx.Node]:
    """The block's nodes, and the constants that they read."""
    found, todo = dict.fromkeys(block.nodes), list(block.nodes)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found and n not in block.reads]
        found |= dict.fromkeys(new)
        todo += new
    return list(found)
