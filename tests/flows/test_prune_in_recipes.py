"""Rules that prune: one file serves quantize, train and compress, and pruned weights stay zero through every solver."""

import numpy as np
import pytest
import torch
from toy_networks import convolutions, images

import lowbit as lb
from lowbit.data import Data
from lowbit.errors import InputError
from lowbit.flows.bench import Bench
from lowbit.flows.masks import Masks
from lowbit.flows.ptq import MEMORY
from lowbit.metadata import from_text


def zeros(model: lb.Model) -> dict[str, float]:
    """Weight → share of its codes that mean 0, in the file."""
    rows = from_text(model.metadata["lowbit.ledger"])
    return {row["tensor"]: row["sparsity"] for row in rows if row["role"] == "weight" and "sparsity" in row}


@pytest.mark.parametrize(
    ("weights", "steps"),
    [
        (lb.TensorSpec("int8 channel:0"), ("correct_bias",)),
        (lb.TensorSpec("int4 channel:0", solve="gptq"), ()),
        pytest.param(lb.TensorSpec("int4 channel:0", solve="adaround"), ("reconstruct",), marks=pytest.mark.slow),
        (lb.TensorSpec("uint4 group:8"), ()),
        (lb.TensorSpec("codebook3:linear", solve="kmeans"), ()),
    ],
    ids=["nearest", "gptq", "adaround", "affine", "kmeans"],
)
def test_pruned_weights_are_zero_in_the_file(weights: lb.TensorSpec, steps: tuple[str, ...]) -> None:
    is_integer = weights.format.grid.__class__.__name__ == "Int" and "group" not in repr(weights.format.block)
    rules = (lb.Rule("*", weights, "uint8" if is_integer else None, prune=lb.Pruning(0.5, "layer")),)
    found = zeros(lb.quantize(convolutions(), images(16), lb.Recipe(rules, ("fold_batchnorm", *steps))))
    assert found
    assert all(0.49 < share < 0.9 for share in found.values()), found


def test_a_format_without_0_cannot_hold_pruned_weights() -> None:
    recipe = lb.Recipe((lb.Rule("*", "binary channel:0", prune=0.5),))
    with pytest.raises(InputError, match="binary channel:0 has no 0, which pruned weights need"):
        lb.quantize(convolutions(), None, recipe)


def test_one_file_serves_quantize_and_compress(tmp_path) -> None:
    file = tmp_path / "sparse.toml"
    file.write_text('[[rules]]\nweights = "int4 channel:0"\nprune = { sparsity = 0.6, scope = "layer" }\n')
    quantized = lb.quantize(convolutions(), None, file)
    compressed = lb.compress(convolutions(), images(16), file, prune_epochs=0, code_epochs=0)
    for model in (quantized, compressed):
        assert all(share == pytest.approx(0.6, abs=0.05) for share in zeros(model).values())
        assert lb.Recipe.from_toml(model.metadata["lowbit.recipe"]).rules[0].prune == lb.Pruning(0.6, "layer")


def test_a_share_overrides_that_of_each_rule_and_leaves_its_pattern() -> None:
    rules = lb.Rule("*", "int8", prune=lb.Pruning(0.5, pattern="2:4")), lb.Rule("head", "int4")
    changed = lb.Recipe(rules).pruned(0.7)
    assert [rule.prune for rule in changed.rules] == [lb.Pruning(0.7, pattern="2:4"), None]
    assert lb.Recipe((rules[1],)).pruned(0.7).rules[-1] == lb.Rule("*", prune=0.7)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: lb.Rule("a", prune="half"), "prune='half' is neither a share of the weights nor a Pruning"),
        (lambda: lb.Rule("a", prune=1.0), "a sparsity is a share from 0 to below 1, not 1.0"),
        (lambda: lb.Recipe.from_toml("[[rules]]\nprune = {share = 0.5}"), "unknown key 'share'"),
        (lambda: lb.Recipe.from_toml("[[rules]]\nprune = {sparsity = 'half'}"), "to below 1, not 'half'"),
        (lambda: lb.Recipe.from_toml("[[rules]]\nprune = {pattern = 3}"), "no pattern '3'"),
        (lambda: lb.Recipe((), ratio=1), "how many times smaller the file should be, above 1; not 1"),
        (lambda: lb.Recipe((), ratio="8"), "above 1; not '8'"),
        (
            lambda: lb.quantize(convolutions(), images(8), lb.Recipe((lb.Rule("*", "int8"),), ratio=8)),
            "lowbit compress",
        ),
        (
            lambda: lb.quantize(
                convolutions(), None, lb.Recipe((lb.Rule("*", "int8", prune=lb.Pruning(0.5, "sensitivity")),))
            ),
            "weights that are pruned once go by their size",
        ),
    ],
    ids=["kind", "share", "key", "word", "pattern", "ratio", "words", "quantize", "sensitivity"],
)
def test_what_pruning_cannot_be_is_told(make, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def test_constants_that_stay_float_have_as_many_bits_of_mantissa_as_asked() -> None:
    recipe = lb.Recipe((lb.Rule("*", "int8 channel:0"),), rest="mantissa:7")
    values = lb.quantize(convolutions(), None, recipe).program.graph.initializers.values()
    floats = [v.const_value.numpy() for v in values if v.const_value.dtype.name == "FLOAT"]
    short = [len(array) for array in floats if not (array.view(np.uint32) & 0xFFFF).any()]  # as bfloat16 has them
    assert sorted(short) == [4, 4, 8, 8, 16]  # biases, and weights too few to store: all but one scale
    assert len(floats) == 6


def test_zeros_are_kept_when_the_network_is_placed_anew() -> None:
    recipe = lb.Recipe((lb.Rule("*", "int8 channel:0", "uint8", prune=lb.Pruning(0.5, "layer")),))
    network = lb.simulation(convolutions(), images(8), recipe)
    again = network.placed(network.placement)
    (_, before), (_, after) = (one.constants()["conv2.weight"] for one in (network, again))
    assert int((~after.mask).sum()) == 16 * 8 * 9 // 2
    assert torch.equal(before.mask, after.mask)
    assert again.constants()["conv1.weight"][1].mask is None  # 216 weights are too few to prune


def test_what_a_search_tries_is_pruned_too() -> None:
    bench = Bench(convolutions(), Data.of(images(16), convolutions().inputs), lb.Recipe(()), "toy", MEMORY, print)
    rule = lb.Rule("*", "int8 channel:0", "uint8", prune=lb.Pruning(0.5, "layer"))
    for recipe, share in ((lb.Recipe((rule,)), 0.5), (lb.Recipe((rule,)).pruned(0.8), 0.8)):
        assert zeros(bench.make(recipe)[0])["conv2.weight"] == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("total", [1, 2, 5, 16, 31, 32, 100])
def test_a_run_of_any_length_reaches_its_sparsity(total: int) -> None:
    """Masks that change every 16 steps were all ones at the end of 16."""
    recipe = lb.Recipe((lb.Rule("*", "int8 channel:0"),))
    network = lb.simulation(convolutions(), None, recipe)
    masks = Masks.of(network, recipe.pruned(lb.Pruning(0.5, "layer")))
    for step in range(total):
        masks.update(step, total)
    shares = [1 - float(weight.mask.float().mean()) for _, weight in network.constants().values()]
    assert shares == pytest.approx([0.5] * len(shares), abs=0.01)
