"""The module that `prepare` gives: a network with quantizers, called as the model that it was made of."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowbit import processes
from lowbit.data import Data
from lowbit.engines.compile import Batch
from lowbit.errors import DataError, InputError, ModelError
from lowbit.flows.ptq import Observed
from lowbit.model import Model, Port
from lowbit.network.calibrate import forward, tensors
from lowbit.network.live_batchnorm import LiveNorm, measuring, mirrored
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant, Quantizer
from lowbit.network.stored import FakeBias, WeightQuant
from lowbit.numerics import Int
from lowbit.ranges import Histogram, Learned, Range
from lowbit.repair.prove import Calibration
from lowbit.repair.ranges import choose_ranges
from lowbit.solve import SOLVERS

TENSOR = object()
KEPT = 64  # samples that ranges are judged by, of those that come in calibration mode


@dataclass(frozen=True)
class Calls:
    """How the model that was given is called, and what it returns.

    names       inputs of the program; outputs: its outputs
    signature   of the module's forward; None: of a program, by name or in order
    structure   of what forward returned for the example; None: {name: tensor}
    kept        its parts, and TENSOR in the place of each tensor
    example     a batch by name
    """

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Batch
    signature: inspect.Signature | None = None
    structure: pytree.TreeSpec | None = None
    kept: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        return self

    @staticmethod
    def of(module: nn.Module, model: Model, example: Any) -> "Calls":
        args = (
            () if isinstance(example, Mapping) else tuple(example) if isinstance(example, (tuple, list)) else (example,)
        )
        kwargs = dict(example) if isinstance(example, Mapping) else {}
        training = [part for part in module.modules() if part.training]
        with torch.no_grad():
            result = module.eval()(*args, **kwargs)
        for part in training:
            part.training = True
        leaves, structure = pytree.tree_flatten(result)
        names = tuple(str(port.name) for port in model.inputs)
        outputs = tuple(str(v.name) for v in model.program.graph.outputs)
        if sum(isinstance(leaf, Tensor) for leaf in leaves) != len(outputs):
            raise ModelError(
                f"{type(module).__name__} returns {len(leaves)} values, and its program has {len(outputs)} outputs. "
                "Return tensors, or tuples, lists or dicts of them."
            )
        kept = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        calls = Calls(names, outputs, {}, inspect.signature(module.forward), structure, kept)
        inputs = calls.inputs(args, kwargs)
        return replace(calls, example={n: x.detach().cpu().numpy() for n, x in zip(names, inputs, strict=True)})

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """What was given, in the order of the program's inputs."""
        if self.signature is None:
            bound = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        else:
            bound = self.signature.bind(*args, **kwargs).arguments
        if set(self.names) <= bound.keys():
            return [torch.as_tensor(bound[name]) for name in self.names]
        found = [leaf for leaf in pytree.tree_leaves(list(bound.values())) if isinstance(leaf, Tensor)]
        if len(found) != len(self.names):
            raise InputError(f"{len(found)} tensors were given, the network takes {len(self.names)}: {self.names}.")
        return found

    def result(self, outputs: Mapping[str, Tensor]) -> Any:
        """The program's outputs as forward returned them."""
        if self.structure is None:
            return dict(outputs)
        values = iter(self.outputs)
        leaves = [outputs[next(values)] if leaf is TENSOR else leaf for leaf in self.kept]
        return pytree.tree_unflatten(leaves, self.structure)


