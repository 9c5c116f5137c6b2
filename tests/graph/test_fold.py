"""Folding: weights that a graph reorders are one constant; the logging of what it calls is held back and given back."""

import logging

import numpy as np
import pytest
from toy_networks import network

from lowbit.graph.fold import quiet


def test_logging_is_on_again_when_the_last_thread_has_left():
    """Two threads, one after the other in and in the same order out: the second found logging off, and left it so."""
    first, second = quiet(), quiet()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logging.root.manager, "disable", 0)
        first.__enter__()
        second.__enter__()
        first.__exit__()
        assert not logging.getLogger("onnx_ir").isEnabledFor(logging.ERROR)
        second.__exit__()
        assert logging.root.manager.disable == 0


def test_what_a_user_turned_off_stays_off():
    logging.disable(logging.CRITICAL)
    try:
        with quiet():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


GATES = """
    m (float[N,350] x) => (float[N,400] y, float[N,400] z) {
        i = Slice (l__weight, zero, one, zero)
        o = Slice (l__weight, one, two, zero)
        w = Concat <axis = 0> (o, i)
        t = Transpose (w)
        y = MatMul (x, t)
        z = %s
    }"""


def gates(z: str, weight: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The large constants of the network, once it is loaded; its outputs are as they were."""
    model = network(GATES % z, l__weight=weight, zero=np.array([0]), one=np.array([200]), two=np.array([400]))
    x = np.random.default_rng(1).normal(size=(2, 350)).astype(np.float32)
    expected = x @ np.concatenate([weight[200:], weight[:200]]).T
    assert np.allclose(model.run({"x": x})["y"], expected, atol=1e-4)
    stored = model.program.graph.initializers.items()
    return {str(n): tuple(v.const_value.shape) for n, v in stored if v.const_value.size > 100}


def test_gates_that_a_graph_reorders_are_one_weight_of_any_size_under_its_own_name():
    weight = np.random.default_rng(0).normal(size=(400, 350))  # a gate has 70,000 values: more than is folded otherwise
    assert gates("Relu (y)", weight) == {"l.weight": (350, 400)}


def test_a_weight_that_is_also_read_as_it_is_is_not_stored_twice():
    weight = np.random.default_rng(0).normal(size=(400, 350))
    assert gates("Gemm <transB = 1> (x, l__weight)", weight) == {"l.weight": (400, 350)}
