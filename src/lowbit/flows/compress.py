"""Deep Compression, the whole story: prune while training, share what is left, train the shared values, write, prove.

Source: Han et al. 2016 (arXiv 1510.00149); pruned weights may come back while training (Guo et al. 2016), sparsity
rises by a cubic (Zhu and Gupta 2017), and the float network teaches where labels are missing (Hinton et al. 2015).
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import lowbit
from lowbit.data import Data
from lowbit.deploy.compact import compact
from lowbit.deploy.export import export, ledger
from lowbit.deploy.proof import verify
from lowbit.engines.compile import Batch
from lowbit.errors import InputError, UnsupportedError
from lowbit.flows.compression import Compression, Layer, Progress
from lowbit.flows.fit_size import BATCH, MOST_SAMPLES
from lowbit.flows.given import model_and_data, refuse_quantized, samples_lead
from lowbit.flows.prune_and_share import Compressor
from lowbit.graph import PASSES
from lowbit.graph.layer import layers_of
from lowbit.metadata import to_text
from lowbit.model import Model
from lowbit.network.build import build
from lowbit.network.network import Network
from lowbit.network.sites import Placement, Site
from lowbit.numerics.mantissa import fewer_mantissa_bits
from lowbit.solve.kmeans import codebook_format, kmeans
from lowbit.storage.container import pack
from lowbit.training.distill import Task
from lowbit.training.loop import Augment, Training
from lowbit.training.samples import Samples

__all__ = ["Compression", "Layer", "Progress", "compress", "compress_tensors", "compressible"]

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
    augment: Augment | None = None,
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
    axes = compressible(prepared.program)
    network = Network(prepared.program, _placement(prepared, axes, chosen))
    samples, batches = _samples(model, given, chosen)
    training = None
    if samples is not None:
        task = Task.of(build(prepared.program).eval(), samples, chosen.distill, chosen.temperature)
        training = Training(task, samples, chosen.batch, augment)
    measure = partial(_packed_bytes, network, model.source, chosen)
    told = progress or (lambda *_: None)
    run = Compressor(network, axes, batches, training, chosen, measure, told, checkpoint)
    run.to_end()
    _shorten_mantissas(network, chosen.mantissa_bits)
    small = _written(network, model.source, chosen)
    verify(network, small.program, batches[:2])
    run.checkpoints.remove()
    return small


def _samples(model: Model, data: Data, settings: Compression) -> tuple[Samples | None, list[Batch]]:
    """What is trained on, if anything is; and batches that sensitivities and moments are measured on."""
    if settings.trains:
        samples_lead(model, "compress takes", "`lb.compress_tensors` prunes and shares the weights without training.")
        samples = Samples.of(data.batches(max(settings.batch, 64)))
        names = [port.name for port in model.inputs]
        parts = samples.parts(BATCH, MOST_SAMPLES)
        return samples, [{n: x.numpy() for n, x in zip(names, part, strict=True)} for part in parts]
    return None, [inputs for inputs, _ in data.take(MOST_SAMPLES).batches(BATCH)]


def _placement(model: Model, weights: Mapping[str, int], settings: Compression) -> Placement:
    """A site on every weight. UnsupportedError where there is none, InputError for a layer that is none of them."""
    if not weights:
        raise UnsupportedError(
            f"'{model.source}' has no weight of {SMALLEST} elements or more in a layer that can be compressed. "
            "`lowbit pack` codes the file as it is."
        )
    if unknown := [layer.name for layer in settings.layers if layer.name not in weights]:
        raise InputError(f"'{unknown[0]}' is not a weight that can be compressed; these are: {', '.join(weights)}.")
    sites = {}
    for name in weights:
        value = model.program.graph.initializers[name]
        assert value.const_value is not None
        spec = settings.spec(name, tuple(value.const_value.shape.numpy()))
        sites[name] = Site(name, "weight", spec, str(next(iter(value.uses())).node.name), name)
    return Placement(sites, {})


def _written(network: Network, source: str, settings: Compression) -> Model:
    """The program of what the network holds, with its recipe and ledger."""
    program = compact(export(network, whole_codes=True), network.program)
    program.metadata_props["lowbit.version"] = lowbit.__version__
    program.metadata_props["lowbit.recipe"] = settings.to_toml()
    rows = [row | {"range": ""} for row in ledger(network)]  # steps and tables do not come from a range
    program.metadata_props["lowbit.ledger"] = to_text(rows)
    return Model(program, source)


def _packed_bytes(network: Network, source: str, settings: Compression) -> int:
    """Bytes of the file that the network would make as it is now, its mantissas shortened."""
    _shorten_mantissas(network, settings.mantissa_bits)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        return pack(_written(network, source, settings), Path(folder) / "0.lowbit")


@torch.no_grad()
def _shorten_mantissas(network: Network, bits: int) -> None:
    """Round float parameters and tables in the network; pruned weights that stay float keep their mantissas."""
    constants = network.constants()
    for name in network.module.meta["keys"]:
        if name not in constants:
            parameter = network.parameter(name)
            if parameter.dtype == torch.float32 and parameter.requires_grad:
                parameter.copy_(fewer_mantissa_bits(parameter, bits))
    for _, quantizer in constants.values():
        stored = quantizer.stored
        if stored is not None and stored.table is not None:
            # An error of half a bit of mantissa stays under 1/32 of the distance between equally spaced values.
            needed = min(23, max(bits, stored.table.shape[1].bit_length() + 2))
            table = fewer_mantissa_bits(torch.as_tensor(stored.table), needed)
            quantizer.store(replace(stored, table=table))


def compressible(program: ir.Model) -> dict[str, int]:
    """Initialisers that are weights of some layer and large enough → the axis of their output channels."""
    found: dict[str, int] = {}
    for layer in (layer for node in program.graph for layer in layers_of(node)):
        value = layer.value
        if not value.is_graph_output() and layer.weight.dtype == np.float32 and layer.weight.size >= SMALLEST:
            found[str(value.name)] = layer.output_axis
    return found


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
            kind = codebook_format(chosen.bits, chosen.start, 1, tuple(weight.shape))
            weight = torch.as_tensor(kmeans(weight, kind, mask, chosen.multiplier).dequantize())
        elif mask is not None:
            weight = weight * mask
        original = tensors[name]
        is_array = isinstance(original, np.ndarray)
        found[name] = weight.numpy().astype(original.dtype) if is_array else weight.to(original.dtype)
    return found
