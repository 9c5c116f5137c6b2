"""The real models that loading and every exact pass must leave alone, and an input for each."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from lowbit.engines.compile import Batch
from lowbit.model import Model, load

MODELS = [
    "cifar10-resnet20",
    "cifar10-resnet32",
    "cifar10-resnet8-mlperf-tiny",
    "imagenet-mobilenet_v1_0.25_128",
    "imagenet-squeezenet1_1",
    "vww-mobilenet_v1_0.25_96",
    pytest.param("detection/deeplabv3-mobilenetv2-voc", marks=pytest.mark.slow),
    "detection/face-RFB-320",
    "detection/face-slim-320",
    "detection/yolox_nano",
    "speech/kws-dscnn",
    "speech/silero_vad_16k_op15",
    "text/charlstm-charlotte_bronte",
]
SIZES = {"sequence": 576, "time": 12}


@cache
def loaded(path: Path) -> Model:
    """The model, loaded once for all tests; `copy()` it before changing it."""
    return load(path)


@cache
def known(path: Path) -> tuple[Batch, Batch]:
    """An input, and what onnxruntime makes of it with the file as it is: computed once for all tests."""
    batch = batch_for(path)
    return batch, source_outputs(path, batch)


def batch_for(path: Path) -> dict[str, np.ndarray]:
    """Two samples (one where the batch is fixed) of noise, ids or a sampling rate."""
    random = np.random.default_rng(7)
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    batch = {}
    for port in graph.input:
        if port.name in weights:
            continue
        dims = port.type.tensor_type.shape.dim
        shape = [dim.dim_value or SIZES.get(dim.dim_param, 2) for dim in dims]
        if port.name == "sr":
            batch[port.name] = np.array(16000)
        elif port.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            batch[port.name] = random.integers(0, 50, shape)
        else:
            batch[port.name] = random.standard_normal(shape).astype(np.float32)
    return batch


def source_outputs(path: Path, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What onnxruntime makes of the file as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, batch), strict=True))


def relative_error(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> float:
    """The largest difference as a share of the largest output; names and order must agree."""
    assert list(expected) == list(got)
    return max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected.values(), got.values(), strict=True)
    )
