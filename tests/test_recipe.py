"""A recipe is checked when it is made: what it names exists, what it holds is of the right kind."""

import numpy as np
import pytest
import torch
from toy_networks import convolutions, images, sqnr_db

import lowbit as lb
from lowbit.errors import InputError, LowbitError
from lowbit.graph import PASSES
from lowbit.presets import RECIPES
from lowbit.recipe import IMPROVE

RULE = lb.Rule("*", "int8 channel:0", "uint8")


class Own:
    """A range that no word stands for."""

    def bounds(self, statistics, format):
        return lb.RANGES["minmax"]().bounds(statistics, format)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: lb.Recipe((RULE,), ("fold_batchnrom",)),
            "pass 'fold_batchnrom' does not exist. Did you mean 'fold_batchnorm'",
        ),
        (lambda: lb.Recipe((RULE,), "leave_in_float"), "passes are a tuple of names of passes, not 'leave_in_float'"),
        (lambda: lb.Recipe((RULE,), (len,)), "passes are a tuple of names"),
        (lambda: lb.Recipe(RULE), "rules are a tuple of Rules, not Rule"),
        (lambda: lb.Recipe(("int8",)), r"rules are a tuple of Rules, not \('int8',\)"),
        (lambda: lb.Recipe((RULE,), (), "gpu"), "target 'gpu' does not exist"),
        (lambda: lb.Recipe((RULE,), (), ["openvino"]), r"\['openvino'\] does not exist. Did you mean 'openvino'\?"),
        (lambda: lb.TensorSpec("int8", solve="gptq2"), r"solver 'gptq2' does not exist. Did you mean 'gptq'\?"),
        (
            lambda: lb.TensorSpec("int8", solve=["nearest"]),
            r"solver \['nearest'\] does not exist. Did you mean 'nearest'",
        ),
        (lambda: lb.TensorSpec("int8", range="minmux"), "range 'minmux' is unknown"),
        (lambda: lb.TensorSpec("int8", range=3), "range 3 has no name. Ranges are: minmax"),
        (lambda: lb.TensorSpec("int8", range=Own()), "enter a new class there"),
        (lambda: lb.TensorSpec(8), "format 8 is neither a Format nor its words"),
        (lambda: lb.TensorSpec("int8", dynamic="no"), "dynamic='no' is neither True nor False"),
        (
            lambda: lb.Rule("*", None, ("uint8", "minmax")),
            r"activations=\('uint8', 'minmax'\) is neither .* TensorSpec\('",
        ),
        (lambda: lb.Rule("head", 8), "rule 'head': weights=8 is neither"),
        (lambda: lb.Rule(3), "a rule's layers are a glob over their names, as 'encoder.*', not 3"),
        (lambda: lb.Rule("*", lb.TensorSpec("int8", dynamic=True)), "weights cannot be dynamic"),
        (lambda: lb.Rule("*", None, lb.TensorSpec("uint8", solve="gptq")), "solver 'gptq' serves weights only"),
        (lambda: lb.TensorSpec(None, "minmax"), "a tensor in float has neither range nor solver: 'minmax'"),
        (lambda: lb.TensorSpec("float", dynamic=True), "a tensor in float has neither"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_exist_or_is_of_another_kind_is_refused_at_once(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    "text",
    [
        *("rules = 3", 'rules = ["int8"]', '[rules]\nlayers = "a"', "[[rules]]\nlayers = 3", "[[rules]]\nweights = 3"),
        *('[[rules]]\nweights = ["int8"]', "[[rules]]\nweights = {format = 3}", "passes = 3", 'passes = "smooth"'),
        *('[[rules]]\nactivations = {format = "uint8", dynamic = "yes"}', 'target = ["openvino"]', "passes = [1]"),
        *('[[rules]]\nactivations = {format = "uint8", solve = ["nearest"]}', 'passes = ["smoth"]', 'targets = "a"'),
    ],
)
def test_toml_of_another_shape_is_an_error_of_ours(text):
    with pytest.raises(LowbitError):
        lb.Recipe.from_toml(text)


@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_is_made_of_names_that_exist_and_comes_back_from_toml(name):
    recipe = RECIPES[name]("openvino")
    assert set(recipe.passes) <= {*PASSES, *IMPROVE}
    assert lb.Recipe.from_toml(recipe.to_toml()) == recipe


def test_lists_become_tuples():
    assert lb.Recipe([RULE], ["smooth"]) == lb.Recipe((RULE,), ("smooth",))


DYNAMIC = lb.Recipe((lb.Rule("*", "int8 channel:0", lb.TensorSpec("uint8", "minmax", dynamic=True)),), target="generic")


@pytest.mark.parametrize("word", ["dynamic", "Dynamic"])
def test_part_of_a_presets_name_is_answered_with_the_preset(word):
    with pytest.raises(InputError, match=r"does not exist\. Did you mean 'int8-dynamic'\?$"):
        lb.quantize(convolutions(), None, word)


def test_dynamic_activations_are_simulated_each_input_with_its_own_range():
    """Inputs of a hundredth of the calibrated size: held ranges leave them a handful of steps."""
    model, x = convolutions(), images(8)
    noise = {}
    for name, recipe in (("dynamic", DYNAMIC), ("static", lb.Recipe((RULE,)))):
        simulation = lb.simulation(model, x, recipe)
        small = x / np.float32(100)
        with simulation.mode("quantize"), torch.no_grad():
            (rough,) = simulation.module(torch.from_numpy(small)).values()
        noise[name] = sqnr_db(model.run({"x": small})["logits"], rough.numpy())
    assert noise["dynamic"] > noise["static"] + 10, noise  # measured 50 and 38
