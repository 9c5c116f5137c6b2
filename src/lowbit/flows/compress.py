"""Deep Compression, the whole story: prune while training, share what is left, train the shared values, write, prove.

Source: Han et al. 2016 (arXiv 1510.00149); pruned weights may come back while training (Guo et al. 2016), sparsity
rises by a cubic (Zhu and Gupta 2017), and the float network teaches where labels are missing (Hinton et al. 2015).
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

import lowbit
from lowbit.data import Data
from lowbit.data.samples import Batching
from lowbit.deploy.codebook import fewer_mantissa_bits, write_codebook
from lowbit.errors import InputError, MismatchError, UnsupportedError
from lowbit.flows.compress_run import Run
from lowbit.flows.compression import Compression, Layer, Progress
from lowbit.flows.fit_size import BATCH, MOST_SAMPLES, fit_size
from lowbit.flows.given import model_and_data, refuse_quantized
from lowbit.graph import PASSES
from lowbit.graph.layer import layers_of
from lowbit.graph.notes import drop_notes
from lowbit.model import Model
from lowbit.network.build import build
from lowbit.network.compressed import CompressedNetwork
from lowbit.solve.share import Shared, share
from lowbit.storage.container import pack
from lowbit.train.loop import Samples

__all__ = ["Compression", "Layer", "Progress", "compress", "compress_tensors", "compressible", "write"]

SMALLEST = 256
"""Weights of fewer elements stay as they are: nodes and tables would cost more than they save."""
PREPARE = ("recognize_operators", "fold_batchnorm", "fuse_gemm")


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

    model        a Model, whatever `load` takes, or a torch module: its example inputs are the first of the data
    data         samples, with class labels where there are any; to train, all of them are kept in memory
    settings     a Compression; `changes` are its fields: `prune=0.95, codebook=3`, or `ratio=8` for a size
    checkpoint   a file to keep the state in: an interrupted run resumes to the same result, bit for bit
    progress     called with (phase, steps done, steps of the phase)
    augment      (images, generator) → images, for each training batch

    The written program is run in onnxruntime and compared with what was trained: MismatchError if they differ.
    """
    chosen = replace(settings or Compression(), **changes)
    model, given = model_and_data(model, data)
    refuse_quantized(model)
    prepared = model.copy()
    for name in PREPARE:
        PASSES[name](prepared.program)
    weights = compressible(prepared.program)
    measure = partial(_packed_bytes, prepared, chosen)
    told = progress or (lambda *_: None)
    if chosen.ratio and not chosen.trains and not chosen.pruning.sparsity:
        network, keys, example = _fit(prepared, weights, given, chosen.ratio, measure, told)
        return _written(prepared, network, chosen, keys, example)
    _check_axes(model)
    samples = Samples.of(given.batches(max(chosen.batch, 64)))
    run = Run(prepared, weights, samples, chosen, checkpoint, told, augment, measure)
    found = _written(prepared, run.train(), chosen, run.keys, samples.take(torch.arange(min(16, len(samples)))).inputs)
    run.checkpoints.remove()
    return found


def _fit(
    prepared: Model,
    weights: Mapping[str, int],
    data: Data,
    ratio: float,
    measure: Callable[[Mapping[str, Shared]], int],
    progress: Progress,
) -> tuple[CompressedNetwork, Mapping[str, str], tuple[Tensor, ...]]:
    """The network at a ratio, without training; the keys of its parameters; a batch to try it on."""
    batches = [
        tuple(torch.tensor(array) for array in inputs.values()) for inputs, _ in data.take(MOST_SAMPLES).batches(BATCH)
    ]
    module = build(prepared.program).eval()
    keys: Mapping[str, str] = module.meta["keys"]
    network = CompressedNetwork(module)
    axes = {keys[name]: axis for name, axis in weights.items() if name in keys}
    if not axes:
        raise UnsupportedError(
            f"'{prepared.source}' has no weight of {SMALLEST} elements or more in a layer that can be compressed. "
            "`lowbit pack` codes the file as it is."
        )
    for key, fitted in fit_size(network, axes, batches, ratio, measure, progress).items():
        network.share(key, fitted.shared)
    return network, keys, batches[0]


def _written(
    prepared: Model,
    network: CompressedNetwork,
    settings: Compression,
    keys: Mapping[str, str],
    example: tuple[Tensor, ...],
) -> Model:
    """The deployed model; MismatchError if it computes anything else than the network."""
    model = Model(write(prepared.program, network, settings, keys), prepared.source)
    names = [port.name for port in prepared.inputs]
    outputs = model.run({name: x.numpy() for name, x in zip(names, example, strict=True)})
    with torch.no_grad():
        expected = network(*example)
    for name, array in outputs.items():
        wanted = expected[name].numpy()
        scale = float(np.abs(wanted).max()) or 1.0
        error = float(np.abs(np.asarray(array, np.float64) - wanted).max())
        if not error <= 1e-3 * scale:
            raise MismatchError(f"output '{name}' of the written program differs by {error:.3g} of {scale:.3g}.")
    return model


