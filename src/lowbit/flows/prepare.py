"""A network that trains with its quantizers in place, as an ordinary torch module, and the way back to a file.

prepare    passes, placement, live batch norms; ranges from calibration data, or from the first batch that trains
train      anyone's loop, with a straight-through gradient through each quantizer
convert    batch norms folded into scales, codes as they were trained, the file proved against the trained module
"""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lowbit.data import Data
from lowbit.data.made_up import made_up_batch
from lowbit.errors import InputError
from lowbit.flows.given import example_of, is_module, refuse_quantized
from lowbit.flows.prepared import Calls, Prepared
from lowbit.flows.ptq import MEMORY, Stage, observed, written
from lowbit.graph import PASSES
from lowbit.graph.fold_batchnorm import FOLDED
from lowbit.graph.layer import RECURRENT, layers_of, linear_layer
from lowbit.model import Model, load
from lowbit.network.live_batchnorm import fold, revive
from lowbit.network.network import Network
from lowbit.network.rectifier import put_rectifiers
from lowbit.network.widen_scales import widen_scales_for_biases
from lowbit.numerics import Format
from lowbit.presets import find_recipe
from lowbit.recipe import Recipe

NORMALIZING = {
    "BatchNormalization",
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "RMSNormalization",
}
BatchNorms = Literal["keep", "restore"]


def prepare(
    model: Any,
    example_inputs: Any = None,
    recipe: "str | Path | Format | Recipe" = "w4a4",
    *,
    calibration: Any = None,
    target: str | None = None,
    batchnorm: BatchNorms | None = None,
    memory: int = MEMORY,
    stage: Stage = lambda _: None,
) -> "Prepared":
    """A module that trains in few bits: quantizers stand on the values that the recipe names.

    model            a torch module, a Model, or whatever `load` takes
    example_inputs   of a torch module: a tensor, a tuple, or a dict by argument, as torch.onnx.export takes them. Data
                     of any other kind, and any for a Model, is taken for `calibration`
    recipe           as in `quantize`; its steps that repair without training are left out. `train` prunes as its rules
                     say; a loop of your own has masks by lowbit.Pruning
    calibration      data as in `quantize`, from which ranges begin. None: ranges begin in calibration mode, or with the
                     first batch in training mode
    batchnorm        "keep": batch norms of the model stay alive. "restore": convolutions whose batch norm a file has
                     folded get one again, which begins as the same function; needs calibration. None: "restore" where a
                     file with calibration data has no batch norm, else "keep"
    target, memory, stage   as in `quantize`
    """
    if isinstance(model, Prepared):
        raise InputError("this module is prepared already: train it, or `convert` it. Give prepare the float module.")
    asked = find_recipe(recipe, target)
    chosen = replace(asked, passes=tuple(name for name in asked.passes if name in PASSES))
    chosen.check_deployable()
    given, calls, data = _given(model, example_inputs, calibration)
    refuse_quantized(given)
    has_data = data is not None
    with warnings.catch_warnings():
        if data is None:  # nothing is chosen from what the example shows
            warnings.filterwarnings("ignore", "input '.*' is .* throughout")
            data = Data.of([dict(calls.example)], given.inputs)
        seen = observed(given, data, chosen, memory, stage, prunes=False)
    _warn_of_stopped_gradients(seen.network)
    restore = batchnorm == "restore" or (batchnorm is None and has_data and not is_module(model))
    restore = restore and not (batchnorm is None and any(FOLDED in n.meta for n in seen.network.program.graph))
    if restore and not has_data:
        raise InputError('batchnorm="restore" measures statistics on data: give calibration=.')
    norms, notes = revive(seen.network, restore)
    put_rectifiers(seen.network)
    prepared = Prepared(replace(seen, notes=seen.notes + notes), calls, norms, given.inputs)
    _let_train(seen.network, model)
    stage("choosing ranges")
    prepared.begin(seen.calibration.fitting)
    prepared.calibrated = has_data or all(q.dynamic for q in seen.network.activations().values())
    if not is_module(model):
        return prepared.train()
    first = next(model.parameters(), torch.zeros(()))
    return prepared.to(first.device).train(model.training)


