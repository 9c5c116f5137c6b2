"""Five networks of the families that users bring, small enough for a hundred quantizations a minute.

Between them they hold something for every pass to do: spelled-out operators, batch norms, pads, masks, computed shapes.
"""

from collections.abc import Callable

import numpy as np
from toy_networks import network

from lowbit.engines.compile import Batch
from lowbit.model import Model

_rng = np.random.default_rng


def _norm(name: str, channels: int, seed: int) -> dict[str, np.ndarray]:
    """Scale, offset, mean and variance of a BatchNormalization."""
    r = _rng(seed)
    return {
        f"{name}s": r.uniform(0.5, 1.5, channels),
        f"{name}b": r.normal(size=channels) / 4,
        f"{name}m": r.normal(size=channels) / 4,
        f"{name}v": r.uniform(0.5, 1.5, channels),
    }


def mobile() -> tuple[Model, Batch]:
    """Pad, convolution, batch norm, ReLU6; depthwise; pointwise; classes."""
    r = _rng(0)
    model = network(
        """
        mobile (float[N,3,12,12] x) => (float[N,5] y) {
            p = Pad (x, pads, zero)
            c1 = Conv <strides = [2,2]> (p, w1)
            n1 = BatchNormalization (c1, as, ab, am, av)
            r1 = Clip (n1, zero, six)
            c2 = Conv <group = 8, pads = [1,1,1,1]> (r1, w2)
            n2 = BatchNormalization (c2, bs, bb, bm, bv)
            r2 = Clip (n2, zero, six)
            c3 = Conv (r2, w3)
            n3 = BatchNormalization (c3, cs, cb, cm, cv)
            r3 = Relu (n3)
            c4 = Conv (r3, w4, b4)
            h = Mul (c4, half)
            g = GlobalAveragePool (h)
            f = Flatten (g)
            y = Gemm <transB = 1> (f, w5, b5)
        }""",
        pads=np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        zero=np.float32(0),
        six=np.float32(6),
        half=np.float32(0.5),
        w1=r.normal(size=(8, 3, 3, 3)) / 3,
        w2=r.normal(size=(8, 1, 3, 3)),
        w3=r.normal(size=(32, 8, 1, 1)) * np.geomspace(0.1, 1, 32).reshape(-1, 1, 1, 1),
        w4=r.normal(size=(16, 32, 1, 1)) / 4,
        b4=r.normal(size=16) / 4,
        w5=r.normal(size=(5, 16)),
        b5=r.normal(size=5),
        **_norm("a", 8, 1),
        **_norm("b", 8, 2),
        **_norm("c", 32, 3),
    )
    return model, {"x": _rng(9).normal(size=(48, 3, 12, 12)).astype(np.float32)}


def residual() -> tuple[Model, Batch]:
    """Two convolutions and a sum, twice the same pooling, a shape that is computed, a product of matrices."""
    r = _rng(1)
    model = network(
        """
        residual (float[N,4,8,8] x) => (float[N,6] y) {
            a = Conv <pads = [1,1,1,1]> (x, w1)
            n = BatchNormalization (a, as, ab, am, av)
            r = Relu (n)
            b = Conv <pads = [1,1,1,1]> (r, w2, b2)
            s = Add (b, x)
            t = Relu (s)
            p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
            q = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
            u = Concat <axis = 1> (p, q)
            v = ReduceMean <keepdims = 1> (u, pixels)
            shape = Shape (v)
            n0 = Gather (shape, first)
            row = Unsqueeze (n0, first)
            target = Concat <axis = 0> (row, eight)
            f = Reshape (v, target)
            m = MatMul (f, w3)
            y = Add (m, b3)
        }""",
        w1=r.normal(size=(16, 4, 3, 3)) / 4,
        w2=r.normal(size=(4, 16, 3, 3)) / 8,
        b2=r.normal(size=4) / 4,
        pixels=np.array([2, 3]),
        first=np.array(0),
        eight=np.array([8]),
        w3=r.normal(size=(8, 6)),
        b3=r.normal(size=6),
        **_norm("a", 16, 4),
    )
    return model, {"x": _rng(10).normal(size=(48, 4, 8, 8)).astype(np.float32)}


_LAYERNORM = """
            {0}m = ReduceMean <keepdims = 1> ({1}, last)
            {0}c = Sub ({1}, {0}m)
            {0}p = Pow ({0}c, two)
            {0}v = ReduceMean <keepdims = 1> ({0}p, last)
            {0}e = Add ({0}v, eps)
            {0}d = Sqrt ({0}e)
            {0}q = Div ({0}c, {0}d)
            {0}g = Mul ({0}q, {0}gain)
            {0} = Add ({0}g, {0}bias)"""
_HEADS = """
            {0}l = MatMul (ln, w{0})
            {0}a = Add ({0}l, b{0})
            {0}r = Reshape ({0}a, {0}t)
            {0}h = Transpose <perm = [0, 2, 1, 3]> ({0}r)"""
_TARGET = """
            {0}s = Shape (x)
            {0}n = Gather ({0}s, first)
            {0}t = Concat <axis = 0> ({0}n, {1})"""


