"""Deep Compression, the whole story: prune while training, share what is left, train the shared values, write, prove.

Source: Han et al. 2016 (arXiv 1510.00149); pruned weights may come back while training (Guo et al. 2016), sparsity
rises by a cubic (Zhu and Gupta 2017), and the float network teaches where labels are missing (Hinton et al. 2015).
"""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lowbit
from lowbit.data import Data
from lowbit.deploy.compact import compact
from lowbit.deploy.export import export, ledger
from lowbit.deploy.proof import verify
from lowbit.engines.compile import Batch
from lowbit.errors import InputError, UnsupportedError
from lowbit.flows.compression import Progress, compression, schedule_of, trains
from lowbit.flows.fit_size import BATCH, MOST_SAMPLES
from lowbit.flows.given import by_name, model_and_data, refuse_quantized, samples_lead
from lowbit.flows.masks import SMALLEST, compressible
from lowbit.flows.prune_and_share import Compressor
from lowbit.flows.rest import round_parameters
from lowbit.graph import PASSES
from lowbit.graph.layer import layer_names
from lowbit.metadata import to_text
from lowbit.model import Model
from lowbit.network.build import build
from lowbit.network.idle_rules import idle_rules
from lowbit.network.network import Network
from lowbit.network.sites import Placement, Site
from lowbit.network.weights import orient
from lowbit.numerics import Format
from lowbit.recipe import Recipe
from lowbit.solve import SOLVERS
from lowbit.solve.prune import Pruning
from lowbit.storage.container import pack
from lowbit.targets import find_target
from lowbit.training.augment import AUGMENTS
from lowbit.training.distill import Task
from lowbit.training.loop import Augment, Training
from lowbit.training.samples import Samples
from lowbit.training.schedule import Schedule


def compress(
    model: Any,
    data: Any,
    recipe: "str | Path | Format | Recipe | None" = None,
    schedule: "str | Path | Mapping[str, Any] | Schedule | None" = None,
    *,
    ratio: float | None = None,
    prune: "Pruning | float | None" = None,
    codebook: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    augment: Augment | None = None,
    **changes: Any,
) -> Model:
    """A model whose weights are codes into small tables, most of them zero; `pack` makes it one small file.

    model        a Model, whatever `load` takes, or a torch module: its example inputs are the first of the data
    data         samples, with class labels where there are any; to train, all of them are kept in memory
    recipe       as in `quantize`, for weights: formats, pruning, a ratio. Its steps that repair are left out. None:
                 what `ratio`, `prune` and `codebook` ask for
    schedule     a Schedule, its words 'prune_epochs=16 batch=128', or a TOML file; `changes` are its fields
    ratio        float32 bytes of the parameters over bytes of the packed file; overrides the recipe's
    prune        share of weights that become zero, or a Pruning; None: the recipe's. Without: 0.9, or 0 with a ratio
    codebook     bits of a code where there is neither recipe nor ratio, 1 … 8; 0: weights stay float32. None: 4
    checkpoint   a file to keep the state in: an interrupted run resumes to the same result, bit for bit
    progress     called with (phase, steps done, steps of the phase)
    augment      (images, generator) → images, for each training batch; None: the schedule's

    The written program is run in onnxruntime and compared with what was trained: MismatchError if they differ.
    """
    asked, how = compression(recipe, ratio, prune, codebook), schedule_of(schedule, **changes)
    model, given = model_and_data(model, data)
    refuse_quantized(model)
    prepared = model.copy()
    for name in asked.passes:
        if name in PASSES:
            PASSES[name](prepared.program)
    network = Network(prepared.program, _placement(prepared, asked))
    samples, batches = _samples(model, given, asked, how)
    training = None
    if samples is not None:
        task = Task.of(build(prepared.program).eval(), samples, how.distill, how.temperature)
        training = Training(task, samples, how.batch, augment or AUGMENTS.get(how.augment))
    measure = partial(_packed_bytes, network, model.source, asked)
    told = progress or (lambda *_: None)
    run = Compressor(network, batches, training, asked, how, measure, told, checkpoint)
    run.to_end()
    round_parameters(network, asked)
    small = _written(network, model.source, asked)
    if training is not None:
        small.program.metadata_props["lowbit.schedule"] = how.to_toml()
    verify(network, small.program, batches[:2])
    run.checkpoints.remove()
    return small


