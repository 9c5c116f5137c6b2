"""Walking node by node: values are seen before they are freed, replaced, and computed once."""

import torch
from toy_networks import convolutions, images

from lowbit.network.build import build
from lowbit.network.calibrate import both_walks, observe, solve_weights
from lowbit.network.in_step import Walk, in_step
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.presets import RECIPES
from lowbit.repair.ranges import choose_ranges


def test_a_walk_computes_what_the_module_computes_and_keeps_only_the_outputs():
    module = build(convolutions().program).eval()
    x = torch.from_numpy(images(3))
    runs = [Walk(module, (part,)) for part in x.split(1)]
    for node in in_step(*runs):
        assert all(node not in run.env for run in runs)  # each is shown before it is computed
    for run, part in zip(runs, x.split(1), strict=True):
        assert torch.equal(run.env[node]["logits"], module(part)["logits"])
        assert set(run.env) == {node}


def test_a_value_that_is_replaced_is_what_the_nodes_behind_read():
    module = build(convolutions().program).eval()
    x = torch.from_numpy(images(2))
    run = Walk(module, (x,))
    for node in in_step(run):
        if node.meta.get("value") == "logits":
            run.env[node] = torch.zeros_like(run.compute(node))
    assert not run.env[node]["logits"].any()


def test_the_exact_run_passes_all_quantizers():
    model, batches = convolutions(), [{"x": images(4)}]
    simulation = Network(model.program, place(model.program, RECIPES["int8"]()))
    observe(simulation, batches)
    solve_weights(simulation)
    choose_ranges(simulation, batches)
    with simulation.mode("quantize"):
        exact, quantized = both_walks(simulation, batches)
        *_, node = in_step(*exact, *quantized)
        ours = simulation.module(torch.from_numpy(images(4)))["logits"]
    assert torch.equal(quantized[0].env[node]["logits"], ours)
    assert torch.equal(exact[0].env[node]["logits"], build(model.program)(torch.from_numpy(images(4)))["logits"])
    assert not torch.equal(exact[0].env[node]["logits"], ours)
