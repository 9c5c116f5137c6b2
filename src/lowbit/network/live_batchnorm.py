"""Batch norms that stay alive while a network trains, and fold exactly into its integers afterwards.

y = γ (z − μ) / √(σ² + ε) + β, with z = Σ ŵ x of rounded weights ŵ = s·c. With a = γ / √(σ² + ε) this is
Σ (|a| s) c' x + (β − a μ): |a| goes into the scale of each output channel, the rest into its bias, and the codes c' are
those that were trained. Where γ < 0 the weights are rounded with the opposite sign, so that c' fits any grid.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lowbit import processes
from lowbit.graph.fold_batchnorm import FOLDED, FoldedNorm
from lowbit.graph.layer import OVER_POSITIONS, Layer, layer_names
from lowbit.network.factors import takes_factor, with_factor
from lowbit.network.network import Network
from lowbit.network.stored import FakeBias, WeightQuant

# Of an output's weights behind which a batch norm is made anew, as in He et al. 2015 (arXiv 1502.01852). What a
# learning rate does then does not depend on the factor that was folded in: in ResNet-20 that left norms from 0.6 to
# 4.1, where the network had been trained with 1.1 to 2.2.
HE_NORM = 2**0.5
SMALLEST = 1e-30  # of a factor: no scale becomes 0
EPSILON = 1e-5  # of a batch norm that is made anew; torch's own


class LiveBatchNorm(nn.modules.batchnorm._BatchNorm):
    """The batch norm behind a layer without bias. Its state has the names of torch's own.

    rounds   rounds the bias that the layer will have, as the file does: where the running statistics are used
    frozen   the running statistics are used in training too, and stay
    moments  while measuring: number of values of a channel, their sum and sum of squares, float64
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = EPSILON) -> None:
        super().__init__(channels, eps)
        self.rounds: FakeBias | None = None
        self.frozen = False
        self.moments: tuple[int, Tensor, Tensor] | None = None

    def forward(self, z: Tensor) -> Tensor:
        if self.moments is not None:
            self.moments = _added(self.moments, z)
        if self.training and not self.frozen:
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            if processes.count() > 1:
                return self._over_processes(z, rate)
            return F.batch_norm(z, self.running_mean, self.running_var, self.weight, self.bias, True, rate, self.eps)
        bias: Tensor = self.bias
        if self.rounds is not None and self.rounds.acts:
            factor, shift = self.folded()
            off = (self.rounds(shift, factor) - shift).detach()
            # A channel whose γ is almost 0 gets another scale at the end, which its bias fits.
            bias = bias + torch.where(off.abs() <= self.rounds.step(factor), off, 0.0).to(bias.dtype)
        return F.batch_norm(z, self.running_mean, self.running_var, self.weight, bias, False, 0.0, self.eps)

    def _over_processes(self, z: Tensor, rate: float) -> Tensor:
        """Normalized by the statistics of what all processes have, equally much each (Ioffe and Szegedy 2015)."""
        over, beside = (0, *range(2, z.dim())), (1, -1, *[1] * (z.dim() - 2))
        x, total = z.float(), z.numel() // z.shape[1] * processes.count()
        mean = processes.summed(x.mean(over)) / processes.count()
        centred = x - mean.reshape(beside)
        variance = processes.summed(centred.square().mean(over)) / processes.count()
        with torch.no_grad():
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (total / max(1, total - 1)), rate)
        factor = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * factor.reshape(beside) + self.bias.reshape(beside)).to(z.dtype)

    def folded(self) -> tuple[Tensor, Tensor]:
        """(a, b) where it computes a·z + b with the running statistics."""
        factor = self.weight * torch.rsqrt(self.running_var + self.eps)
        return factor, self.bias - factor * self.running_mean

    @torch.no_grad()
    def rebase(self) -> None:
        """Make what was measured the running statistics, and change γ and β so that it computes what it did."""
        assert self.moments is not None
        (count, total, squares), (factor, shift) = self.moments, self.folded()
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.weight.copy_(factor * torch.sqrt(variance + self.eps))
        self.bias.copy_(shift + factor * mean)


def _added(moments: tuple[int, Tensor, Tensor], z: Tensor) -> tuple[int, Tensor, Tensor]:
    count, total, squares = moments
    by_channel = z.detach().double().transpose(0, 1).flatten(1)
    return count + by_channel.shape[1], total + by_channel.sum(1), squares + by_channel.square().sum(1)


