"""What is public: `lowbit.__all__`, no more and no less; each name documented, each importable by itself."""

import ast
import inspect
from pathlib import Path

import pytest

import lowbit as lb

PUBLIC = [name for name in lb.__all__ if name != "__version__"]
FLOWS = {
    *("load", "quantize", "compare", "evaluate", "diagnose", "search", "sensitivity", "mixed_precision"),
    *("prepare", "convert", "train"),
    *("compress", "compress_tensors", "shrink", "pack", "unpack", "inspect", "read_tensor"),
    *("quantize_tensor", "error", "simulation", "parse_range", "stochastic"),
}
VALUES = {
    *("Model", "Data", "Preprocessing", "Comparison", "Diagnosis", "Search", "Pruning", "LowbitError"),
    *("Sensitivity", "Prepared", "Schedule"),
    *("Recipe", "Rule", "TensorSpec", "FLOAT", "Target", "Format", "Int", "QuantTensor"),
    *("Float", "Codebook", "KMeans", "Bases", "Piecewise", "Pow2", "SignedPow2", "AdditivePow2", "parse_format"),
    *("E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "E8M0"),
    *("MinMax", "MovingAverage", "Percentile", "MSE", "OCTAV", "ACIQ", "Entropy", "MeanStd", "Auto", "Histogram"),
    *("TENSOR", "ELEMENT", "channel", "group", "tile", "FORMATS", "RANGES", "RECIPES", "TARGETS"),
}


def test_these_names_are_public():
    assert set(PUBLIC) == FLOWS | VALUES  # a new one is added here on purpose, and to the docs


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_found(name):
    assert getattr(lb, name) is not None
    assert name in dir(lb)


@pytest.mark.parametrize("name", [n for n in PUBLIC if callable(getattr(lb, n))])
def test_every_public_function_and_class_says_what_it_is(name):
    text = inspect.getdoc(getattr(lb, name))
    assert text
    assert text != inspect.getdoc(object)
    assert not text.startswith(f"{name}(")  # the signature that a dataclass without a docstring gets


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_every_argument_of_a_public_function_has_a_type(name):
    signature = inspect.signature(getattr(lb, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_the_type_checker_sees_the_same_names():
    tree = ast.parse(Path(lb.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname for node in ast.walk(blocks[0]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(PUBLIC)


def test_an_unknown_name_is_answered_with_those_that_there_are():
    with pytest.raises(AttributeError, match=r"no attribute 'quantise'.*quantize"):
        lb.quantise  # noqa: B018


def test_values_can_be_pasted_back_from_their_repr():
    import lowbit.numerics as numerics
    import lowbit.ranges as ranges

    names = {**vars(numerics), **vars(ranges), **{name: getattr(lb, name) for name in PUBLIC}}
    for value in (*lb.FORMATS.values(), lb.Rule("conv*", lb.FLOAT), lb.RECIPES["int8"]()):
        assert eval(repr(value), names) == value