def _samples(model: Model, data: Data, recipe: Recipe, schedule: Schedule) -> tuple[Samples | None, list[Batch]]:
    """What is trained on, if anything is; and batches that sensitivities and moments are measured on."""
    if trains(recipe, schedule):
        samples_lead(model, "compress takes", "`lb.compress_tensors` prunes and shares the weights without training.")
        samples = Samples.of(data.batches(max(schedule.batch, 64)))
        return samples, [by_name(model, part) for part in samples.parts(BATCH, MOST_SAMPLES)]
    return None, [inputs for inputs, _ in data.take(MOST_SAMPLES).batches(BATCH)]


def _placement(model: Model, recipe: Recipe) -> Placement:
    """A site on every weight that the recipe stores or prunes. UnsupportedError where there is none."""
    nodes = list(model.program.graph)
    for told in idle_rules(nodes, recipe, find_target(recipe.target)):
        warnings.warn(told, stacklevel=3)
    sites = {}
    for name, layer in compressible(model.program).items():
        names = layer_names(layer.node)
        spec = recipe.specs(names)[0]
        if spec.format is not None:
            kind = orient(spec.format, layer.output_axis, layer.summed_axis, layer.weight.shape)
            spec = replace(spec, format=kind)
        if spec.format is not None or recipe.prunings({name: names}):
            sites[name] = Site(name, "weight", spec, str(layer.node.name), name)
    if not sites:
        raise UnsupportedError(
            f"'{model.source}' has no weight of {SMALLEST} elements or more in a layer that can be compressed. "
            "`lowbit pack` codes the file as it is."
        )
    return Placement(sites, {}, recipe=Recipe((), target="generic", rest=recipe.rest))  # pruned by `Masks`


def _written(network: Network, source: str, recipe: Recipe) -> Model:
    """The program of what the network holds, with its recipe and ledger."""
    program = compact(export(network, whole_codes=True), network.program)
    program.metadata_props["lowbit.version"] = lowbit.__version__
    program.metadata_props["lowbit.recipe"] = recipe.to_toml()
    rows = [row | {"range": ""} for row in ledger(network)]  # steps and tables do not come from a range
    program.metadata_props["lowbit.ledger"] = to_text(rows)
    return Model(program, source)


def _packed_bytes(network: Network, source: str, recipe: Recipe) -> int:
    """Bytes of the file that the network would make as it is now, its constants rounded."""
    round_parameters(network, recipe)
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        return pack(_written(network, source, recipe), Path(folder) / "0.lowbit")


def compress_tensors(
    tensors: Mapping[str, Any],
    recipe: "str | Path | Format | Recipe | None" = None,
    *,
    prune: "Pruning | float | None" = None,
    codebook: int | None = None,
) -> dict[str, Any]:
    """A state dict whose weights are pruned and shared without training, for a module that cannot be exported.

    tensors   name → torch tensor or numpy array
    recipe, prune, codebook   as in `compress`; rules match the names of the tensors
    return    the same names, shapes and types; `pack` stores the few different values of each weight as codes

    Weights are float tensors of two axes or more and 256 elements or more; all else is returned as it is. Their outputs
    lie along the first axis.
    """
    asked = compression(recipe, None, prune, codebook)
    if asked.ratio:
        raise InputError("a ratio needs a network and samples; for a state dict say how: prune=0.8, codebook=4.")
    weights = {
        name: torch.as_tensor(tensor).detach().float().cpu()
        for name, tensor in tensors.items()
        if torch.as_tensor(tensor).is_floating_point() and torch.as_tensor(tensor).dim() > 1
        and torch.as_tensor(tensor).numel() >= SMALLEST
    }  # fmt: skip
    names = {name: (name, name.removesuffix(".weight")) for name in weights}
    masks: dict[str, Tensor] = {}
    for pruning, together in asked.prunings(names):
        masks |= pruning.masks({name: weights[name] for name in together})
    found = dict(tensors)
    for name, weight in weights.items():
        spec, weight = asked.specs(names[name])[0], weight * masks.get(name, 1)
        if spec.format is not None:
            spec = replace(spec, format=orient(spec.format, 0, 1, tuple(weight.shape)))
            weight = torch.as_tensor(SOLVERS[spec.solve](weight, spec, None).dequantize())
        original = tensors[name]
        is_array = isinstance(original, np.ndarray)
        found[name] = weight.numpy().astype(original.dtype) if is_array else weight.to(original.dtype)
    return found
