"""The quantizers that engines bring along, called as their own guides say: onnxruntime's own, and NNCF for OpenVINO."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.numerics import Int
from lowbit.recipe import Recipe

Batch = dict[str, np.ndarray]


def onnxruntime_static(
    source: Path, batches: Sequence[Batch], target: Path, *, method: str = "MinMax", per_channel: bool = True
) -> Path:
    """QDQ with u8 activations and s8 weights; the graph is prepared by onnxruntime's own pre-processing."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    with quiet():
        try:
            quant_pre_process(str(source), str(prepared))
        except Exception:  # its symbolic shape inference fails on some graphs, and can be left out
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )
    return target


def onnxruntime_dynamic(source: Path, target: Path) -> Path:
    """Weights in int8 per channel, ranges of activations measured on each input; no data."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QInt8)
    return target


def onnxruntime_blocks(source: Path, target: Path) -> Path:
    """Weights of MatMul in 4 bits, blocks of 32 with zeros, rounded to nearest; arithmetic in float; no data."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with quiet():
        quantizer = MatMulNBitsQuantizer(str(source), block_size=32)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))
    return target


def without_data(recipe: Recipe) -> tuple[str, Callable[[Path, Path], Path]] | None:
    """onnxruntime's own quantizer for what the recipe asks for, and its name; None where it needs data or has none."""
    weights, activations = recipe.specs(("op:MatMul",))
    if activations.dynamic:
        return "onnxruntime dynamic", onnxruntime_dynamic
    four_bits = weights.format is not None and isinstance(weights.format.grid, Int) and weights.format.grid.bits == 4
    return ("onnxruntime MatMulNBits", onnxruntime_blocks) if four_bits and activations.format is None else None


class _Reader:
    """Batches as onnxruntime's quantizer wants to be handed them: until None."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self.batches, None)


def nncf_openvino(source: Path, batches: Sequence[Batch], target: Path, *, transformer: bool = False) -> Path:
    """NNCF's post-training quantization with its defaults; the model type where the network is a transformer."""
    with quiet():
        import nncf
        import openvino

        options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        model = openvino.Core().read_model(str(source))
        quantized = nncf.quantize(model, nncf.Dataset(list(batches)), subset_size=len(batches), **options)
        openvino.save_model(quantized, str(target), compress_to_fp16=False)
    return target


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars and warnings; their errors still come out."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