def convert(prepared: nn.Module, stage: Stage = lambda _: None) -> Model:
    """The deployed model of what was prepared and trained or calibrated, proved against it in the engine.

    prepared   from `prepare`; also inside DistributedDataParallel, torch.compile or an averaged model

    The prepared module stays as it is and can train on. InputError where it has no ranges yet or a weight is not
    finite; MismatchError where the file does not compute what was trained, layer by layer to one step.
    """
    unwrapped = prepared
    while not isinstance(unwrapped, Prepared):
        inner = getattr(unwrapped, "_orig_mod", None) or getattr(unwrapped, "module", None)
        if not isinstance(inner, nn.Module):
            raise InputError(
                f"convert takes what prepare gave, not a {type(prepared).__name__}. To quantize a network without "
                "training use lowbit.quantize(model, calibration)."
            )
        unwrapped = inner
    unwrapped.check_calibrated("convert")
    trained = copy.deepcopy(unwrapped).cpu().eval()
    _check_finite(trained.network)
    trained.settle()
    network = fold(trained.network, trained.norms)
    notes = [*trained.seen.notes, "trained with its quantizers in place", *widen_scales_for_biases(network)]
    return written(replace(trained.seen, network=network, trained=trained.network, notes=notes), stage)


def _given(model: Any, example_inputs: Any, calibration: Any) -> tuple[Model, Calls, Data | None]:
    """The program, how it is called, and its data if there is any."""
    if not is_module(model):
        loaded = model if isinstance(model, Model) else load(model)
        data = example_inputs if calibration is None else calibration
        names = tuple(str(port.name) for port in loaded.inputs)
        example = made_up_batch(loaded) if data is None else {}
        calls = Calls(names, tuple(port.name for port in loaded.outputs), example)
        return loaded, calls, None if data is None else Data.of(data, loaded.inputs)
    if not _is_example(example_inputs):
        if calibration is not None and example_inputs is not None:
            raise InputError("both example_inputs and calibration are data: give one of them, and examples as tensors.")
        calibration = example_inputs if calibration is None else calibration
        if calibration is None:
            raise InputError("a torch module needs example inputs to be read: prepare(module, example_inputs).")
        example_inputs, calibration = example_of(model, calibration)
    loaded = load(model, example_inputs)
    calls = Calls.of(model, loaded, example_inputs)
    return loaded, calls, None if calibration is None else Data.of(calibration, loaded.inputs)


def _is_example(inputs: Any) -> bool:
    """Whether these are arguments as torch.onnx.export takes them: tensors, alone or in a tuple, list or dict."""
    leaves = pytree.tree_leaves(inputs) if isinstance(inputs, (torch.Tensor, tuple, list, dict)) else []
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _let_train(network: Network, model: Any) -> None:
    """Leave constants of formulas alone: of a module what was no trainable parameter, of a file what no layer reads."""
    trains = {
        str(value.name)
        for node in network.program.graph
        for index, value in enumerate(node.inputs)
        if value is not None and ((node.op_type in NORMALIZING and index) or node.op_type == "PRelu")
    }
    for node in network.program.graph:
        for layer in layers_of(node):
            trains |= {str(layer.value.name), str(layer.bias_value.name if layer.bias_value else "")}
        trains |= {str(v.name) for v in node.inputs[3:4] if v is not None and node.op_type in RECURRENT}
        full = linear_layer(node)
        trains |= {str(full.bias_value.name)} if full is not None and full.bias_value else set()
    own = dict(model.named_parameters()) if is_module(model) else {}
    for name in network.module.meta["keys"]:
        tensor = network.parameter(name)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(own[name].requires_grad if name in own else name in trains and tensor.dim() > 0)


def _warn_of_stopped_gradients(network: Network) -> None:
    """Operators that run in onnxruntime inside the network, as QuantizedRecurrence does not."""
    calls = [n for n in network.module.graph.nodes if n.op == "call_module" and "op" in n.meta]
    computed = [n for n in calls if "exact" not in n.meta and not n.meta.get("on_host")]
    if stops := [f"{n.meta['op']} '{n.meta['node']}'" for n in computed]:
        warnings.warn(
            f"no gradient passes through {', '.join(stops)}: onnxruntime computes it. What lies before it does not "
            "train by what lies behind it.",
            stacklevel=3,
        )


def _check_finite(network: Network) -> None:
    """InputError that names the layer where training ended in NaN."""
    for name, tensor in network.module.named_parameters():
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{bad} of {tensor.numel()} values of '{name}' are NaN or infinite: training diverged. Start again "
                "from the last good checkpoint with a smaller learning rate, or clip gradients."
            )