_BLOCK = (
    "block (float[N,8,32] x, int64[N,8] mask) => (float[N,4] y) {"
    + _LAYERNORM.format("ln", "x")
    + "".join(_TARGET.format(name, "heads") for name in "qkv")
    + "".join(_HEADS.format(name) for name in "qkv")
    + """
        keys = Transpose <perm = [0, 1, 3, 2]> (kh)
        scaled = Mul (qh, quarter)
        scores = MatMul (scaled, keys)
        absent = Equal (mask, nought)
        lowest = Where (absent, infinity, zero)
        wide = Unsqueeze (lowest, axes)
        masked = Add (scores, wide)
        soft = Softmax <axis = -1> (masked)
        bad = IsNaN (soft)
        prob = Where (bad, zero, soft)
        o = MatMul (prob, vh)
        ot = Transpose <perm = [0, 2, 1, 3]> (o)"""
    + _TARGET.format("j", "width")
    + """
        joined = Reshape (ot, jt)
        out = MatMul (joined, wo)
        outb = Add (out, bo)
        mid = Add (outb, x)"""
    + _LAYERNORM.format("lm", "mid")
    + """
        up = MatMul (lm, wu)
        upb = Add (up, bu)
        er = Div (upb, root)
        ef = Erf (er)
        e1 = Add (ef, one)
        em = Mul (upb, e1)
        gelu = Mul (em, half)
        down = MatMul (gelu, wd)
        downb = Add (down, bd)
        end = Add (downb, mid)
        pooled = ReduceMean <keepdims = 0> (end, tokens)
        cl = MatMul (pooled, wc)
        y = Add (cl, bc)
    }"""
)


def transformer() -> tuple[Model, Batch]:
    """One block as exporters spell it out: two heads over eight tokens, a mask of −∞ with its guard, GELU from Erf."""
    r = _rng(2)
    square = {f"w{n}": r.normal(size=(32, 32)) / 6 for n in "qkvo"} | {f"b{n}": r.normal(size=32) / 8 for n in "qkvo"}
    model = network(
        _BLOCK,
        **square,
        wu=r.normal(size=(32, 64)) / 6,
        bu=r.normal(size=64) / 8,
        wd=r.normal(size=(64, 32)) / 8,
        bd=r.normal(size=32) / 8,
        wc=r.normal(size=(32, 4)) / 3,
        bc=r.normal(size=4),
        last=np.array([-1]),
        tokens=np.array([1]),
        axes=np.array([1, 2]),
        first=np.array([0]),
        heads=np.array([8, 2, 16]),
        width=np.array([8, 32]),
        nought=np.array(0),
        two=np.float32(2),
        eps=np.float32(1e-5),
        quarter=np.float32(0.25),
        infinity=np.float32(-np.inf),
        zero=np.float32(0),
        one=np.float32(1),
        half=np.float32(0.5),
        root=np.float32(np.sqrt(2)),
        lngain=r.uniform(0.5, 2, 32),
        lnbias=r.normal(size=32) / 8,
        lmgain=r.uniform(0.5, 2, 32),
        lmbias=r.normal(size=32) / 8,
    )
    seen = _rng(11)
    mask = (np.arange(8) < seen.integers(3, 9, size=(48, 1))).astype(np.int64)
    return model, {"x": seen.normal(size=(48, 8, 32)).astype(np.float32), "mask": mask}


def recurrent() -> tuple[Model, Batch]:
    """An LSTM over ten steps in both directions, its mean over time, a product of matrices."""
    r = _rng(3)
    model = network(
        """
        recurrent (float[N,10,12] x) => (float[N,3] y) {
            t = Transpose <perm = [1, 0, 2]> (x)
            h, hn, cn = LSTM <hidden_size = 16, direction = "bidirectional"> (t, w, r, b)
            u = Transpose <perm = [2, 0, 1, 3]> (h)
            shape = Shape (x)
            n0 = Gather (shape, first)
            target = Concat <axis = 0> (n0, rest)
            j = Reshape (u, target)
            m = ReduceMean <keepdims = 0> (j, time)
            l = MatMul (m, wc)
            y = Add (l, bc)
        }""",
        w=r.normal(size=(2, 64, 12)) / 3,
        r=r.normal(size=(2, 64, 16)) / 4,
        b=r.normal(size=(2, 128)) / 8,
        first=np.array([0]),
        rest=np.array([10, 32]),
        time=np.array([1]),
        wc=r.normal(size=(32, 3)),
        bc=r.normal(size=3),
    )
    return model, {"x": _rng(12).normal(size=(48, 10, 12)).astype(np.float32)}


def focus() -> tuple[Model, Batch]:
    """Every second row and column side by side as channels, in front of a convolution; classes."""
    r = _rng(4)
    model = network(
        """
        focus (float[N,1,8,8] x) => (float[N,3] y) {
            even = Slice (x, at0, end, rows, step)
            odd = Slice (x, at1, end, rows, step)
            a = Slice (even, at0, end, columns, step)
            b = Slice (odd, at0, end, columns, step)
            c = Slice (even, at1, end, columns, step)
            d = Slice (odd, at1, end, columns, step)
            pixels = Concat <axis = 1> (a, b, c, d)
            h = Conv <pads = [1,1,1,1]> (pixels, w1)
            q = Relu (h)
            g = GlobalAveragePool (q)
            f = Flatten (g)
            y = Gemm (f, w2, b2)
        }""",
        at0=np.array([0]),
        at1=np.array([1]),
        end=np.array([2**31 - 1]),
        rows=np.array([2]),
        columns=np.array([3]),
        step=np.array([2]),
        w1=r.normal(size=(8, 4, 3, 3)) / 4,
        w2=r.normal(size=(8, 3)),
        b2=r.normal(size=3),
    )
    return model, {"x": _rng(13).normal(size=(48, 1, 8, 8)).astype(np.float32)}


NETWORKS: dict[str, Callable[[], tuple[Model, Batch]]] = {
    make.__name__: make for make in (mobile, residual, transformer, recurrent, focus)
}