def compressible(program: ir.Model) -> dict[str, int]:
    """Initialisers that are weights of some layer and large enough → the axis of their output channels."""
    found: dict[str, int] = {}
    for weight in (weight for node in program.graph for weight in layers_of(node)):
        value = weight.value
        if not value.is_graph_output() and weight.weight.dtype == np.float32 and weight.weight.size >= SMALLEST:
            found[str(value.name)] = weight.output_axis
    return found


def _packed_bytes(prepared: Model, settings: Compression, shared: Mapping[str, Shared]) -> int:
    """Bytes of the file that these codes and values would make, with all other parameters as they were."""
    module = build(prepared.program).eval()
    network = CompressedNetwork(module)
    for key, found in shared.items():
        network.share(key, found)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        program = write(prepared.program, network, settings, module.meta["keys"])
        return pack(Model(program, prepared.source), Path(folder) / "0.lowbit")


def compress_tensors(tensors: Mapping[str, Any], settings: Compression | None = None, **changes: Any) -> dict[str, Any]:
    """A state dict whose weights are pruned and shared without training, for a module that cannot be exported.

    tensors   name → torch tensor or numpy array
    return    the same names, shapes and types; `pack` stores the few different values of each weight as codes

    Weights are float tensors of two axes or more and 256 elements or more; all else is returned as it is.
    """
    chosen = replace(settings or Compression(), **changes)
    if chosen.ratio:
        raise InputError("a ratio needs a network and samples; for a state dict say how: prune=0.8, codebook=4.")
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
        if chosen.bits:
            shared = share(weight, mask, chosen.bits, start=chosen.start, rate=chosen.rate)
            weight = shared.dense()
        elif mask is not None:
            weight = weight * mask
        original = tensors[name]
        is_array = isinstance(original, np.ndarray)
        found[name] = weight.numpy().astype(original.dtype) if is_array else weight.to(original.dtype)
    return found


def _check_axes(model: Model) -> None:
    """Samples are shuffled along the first axis of every input."""
    for name, axis in Batching.of(model.inputs).axes.items():
        if axis != 0:
            where = "no axis of samples" if axis is None else f"its samples along axis {axis}"
            raise UnsupportedError(
                f"input '{name}' has {where}; compress trains networks whose inputs all have them along axis 0. "
                "`lb.compress_tensors` prunes and shares the weights without training."
            )


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
            tables = _tables(network, key).numpy()
            # An error of half a bit of mantissa stays under 1/32 of the distance between equally spaced values.
            tables = fewer_mantissa_bits(tables, min(23, max(settings.mantissa_bits, tables.shape[1].bit_length() + 2)))
            network.parameters[key].copy_(torch.from_numpy(tables))
            codes, table = write_codebook(program, name, shared.codes.numpy(), tables)
            bits = max(1, (shared.tables.shape[1] - 1).bit_length())
            row |= {"role": "weight", "format": f"codebook:{bits}", "bits": 8 * codes / before.size}
            row |= {
                "bytes": codes + table,
                "solver": "gptq" if settings.ratio else "kmeans",
                "sparsity": _zeros(shared.codes) if shared.zero else 0.0,
            }
        else:
            array = network.parameters[key].detach()
            kept = array * network.masks[key] if key in network.masks else torch.from_numpy(
                fewer_mantissa_bits(array.numpy(), settings.mantissa_bits)
            )  # fmt: skip
            network.parameters[key].copy_(kept)
            value.const_value = ir.tensor(kept.numpy().copy(), name=name)
            row |= {"role": "weight" if key in network.masks else "bias", "format": "float32", "bits": 32}
            row |= {"bytes": before.nbytes, "sparsity": _zeros(kept), "status": "float", "reason": "not shared"}
        rows.append(row)
    drop_notes(program)
    for value in program.graph.initializers.values():
        value.shape, value.type = None, None  # said by the tensor itself
    program.metadata_props["lowbit.version"] = lowbit.__version__
    default = asdict(Compression())
    asked = {name: value for name, value in asdict(settings).items() if value != default[name]}
    program.metadata_props["lowbit.recipe"] = json.dumps({"compress": asked})
    program.metadata_props["lowbit.ledger"] = json.dumps(rows)
    return program


def _tables(network: CompressedNetwork, key: str) -> Tensor:
    tables = network.parameters[key].detach().clone()
    if network.shared[key].zero:
        tables[:, 0] = 0
    return tables


def _zeros(codes: Tensor) -> float:
    return round(float((codes == 0).float().mean()), 4)
