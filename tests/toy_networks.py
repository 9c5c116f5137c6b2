"""Networks small enough to check by hand, in ONNX's own text form, for tests of the whole path."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from lowbit.model import Model, load


def network(text: str, **constants: Any) -> Model:
    """An ONNX text graph, `name (inputs) => (outputs) { nodes }`, with these initialisers (float32 unless integers).

    ONNX's text has no dots in names: '__' becomes one.
    """
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text)
    for name, value in constants.items():
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        proto.graph.initializer.append(numpy_helper.from_array(array, name.replace("__", ".")))
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type.lower()}_{index}"
        node.input[:] = [name.replace("__", ".") for name in node.input]
    return load(proto)


def convolutions(seed: int = 0) -> Model:
    """x (N, 3, 8, 8) → conv1 → relu → maxpool → conv2 → mean over pixels → fc → logits (N, 4)."""
    rng = np.random.default_rng(seed)
    return network(
        """
        toy (float[N,3,8,8] x) => (float[N,4] logits) {
            a = Conv <pads = [1,1,1,1]> (x, conv1__weight, conv1__bias)
            b = Relu (a)
            c = MaxPool <kernel_shape = [2,2], strides = [2,2]> (b)
            d = Conv <pads = [1,1,1,1]> (c, conv2__weight, conv2__bias)
            e = Relu (d)
            f = GlobalAveragePool (e)
            g = Flatten (f)
            logits = Gemm <transB = 1> (g, fc__weight, fc__bias)
        }""",
        conv1__weight=rng.normal(size=(8, 3, 3, 3)) / 5,
        conv1__bias=rng.normal(size=8) / 10,
        conv2__weight=rng.normal(size=(16, 8, 3, 3)) / 8,
        conv2__bias=rng.normal(size=16) / 10,
        fc__weight=rng.normal(size=(4, 16)),
        fc__bias=rng.normal(size=4),
    )


def images(count: int = 64, seed: int = 1) -> np.ndarray:
    """Inputs (count, 3, 8, 8) for `convolutions`."""
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def attention(mask: str, scores: str = "s = MatMul (q, k)") -> Model:
    """Two heads of 8 behind three products, with their join and one product behind them."""
    text = f"""m (float[B,T,16] x, float[{mask}] mask) => (float[B,T,16] y) {{
        a = MatMul (x, wq) b = MatMul (x, wk) c = MatMul (x, wv)
        f = Reshape (a, split) g = Reshape (b, split) h = Reshape (c, split)
        q = Transpose <perm = [0, 2, 1, 3]> (f)
        k = Transpose <perm = [0, 2, 3, 1]> (g)
        v = Transpose <perm = [0, 2, 1, 3]> (h)
        {scores} t = Add (s, mask) p = Softmax <axis = -1> (t) o = MatMul (p, v)
        r = Transpose <perm = [0, 2, 1, 3]> (o) j = Reshape (r, join) y = MatMul (j, wo) }}"""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(16, 16)) / 4 for name in ("wq", "wk", "wv", "wo")}
    return network(text, split=[0, 0, 2, 8], join=[0, 0, 16], half=0.5, **weights)


def label_losses(outputs: list[dict[str, torch.Tensor]], labels: Sequence[np.ndarray]) -> torch.Tensor:
    """The cross-entropy of each sample's label, of batches of the first output."""
    scores = torch.cat([next(iter(batch.values())) for batch in outputs])
    return torch.nn.functional.cross_entropy(scores, torch.from_numpy(np.concatenate(labels)).long(), reduction="none")


def sqnr_db(exact: np.ndarray, rough: np.ndarray) -> float:
    """Signal-to-noise ratio of an output, 10 log₁₀(Σ exact² / Σ (exact − rough)²)."""
    noise = float(np.square(exact.astype(np.float64) - rough).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(exact.astype(np.float64)).sum() / noise))


def stored_scales(model: Model) -> dict[str, np.ndarray]:
    """Scales of the file, by the name of the value or weight that they belong to."""
    found = {}
    for node in model.program.graph:
        if node.op_type == "DequantizeLinear":
            codes, scale = node.inputs[:2]
            owner = codes if codes.const_value is not None else node.outputs[0]
            found[str(owner.name)] = scale.const_value.numpy()
            if codes.producer() is not None:
                found[str(codes.producer().inputs[0].name)] = found[str(owner.name)]
    return found