@contextmanager
def measuring(norms: Iterable[LiveBatchNorm]) -> Iterator[None]:
    """Batch norms measure what passes through inside, and take it as their running statistics afterwards."""
    chosen = list(norms)
    for norm in chosen:
        norm.moments = (0, torch.zeros(()), torch.zeros(()))
    try:
        yield
        for norm in chosen:
            norm.rebase()
    finally:
        for norm in chosen:
            norm.moments = None


def mirrored(weight: Tensor, gamma: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight with the opposite sign where γ < 0. shape: of γ beside the weight"""
    return weight * torch.where(gamma.detach() < 0, -1.0, 1.0).reshape(shape)


@dataclass(frozen=True)
class LiveNorm:
    """A live batch norm, and the layer in front of it.

    axis      of the weight, whose elements make different outputs
    beside    shape that puts a number of each output beside the weight
    bias      value name of the bias that the layer has when the batch norm is folded
    beta      the factor with which the layer reads it
    restored  whether it was not in the model that was given
    """

    norm: LiveBatchNorm
    axis: int
    beside: tuple[int, ...]
    bias: str
    beta: float
    restored: bool


# ---- putting them in place ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """A batch norm to begin with: what it computes behind the weight beside it is what the network computes now."""

    name: str
    weight: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    epsilon: float


def revive(network: Network, restore: bool) -> tuple[dict[str, LiveNorm], list[str]]:
    """Put a live batch norm behind each layer that had one: weight value → batch norm, and what stays folded and why.

    restore   behind each other convolution with a bias as well, but the last ones; `measuring` then gives it statistics
    """
    found: dict[str, LiveNorm] = {}
    notes: list[str] = []
    for call in list(network.module.graph.nodes):
        layer = call.meta.get("layer")
        if layer is None:
            continue
        record = layer.node.meta.get(FOLDED)
        if record is None and not (restore and _may_get_one(layer)):
            continue
        start = _start(layer, record)
        reason = _why_not(network, layer) if start else "another pass changed its weights"
        if start is None or reason:
            notes.append(f"the batch norm of '{layer.node.name}' trains folded: {reason}")
            continue
        beside = tuple(layer.outputs if axis == layer.output_axis else 1 for axis in range(layer.weight.ndim))
        bias = str(layer.bias_value.name if layer.bias_value else "")
        norm = _insert(network, call, layer, start, beside)
        found[str(layer.value.name)] = LiveNorm(norm, layer.output_axis, beside, bias, layer.beta, record is None)
    network.module.graph.lint()
    network.module.delete_all_unused_submodules()
    network.module.recompile()
    return found, notes


def _may_get_one(layer: Layer) -> bool:
    inside = layer.node.op_type in OVER_POSITIONS and "at:output" not in layer_names(layer.node)
    return inside and layer.bias_value is not None


def _why_not(network: Network, layer: Layer) -> str:
    """Why a batch norm behind a layer could not fold into its codes; "" where it can."""
    if layer.kind.bias is None or layer.bias_value is None or not layer.has_own_bias:
        return "it has no bias of its own"
    if len(layer.value.uses()) > 1:
        return "others read its weight"
    if layer.groups > 1 and layer.output_axis:
        return "its groups share output channels of the weight"
    quantizer = network.quantizers.get(str(layer.value.name))
    if isinstance(quantizer, WeightQuant) and not takes_factor(quantizer.format, layer.output_axis):
        return "its format has no scale that could take the factor"
    return ""


def _start(layer: Layer, record: FoldedNorm | None) -> Start | None:
    """From the folded layer, and the batch norm as it was; None where the two do not belong together any more.

    Whatever a pass has multiplied the outputs with since goes into γ, what it has added into β.
    """
    weight, bias, outputs = layer.weight.astype(np.float64), layer.bias, layer.outputs
    if record is None:
        name = f"{str(layer.value.name).removesuffix('.weight')}.batchnorm.weight"
        ones, beside = np.ones(outputs), [outputs if a == layer.output_axis else 1 for a in range(weight.ndim)]
        norm = np.sqrt(np.square(np.moveaxis(weight, layer.output_axis, 0).reshape(outputs, -1)).sum(1))
        factor = np.where(norm > 0, norm / HE_NORM, 1.0)
        gamma = factor * np.sqrt(ones + EPSILON)
        return Start(name, weight / factor.reshape(beside), gamma, bias, 0 * ones, ones, EPSILON)
    if record.weight.shape != weight.shape:
        return None
    before = np.moveaxis(record.weight.astype(np.float64), layer.output_axis, 0).reshape(outputs, -1)
    now = np.moveaxis(weight, layer.output_axis, 0).reshape(outputs, -1)
    factor = (before * now).sum(1) / np.maximum(np.square(before).sum(1), 1e-300)
    if not np.allclose(before * factor[:, None], now, rtol=1e-4, atol=1e-5 * np.abs(now).max()):
        return None
    gamma = factor * np.sqrt(record.variance + record.epsilon)
    beta = bias + factor * record.mean
    return Start(record.name, record.weight, gamma, beta, record.mean, record.variance, record.epsilon)


def _insert(network: Network, call: fx.Node, layer: Layer, start: Start, beside: tuple[int, ...]) -> LiveBatchNorm:
    module, graph = network.module, network.module.graph
    norm = LiveBatchNorm(layer.outputs, start.epsilon)
    norm.train(module.training)
    with torch.no_grad():
        parameter = network.parameter(str(layer.value.name))
        parameter.copy_(torch.tensor(start.weight))
        for held, value in (
            (norm.weight, start.gamma),
            (norm.bias, start.beta),
            (norm.running_mean, start.mean),
            (norm.running_var, start.variance),
        ):
            held.copy_(torch.tensor(value))
    path = start.name.removesuffix(".weight")
    if path == start.name or not path.replace(".", "_").isidentifier() or _taken(module, path):
        path = f"batchnorm_{sum(isinstance(m, LiveBatchNorm) for m in module.modules())}"
    module.add_submodule(path, norm)
    x, weight, bias = call.args[:3]
    assert isinstance(weight, fx.Node)
    assert isinstance(bias, fx.Node)
    call.args = (x, _mirror(network, weight, f"{path}.weight", beside), None, *call.args[3:])
    _forget_bias(network, layer, bias, norm)
    with graph.inserting_after(call):
        behind = graph.call_module(path, (call,))
    call.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    behind.meta.update(call.meta)
    return norm


def _taken(module: nn.Module, path: str) -> bool:
    """Whether something is called so, or so that nothing can lie under it."""
    for part in path.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
        if not isinstance(module, nn.Module):
            return True
    return any(True for _ in module.children()) or any(True for _ in module.parameters())


def _mirror(network: Network, weight: fx.Node, gamma: str, beside: tuple[int, ...]) -> fx.Node:
    """Let the weight's quantizer round it with the sign of γ."""
    if weight.op != "call_module":
        return weight  # it stays in float
    graph, (source,) = network.module.graph, weight.args
    with graph.inserting_before(weight):
        signs = graph.get_attr(gamma)
        weight.args = (graph.call_function(mirrored, (source, signs, beside)),)
    with graph.inserting_after(weight):
        back = graph.call_function(mirrored, (weight, signs, beside))
    return back


def _forget_bias(network: Network, layer: Layer, bias: fx.Node, norm: LiveBatchNorm) -> None:
    """The layer's own bias: it is in β now."""
    name, graph = str(layer.bias_value.name if layer.bias_value else ""), network.module.graph
    quantizer = network.quantizers.get(name)
    norm.rounds = quantizer if isinstance(quantizer, FakeBias) else None
    for node in (bias, *bias.all_input_nodes):
        if not node.users:
            graph.erase_node(node)
    owner, _, last = network.module.meta["keys"].pop(name).rpartition(".")
    del network.module.get_submodule(owner)._parameters[last]


# ---- folding them again ------------------------------------------------------------------------------------------


@torch.no_grad()
def fold(trained: Network, norms: Mapping[str, LiveNorm]) -> Network:
    """The network that computes the same without batch norms: the trained one's codes, ranges and parameters."""
    network = Network(trained.program, trained.placement)
    for name in network.module.meta["keys"].keys() & trained.module.meta["keys"].keys():
        network.parameter(name).copy_(trained.parameter(name))
    for name, quantizer in trained.activations().items():
        own = network.activations()[name]
        own.spec = quantizer.spec
        own.set_parameters(quantizer.scale, quantizer.zero)
    for name, (_, held) in trained.constants().items():
        assert held.stored is not None
        weight, stored = network.constants()[name][1], held.stored
        weight.spec, weight.mask = held.spec, held.mask
        if (live := norms.get(name)) is not None:
            stored = with_factor(stored, live.norm.folded()[0].abs().clamp(min=SMALLEST), live.axis)
        weight.store(stored)
    for name, live in norms.items():
        factor, shift = live.norm.folded()
        network.parameter(name).mul_(factor.reshape(live.beside))
        network.parameter(live.bias).copy_((shift / live.beta).reshape(network.parameter(live.bias).shape))
    return network