class Prepared(nn.Module):
    """A network with quantizers, called as the module that it was made of; an ordinary torch module.

    layers      the network: parameters and batch norms under their names in the model
    network     the same, with its quantizers and where they are
    norms       weight → the batch norm that lives behind it
    seen        what `written` needs to know of the model, and samples to prove the file with
    ports       of the model
    calibrated  whether ranges come from data, or from a checkpoint
    """

    layers: nn.Module

    def __init__(self, seen: Observed, calls: Calls, norms: Mapping[str, LiveNorm], ports: Sequence[Port]) -> None:
        super().__init__()
        self.layers = seen.network.module
        self.seen = replace(seen, calibration=Calibration((), (), (), [], tuple))  # data stays out of copies
        self.calls, self.norms, self.ports = calls, dict(norms), tuple(ports)
        self.calibrated = False
        self.kept: list[Batch] | None = None  # batches so far, in calibration mode
        for part in self.layers.modules():
            if isinstance(part, Quantizer | FakeBias):
                part.mode = "quantize"

    @property
    def network(self) -> Network:
        return self.seen.network

    @property
    def device(self) -> torch.device:
        return next(self.layers.parameters(), torch.zeros(())).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.calls.inputs(args, kwargs)
        if self.kept is not None:
            inputs = [x.cpu() for x in inputs]
            if sum(len(next(iter(batch.values()))) for batch in self.kept) < KEPT:
                arrays = [x.detach().cpu().numpy() for x in inputs]
                self.kept.append(dict(zip(self.calls.names, arrays, strict=True)))
        elif not self.calibrated:
            if not self.training:
                self.check_calibrated("evaluate")
            with self.calibration(evaluating=False):  # batch norms by their batch, as training will have them
                self(*args, **kwargs)
        return self.calls.result(self.layers(*inputs))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calibrated)

    def set_extra_state(self, state: Tensor) -> None:
        self.calibrated = bool(state)

    def check_calibrated(self, what: str) -> None:
        """InputError where ranges come from nothing but an example."""
        if not self.calibrated:
            raise InputError(
                f"nothing to {what} yet: the quantizers have no ranges. Run data through the module inside "
                "`with prepared.calibration():`, give prepare calibration=, or train."
            )

    @contextmanager
    def calibration(self, evaluating: bool = True) -> Iterator["Prepared"]:
        """Calibration mode: what passes through inside is observed in float, and gives the ranges afterwards.

        The module lies on the CPU meanwhile, where histograms are counted.

        evaluating   in eval mode, whatever mode the module is in
        """
        training, device = [part for part in self.modules() if part.training], self.device
        self.cpu()
        self.kept = []
        for quantizer in self.network.activations().values():
            quantizer.statistics = Histogram()
        try:
            with torch.no_grad(), self.network.mode("observe"):
                yield self.eval() if evaluating else self
            if not self.kept:
                raise DataError("nothing passed through in calibration mode: call the module on some hundred inputs.")
            self._share()
            self.begin(self.kept)
            self.calibrated = True
            self.seen = replace(self.seen, proof=self.kept[:1])
        finally:
            self.kept = None
            self.to(device)
            for part in training:
                part.training = True

    def _share(self) -> None:
        """Let all processes begin with the same: what each has seen."""
        if processes.count() > 1 and self.kept is not None:
            quantizers = list(self.network.activations().values())
            everyone = processes.gathered((self.kept, [quantizer.statistics for quantizer in quantizers]))
            self.kept = [batch for kept, _ in everyone for batch in kept]
            for quantizer, *shards in zip(quantizers, *(statistics for _, statistics in everyone), strict=True):
                quantizer.statistics = Histogram.dealt(shards)

    def begin(self, fitting: Sequence[Batch]) -> None:
        """Ranges and codes from what was observed. fitting: some of those batches"""
        network = self.network
        restored = [live.norm for live in self.norms.values() if live.restored]
        if restored:
            with network.mode("off"), measuring(restored):
                for batch in fitting:
                    forward(network, batch)
        choose_ranges(network, fitting)
        for activation in network.activations().values():
            if not activation.dynamic and isinstance(activation.format.grid, Int):
                activation.spec = replace(activation.spec, range=_learning(activation.spec.range))
                _begin_anew(activation, activation.learner, activation.learn())
        for name, (site, weight) in network.constants().items():
            values, before = self._read(name), weight.learner
            weight.spec = replace(site.spec, solve="nearest")
            weight.store(SOLVERS["nearest"](values, weight.spec, None))
            assert weight.stored is not None
            if isinstance(weight.stored.scale, Tensor) and weight.stored.zero is None:
                weight.spec = replace(weight.spec, range=_learning(weight.spec.range))
            learner = weight.learn(values)
            if learner is None:
                weight.keep_in_state()
            else:
                _begin_anew(weight, before, learner)

    def _read(self, name: str) -> Tensor:
        """A weight as its quantizer reads it."""
        weight, live = self.network.parameter(name).detach(), self.norms.get(name)
        return weight if live is None else mirrored(weight, live.norm.weight, live.beside)

    def settle(self) -> None:
        """Keep the codes and ranges that there are now."""
        for name, (_, weight) in self.network.constants().items():
            weight.store(weight.current(self._read(name)))
        for activation in self.network.activations().values():
            if activation.learner is not None:
                activation.settle()

    def freeze_batchnorm(self, frozen: bool = True) -> None:
        """Stop the running statistics, and use them in training too; or let them move again."""
        for live in self.norms.values():
            live.norm.frozen = frozen

    @torch.no_grad()
    def estimate_batchnorm(self, data: Any, batch: int = 128) -> None:
        """Measure the running statistics anew, through the quantizers as they are now: the mean of its batches'.

        data   as in `quantize`
        """
        norms = [live.norm for live in self.norms.values()]
        before, training = [(norm.momentum, norm.frozen) for norm in norms], self.training
        self.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.frozen, norm.training = None, False, True
        try:
            for samples in Data.of(data, self.ports).samples(batch):
                self.layers(*(x.to(self.device) for x in tensors(self.network, samples.inputs)))
        finally:
            for norm, (momentum, frozen) in zip(norms, before, strict=True):
                norm.momentum, norm.frozen = momentum, frozen
            self.train(training)


def _learning(range: Range) -> Range:
    """A range that names no method of learning begins LSQ."""
    return range if isinstance(range, Learned) else Learned("lsq", range)


def _begin_anew(quantizer: FakeQuant | WeightQuant, before: nn.Module | None, learner: nn.Module) -> None:
    """Give a learner that an optimizer may know the numbers that a new one begins with."""
    if before is not None:
        before.load_state_dict(learner.state_dict())
        quantizer.learner = before  # type: ignore[assignment]
