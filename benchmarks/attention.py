"""Attention with its two products in float and in integers, in onnxruntime: `python -m benchmarks.attention`.

One head group of MiniLM: queries, keys and values of 12 heads of 32 out of int8 layers. "integers": the
queries and the softmax in uint8, the keys and values in int8, which onnxruntime's kernels for VNNI want on the right.
"one operator": both in float, as deployed.
Milliseconds of processor time, one thread, the least of calls taken in turn.
"""

from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from benchmarks.tables import Row, arguments, show
from benchmarks.timing import alternating
from lowbit.deploy.attention import fuse_attention
from lowbit.engines.compile import ENGINES

HEADS, SIZE = 12, 32
WIDTH = HEADS * SIZE
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
attention (float[B,T,384] x, float[B,1,T,T] mask) => (float[B,T,384] y) {
    codes = QuantizeLinear (x, step, middle)
    PROJECTIONS
    scores = MatMul (q, k)
    masked = Add (scores, mask)
    soft = Softmax <axis = -1> (masked)
    SHARES
    mixed = MatMul (shares, v)
    turned = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (turned, joined)
}"""
PROJECTION = """
    x_N = DequantizeLinear (codes, step, middle)
    w_N = DequantizeLinear (weight_N, scale_N, none)
    m_N = MatMul (x_N, w_N)
    p_N = Add (m_N, bias_N)"""
FLOAT = """
    r_N = Reshape (p_N, heads)
    N = Transpose <perm = PERM> (r_N)"""
INTEGERS = """
    c_N = QuantizeLinear (p_N, step, ZERO)
    r_N = Reshape (c_N, heads)
    t_N = Transpose <perm = PERM> (r_N)
    N = DequantizeLinear (t_N, step, ZERO)"""
CONSTANTS = {
    "step": np.array(0.02, np.float32),
    "middle": np.array(128, np.uint8),
    "none": np.array(0, np.int8),
    "share": np.array(1 / 255, np.float32),
    "least": np.array(0, np.uint8),
    "heads": np.array([0, 0, HEADS, SIZE]),
    "joined": np.array([0, 0, WIDTH]),
}
PARTS = {"q": ("[0, 2, 1, 3]", "middle"), "k": ("[0, 2, 3, 1]", "none"), "v": ("[0, 2, 1, 3]", "none")}


def attention(queries_and_keys: bool, values: bool) -> ir.Model:
    """The program, either product in integers or in float."""
    lines, generator = "", np.random.default_rng(0)
    for name, (perm, zero) in PARTS.items():
        inside = values if name == "v" else queries_and_keys
        text = PROJECTION + (INTEGERS if inside else FLOAT)
        for word, meant in (("_N", f"_{name}"), ("N =", f"{name} ="), ("PERM", perm), ("ZERO", zero)):
            text = text.replace(word, meant)
        lines += text
    soft = "c_a = QuantizeLinear (soft, share, least)\n shares = DequantizeLinear (c_a, share, least)"
    text = TEXT.replace("PROJECTIONS", lines).replace("SHARES", soft if values else "shares = Identity (soft)")
    proto, constants = onnx.parser.parse_model(text), dict(CONSTANTS)
    for name in PARTS:
        constants[f"weight_{name}"] = generator.integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8)
        constants[f"scale_{name}"] = np.array(0.0005, np.float32)
        constants[f"bias_{name}"] = generator.normal(size=WIDTH).astype(np.float32)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    model: ir.Model = ir.from_proto(proto)
    return model


def measure(tokens: int, seconds: float) -> list[Row]:
    """A row for each choice of products in integers."""
    generator = np.random.default_rng(1)
    batch = {
        "x": generator.normal(size=(1, tokens, WIDTH)).astype(np.float32),
        "mask": np.zeros((1, 1, tokens, tokens), np.float32),
    }
    choices = {"none": (False, False), "scores": (True, False), "values": (False, True), "both": (True, True)}
    programs = {name: attention(*choice) for name, choice in choices.items()}
    fused = attention(False, False)
    ir.passes.Sequential(common.IdentityEliminationPass(), common.ShapeInferencePass())(fused)
    fuse_attention(fused)
    programs["one operator"] = fused
    calls = {
        name: partial(ENGINES["onnxruntime"].compile(program, threads=1), batch) for name, program in programs.items()
    }
    times = alternating(calls, seconds=seconds, of=min)
    return [
        {"tokens": tokens, "in integers": name, "ms": ms, "of float": ms / times["none"]} for name, ms in times.items()
    ]


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments(__doc__ or "", ())
    parser.add_argument("--seconds", type=float, default=4.0, help="to time each length for")
    given = parser.parse_args(arguments_given)
    rows = [row for tokens in (16, 128, 512) for row in measure(tokens, given.seconds)]
    show(
        "Attention by which of its products are in integers, and in one operator",
        rows,
        given.json,
        {"ms": 3, "of float": 2},
    )


if __name__ == "__main__":
    main()
