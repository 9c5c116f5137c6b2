"""Deep Compression, the whole story: prune while training, share what is left, train the shared values, write, prove.

Source: Han et al. 2016 (arXiv 1510.00149); pruned weights may come back while training (Guo et al. 2016), sparsity
rises by a cubic (Zhu and Gupta 2017), and the float network teaches where labels are missing (Hinton et al. 2015).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

import lowbit
from lowbit.data import Data
from lowbit.deploy.codebook import fewer_mantissa_bits, write_codebook
from lowbit.errors import InputError, MismatchError
from lowbit.flows.distill import Task
from lowbit.flows.train import Adam, Checkpoints, Samples, order
from lowbit.graph import PASSES
from lowbit.model import Model, load
from lowbit.simulate.build import build
from lowbit.simulate.compressed import CompressedNetwork
from lowbit.simulate.place import WEIGHT_AXES
from lowbit.solve.prune import Pruning, cubic_sparsity
from lowbit.solve.share import Shared, share

SMALLEST = 256
"""Weights of fewer elements stay as they are: nodes and tables would cost more than they save."""
PREPARE = ("recognize_operators", "fold_batchnorm", "fuse_gemm")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Layer:
    """What becomes of one weight: the share of it that becomes zero, and the bits of a code."""

    name: str
    sparsity: float
    codebook: int


@dataclass(frozen=True)
class Compression:
    """What becomes of the weights, and how long is trained for it.

    prune            share of weights that become zero, or a Pruning; 0: none
    codebook         bits of a shared weight's code, 1 … 8; 0: weights are pruned but not shared
    tables           tables of shared values for each weight: parts of its first axis that have their own
    start, rate      of weight sharing, see lowbit.solve.share
    prune_epochs     while sparsity rises and settles;  share_epochs: while shared values are trained
    learning_rate    a step, relative to a tensor's root mean square
    distill          share of the loss that is agreement with the float network, where there are labels; without: 1
    mantissa_bits    of the biases and tables that stay float32
    layers           choices for single weights, which override prune and codebook; see lowbit.flows.shrink
    """

    prune: float | Pruning = 0.9
    codebook: int = 4
    tables: int = 1
    start: str = "linear"
    rate: float = 0.0
    prune_epochs: float = 8
    share_epochs: float = 3
    batch: int = 64
    learning_rate: float = 0.02
    distill: float = 0.5
    temperature: float = 2.0
    mantissa_bits: int = 7
    seed: int = 0
    layers: tuple["Layer", ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.codebook <= 8:
            raise InputError(f"a codebook has 1 to 8 bits, or 0 for none; not {self.codebook}.")
        if min(self.prune_epochs, self.share_epochs) < 0 or self.batch < 1 or self.learning_rate <= 0:
            raise InputError(f"{self!r}: epochs are 0 or more, batch and learning rate above 0.")
        if not 0 <= self.distill <= 1 or not 1 <= self.mantissa_bits <= 23:
            raise InputError(f"{self!r}: distill is 0 … 1, mantissa_bits 1 … 23.")

    @property
    def pruning(self) -> Pruning:
        return self.prune if isinstance(self.prune, Pruning) else Pruning(self.prune)


def compress(
    model: Any,
    data: Any,
    settings: Compression | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    **changes: Any,
) -> Model:
    """A model whose weights are codes into small tables, most of them zero; `pack` makes it one small file.

    model        a Model, whatever `load` takes, or a torch module, whose example input is the first batch of the data
    data         samples, with class labels where there are any; all of them are kept in memory
    settings     a Compression; `changes` are its fields, `prune=0.95, codebook=3`
    checkpoint   a file to keep the state in: an interrupted run resumes to the same result, bit for bit
    progress     called with (phase, steps done, steps of the phase)
    augment      (images, generator) → images, for each training batch

    The written program is run in onnxruntime and compared with what was trained: MismatchError if they differ.
    """
    chosen = replace(settings or Compression(), **changes)
    model = model if isinstance(model, Model) else load(model, _example(model, data))
    prepared = model.copy()
    for name in PREPARE:
        PASSES[name](prepared.program)
    weights = compressible(prepared.program)
    samples = Samples.of(Data.of(data, model.inputs).batches(max(chosen.batch, 64)))
    run = _Run(prepared, weights, samples, chosen, checkpoint, progress or (lambda *_: None), augment)
    network = run.train()
    program = write(prepared.program, network, chosen, run.keys)
    _verify(Model(program, model.source), run.network, samples, prepared)
    run.checkpoints.remove()
    return Model(program, model.source)


def compressible(program: ir.Model) -> dict[str, int]:
    """Initialisers that are weights of some layer and large enough → the axis of their output channels."""
    found: dict[str, int] = {}
    for node in program.graph:
        indices, output_axis, _ = WEIGHT_AXES.get(node.op_type, ((), 0, 0))
        if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
            output_axis = 0
        for index in indices:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None or value.const_value is None or value.is_graph_output():
                continue
            if value.const_value.dtype is ir.DataType.FLOAT and value.const_value.size >= SMALLEST:
                found[str(value.name)] = output_axis % len(value.const_value.shape)
    return found


def compress_tensors(tensors: Mapping[str, Any], settings: Compression | None = None, **changes: Any) -> dict[str, Any]:
    """A state dict whose weights are pruned and shared without training, for a module that cannot be exported.

    tensors   name → torch tensor or numpy array
    return    the same names, shapes and types; `pack` stores the few different values of each weight as codes

    Weights are float tensors of two axes or more and 256 elements or more; all else is returned as it is.
    """
    chosen = replace(settings or Compression(), **changes)
    weights = {
        name: torch.as_tensor(tensor).detach().float().cpu()
        for name, tensor in tensors.items()
        if torch.as_tensor(tensor).is_floating_point() and torch.as_tensor(tensor).dim() > 1
        and torch.as_tensor(tensor).numel() >= SMALLEST
    }  # fmt: skip
    masks = chosen.pruning.masks(weights) if weights and chosen.pruning.sparsity else {}
    found = dict(tensors)
    for name, weight in weights.items():
        mask = masks.get(name)
        if chosen.codebook:
            shared = share(weight, mask, chosen.codebook, start=chosen.start, rate=chosen.rate)
            weight = shared.dense()
        elif mask is not None:
            weight = weight * mask
        original = tensors[name]
        is_array = isinstance(original, np.ndarray)
        found[name] = weight.numpy().astype(original.dtype) if is_array else weight.to(original.dtype)
    return found


def _example(module: Any, data: Any) -> Any:
    """The first batch, for a torch module; files need none."""
    if not isinstance(module, torch.nn.Module):
        return None
    first = next(iter(data.values())) if isinstance(data, Mapping) else next(iter(data))
    first = first[0] if isinstance(first, (tuple, list)) else first
    return torch.as_tensor(first)[:2]


class _Run:
    """One training run: its phases, its state, and how it resumes."""

    def __init__(
        self,
        prepared: Model,
        weights: Mapping[str, int],
        samples: Samples,
        settings: Compression,
        checkpoint: str | Path | None,
        progress: Progress,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    ) -> None:
        module = build(prepared.program).eval()
        self.keys: dict[str, str] = module.meta["keys"]
        self.axes = {self.keys[name]: axis for name, axis in weights.items() if name in self.keys}
        self.network = CompressedNetwork(module)
        self.samples, self.settings, self.progress, self.augment = samples, settings, progress, augment
        self.layers = {self.keys[layer.name]: layer for layer in settings.layers if layer.name in self.keys}
        if unknown := [layer.name for layer in settings.layers if self.keys.get(layer.name) not in self.axes]:
            raise InputError(f"'{unknown[0]}' is not a weight that can be compressed; these are: {', '.join(weights)}.")
        self.prunes = settings.pruning.sparsity > 0 or any(layer.sparsity for layer in settings.layers)
        self.task = Task.of(self.network, samples, settings.distill, settings.temperature)
        per_epoch = max(1, len(samples) // settings.batch)
        self.steps = {
            "prune": math.ceil(settings.prune_epochs * per_epoch) if self.prunes else 0,
            "share": math.ceil(settings.share_epochs * per_epoch) if settings.codebook or settings.layers else 0,
        }
        identity = {
            "settings": asdict(settings),
            "source": {key: float(p.double().abs().sum()) for key, p in self.network.parameters.items()},
            "samples": [len(samples), *(float(x[0].double().sum()) for x in samples.inputs)],
        }
        self.checkpoints = Checkpoints(None if checkpoint is None else Path(checkpoint), identity)

    def train(self) -> CompressedNetwork:
        """All phases; what a checkpoint holds is not done again."""
        phase, step, adam = self._resume()
        if phase == "prune":
            if not step:
                adam = Adam.of(self.network.parameters)
            self._phase("prune", step, adam)
            self._share()
            phase, step, adam = "share", 0, Adam.of(self.network.parameters)
        self._phase("share", step, adam)
        return self.network

    def _phase(self, phase: str, start: int, adam: Adam) -> None:
        total = self.steps[phase]
        rate = self.settings.learning_rate * (1.0 if phase == "prune" else 0.25)
        per_epoch = max(1, len(self.samples) // self.settings.batch)
        rows = order(len(self.samples), start // per_epoch, self._seed(phase))
        for step in range(start, total):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                rows = order(len(self.samples), epoch, self._seed(phase))
            if phase == "prune":
                self._update_masks(step, total)
            part = self.samples.take(rows[place * self.settings.batch : (place + 1) * self.settings.batch])
            if self.augment is not None:
                generator = torch.Generator().manual_seed(self._seed(phase) * 7919 + step)
                part = replace(part, inputs=tuple(self.augment(x, generator) for x in part.inputs))
            chosen = rows[place * self.settings.batch : (place + 1) * self.settings.batch]
            self._step(part, None if self.augment else chosen, adam, rate * _cosine(step, total), step + 1)
            self.progress(phase, step + 1, total)
            self.checkpoints.save(lambda done=step + 1: self._state(phase, done, adam))  # type: ignore[misc]
        if phase == "prune":
            self._update_masks(total, total)

    def _seed(self, phase: str) -> int:
        return self.settings.seed * 2 + (phase == "share")

    def _step(self, part: Samples, rows: Tensor | None, adam: Adam, rate: float, number: int) -> None:
        parameters = self.network.parameters
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        loss = self.task.loss(self.network(*part.inputs), part, rows)
        keys = list(parameters)
        gradients = torch.autograd.grad(loss, [parameters[key] for key in keys], allow_unused=True)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        with torch.no_grad():
            found = {key: gradient for key, gradient in zip(keys, gradients, strict=True) if gradient is not None}
            adam.step(parameters, found, rate, number)

    def _update_masks(self, step: int, total: int) -> None:
        """Sparsity rises over the first half of the phase; masks may change until four fifths, then they stay."""
        pruning = self.settings.pruning
        every = max(16, total // 200)
        settled = int(0.8 * total)
        if not self.prunes or (step % every and step != total) or (step > settled and self.network.masks):
            return
        reached = 1.0 if step == total else cubic_sparsity(step, max(1, total // 2), 1.0)
        dense = {key: self.network.parameters[key].movedim(axis, 0) for key, axis in self.axes.items()}
        alone = {key: dense.pop(key) for key in self.layers}
        masks = pruning.masks(dense, pruning.sparsity * reached) if dense and pruning.sparsity else {}
        for key, weight in alone.items():
            masks |= replace(pruning, scope="layer").masks({key: weight}, self.layers[key].sparsity * reached)
        for key, mask in masks.items():
            self.network.masks[key] = mask.movedim(0, self.axes[key]).contiguous()

    def _share(self) -> None:
        """Codes for every weight; from here on they stay."""
        for key in self.axes:
            bits = self.layers[key].codebook if key in self.layers else self.settings.codebook
            if not bits:
                continue
            weight, mask = self.network.parameters[key], self.network.masks.get(key)
            tables = self.settings.tables if len(weight) % self.settings.tables == 0 else 1
            settings = self.settings
            shared = share(weight, mask, bits, groups=tables, start=settings.start, rate=settings.rate)
            self.network.share(key, shared)

    def _state(self, phase: str, step: int, adam: Adam) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = self.network
        groups = {
            "parameter": network.parameters,
            "mask": network.masks,
            "codes": {key: shared.codes for key, shared in network.shared.items()},
            "first": adam.first,
            "second": adam.second,
        }
        tensors = {f"{group}/{key}": tensor for group, items in groups.items() for key, tensor in items.items()}
        zeros = {key: shared.zero for key, shared in network.shared.items()}
        return tensors, {"phase": phase, "step": step, "sizes": adam.sizes, "zeros": zeros}

    def _resume(self) -> tuple[str, int, Adam]:
        found = self.checkpoints.load()
        if found is None:
            return "prune", 0, Adam({})
        tensors, notes = found
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, key = name.split("/", 1)
            groups.setdefault(group, {})[key] = tensor
        for key, codes in groups.get("codes", {}).items():
            self.network.share(key, Shared(codes, groups["parameter"][key], notes["zeros"][key]))
        self.network.parameters.update(groups["parameter"])
        self.network.masks = groups.get("mask", {})
        return notes["phase"], notes["step"], Adam(notes["sizes"], groups["first"], groups["second"])


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


def write(program: ir.Model, network: CompressedNetwork, settings: Compression, keys: Mapping[str, str]) -> ir.Model:
    """The program with shared weights as codes and tables, pruned ones as zeros, biases of fewer mantissa bits."""
    program = program.clone()
    rows = []
    for name, key in keys.items():
        value = program.graph.initializers.get(name)
        if value is None or key not in network.parameters or value.const_value is None:
            continue
        before = value.const_value
        layer = next((str(use.node.name) for use in value.uses()), "")
        row: dict[str, Any] = {"tensor": name, "layer": layer, "status": "quantized", "reason": ""}
        if key in network.shared:
            shared = network.shared[key]
            tables = fewer_mantissa_bits(_tables(network, key).numpy(), settings.mantissa_bits)
            network.parameters[key].copy_(torch.from_numpy(tables))
            codes, table = write_codebook(program, name, shared.codes.numpy(), tables)
            bits = max(1, (shared.tables.shape[1] - 1).bit_length())
            row |= {"role": "weight", "format": f"codebook:{bits}", "bits": 8 * codes / before.size}
            row |= {
                "bytes": codes + table,
                "solver": "kmeans",
                "sparsity": _zeros(shared.codes) if shared.zero else 0.0,
            }
        else:
            array = network.weights()[key].detach()
            kept = array if key in network.masks else torch.from_numpy(
                fewer_mantissa_bits(array.numpy(), settings.mantissa_bits)
            )  # fmt: skip
            network.parameters[key].copy_(kept)
            value.const_value = ir.tensor(kept.numpy().copy(), name=name)
            row |= {"role": "weight" if key in network.masks else "bias", "format": "float32", "bits": 32}
            row |= {"bytes": before.nbytes, "sparsity": _zeros(kept), "status": "float", "reason": "not shared"}
        rows.append(row)
    for node in program.graph:  # an exporter's notes on source code: up to a third of a small file
        for note in [note for note in node.metadata_props if note.startswith("pkg.")]:
            del node.metadata_props[note]
    program.metadata_props["lowbit.version"] = lowbit.__version__
    program.metadata_props["lowbit.recipe"] = json.dumps({"compress": asdict(settings)})
    program.metadata_props["lowbit.ledger"] = json.dumps(rows)
    return program


def _tables(network: CompressedNetwork, key: str) -> Tensor:
    tables = network.parameters[key].detach().clone()
    if network.shared[key].zero:
        tables[:, 0] = 0
    return tables


def _zeros(codes: Tensor) -> float:
    return round(float((codes == 0).float().mean()), 6)


def _verify(written: Model, network: CompressedNetwork, samples: Samples, prepared: Model) -> None:
    """The deployed program computes what was trained, to float rounding."""
    names = [port.name for port in prepared.inputs]
    part = samples.take(torch.arange(min(16, len(samples))))
    outputs = written.run({name: x.numpy() for name, x in zip(names, part.inputs, strict=True)})
    with torch.no_grad():
        expected = network(*part.inputs)
    for name, array in outputs.items():
        wanted = expected[name].numpy()
        scale = float(np.abs(wanted).max()) or 1.0
        error = float(np.abs(np.asarray(array, np.float64) - wanted).max())
        if not error <= 1e-3 * scale:
            raise MismatchError(f"output '{name}' of the written program differs by {error:.3g} of {scale:.3g}.")
