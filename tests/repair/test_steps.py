"""Steps that must prove themselves: what is kept, what is undone, and what each does to the simulated outputs."""

from dataclasses import replace

import numpy as np
import torch
from test_output_errors import calibrated, in_batches
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.deploy.export import export
from lowbit.model import Model
from lowbit.network.calibrate import both_walks, forward
from lowbit.network.in_step import in_step
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.network.widen_scales import LARGEST_BIAS, widen_scales_for_biases
from lowbit.recipe import IMPROVE, Recipe, Rule, TensorSpec
from lowbit.repair.correct_bias import correct_bias
from lowbit.repair.prove import Calibration, float_outputs, output_error, prove
from lowbit.repair.reestimate_batchnorm import reestimate_batchnorm
from lowbit.repair.smooth import smooth_activations
from lowbit.repair.steps import STEPS


def with_bias_of_three_axes() -> Model:
    rng = np.random.default_rng(0)
    return network(
        "b (float[N,4,16] x) => (float[N,4,8] logits) { p = MatMul (x, w)  logits = Add (p, b) }",
        w=rng.normal(size=(16, 8)) / 4,
        b=rng.normal(size=(1, 1, 8)),
    )


def measured(simulation: Network, batches: list) -> Calibration:
    """A calibration of which all samples are these."""
    exact = float_outputs(simulation, batches)
    error = output_error(simulation, batches, exact)
    return Calibration(batches, batches, batches, exact, lambda: batches, error=error)


def test_a_step_that_makes_it_worse_is_undone_also_for_a_bias_of_three_axes():
    model = with_bias_of_three_axes()
    batches = [{"x": np.random.default_rng(1).normal(size=(16, 4, 16)).astype(np.float32)}]
    simulation = calibrated(model, batches)
    calibration, bias = measured(simulation, batches), simulation.parameter("b").detach().clone()
    before = calibration.error

    def worse(changed: Network, _: Calibration) -> list[str]:
        with torch.no_grad():
            changed.parameter("b").add_(1.0)
        return ["added one"]

    assert prove(simulation, worse, calibration)[0].startswith("undone: added one")
    assert torch.equal(simulation.parameter("b"), bias)
    assert calibration.error == before == output_error(simulation, batches, calibration.exact)


def test_after_a_step_that_edits_biases_the_exact_walk_is_still_the_float_network():
    model, batches = convolutions(), in_batches(images(32))
    simulation = calibrated(model, batches)
    simulation.keep_before_steps()
    calibration = measured(simulation, batches)
    assert correct_bias(simulation, calibration) == ["corrected the biases of 3 layers"]
    with torch.no_grad(), simulation.mode("quantize"):
        exact, _ = both_walks(simulation, batches)
        *_, output = in_step(*exact)
        found = [walk.env[output] for walk in exact]
    for walked, wanted in zip(found, calibration.exact, strict=True):
        assert all(torch.equal(walked[name], y) for name, y in wanted.items())


def test_codes_ranges_and_placement_are_undone_too():
    model, batches = with_bias_of_three_axes(), in_batches(np.random.default_rng(1).normal(size=(16, 4, 16)))
    batches = [{"x": batch["x"].astype(np.float32)} for batch in batches]
    simulation = calibrated(model, batches)
    calibration, quantizer = measured(simulation, batches), simulation.quantizers["x"]
    before, placement, codes = calibration.error, simulation.placement, simulation.quantizers["w"].stored
    scale, zero = quantizer.scale, quantizer.zero

    def ruins(changed: Network, _: Calibration) -> list[str]:
        changed.quantizers["w"].store(replace(codes, codes=torch.zeros_like(codes.codes)))
        quantizer.set_parameters(scale * 8, zero)
        changed.place_again(place(changed.program, placement.recipe.keep_float("matmul_0")))
        with torch.no_grad():
            changed.parameter("b").add_(1.0)
        return ["ruined it"]

    assert prove(simulation, ruins, calibration)[0].startswith("undone: ruined it")
    assert simulation.placement is placement
    assert simulation.quantizers["w"].stored is codes
    assert simulation.quantizers["x"].scale is scale
    assert output_error(simulation, batches, calibration.exact) == before


def test_the_file_holds_what_the_network_holds_and_the_program_is_left_alone():
    model = with_bias_of_three_axes()
    batches = [{"x": np.random.default_rng(1).normal(size=(16, 4, 16)).astype(np.float32)}]
    simulation = calibrated(model, batches)
    bias = simulation.parameter("b").detach().clone()
    with torch.no_grad():
        simulation.parameter("b").add_(1.0)
    held = {str(v.name): v.const_value.numpy() for v in export(simulation).graph.initializers.values()}
    assert np.array_equal(held["b"], (bias.numpy() + 1).reshape(-1))  # as a row: the kernel of the product adds it
    assert np.array_equal(simulation.program.graph.initializers["b"].const_value.numpy(), bias.numpy())


def test_a_step_that_helps_is_kept():
    model = with_bias_of_three_axes()
    batches = [{"x": np.random.default_rng(1).normal(size=(16, 4, 16)).astype(np.float32)}]
    simulation = calibrated(model, batches)
    calibration = measured(simulation, batches)
    with torch.no_grad():
        simulation.parameter("b").add_(1.0)
    calibration.error = output_error(simulation, batches, calibration.exact)

    def mend(changed: Network, _: Calibration) -> list[str]:
        with torch.no_grad():
            changed.parameter("b").sub_(1.0)
        return ["took it away"]

    assert prove(simulation, mend, calibration)[-1].startswith("kept")
    assert calibration.error == output_error(simulation, batches, calibration.exact) < 0.001


def test_the_words_of_a_recipe_are_the_steps_that_there_are():
    assert set(IMPROVE) == {"smooth", "normalize", *STEPS}


def test_bias_correction_gives_each_channel_back_its_mean():
    """Weights of 0.504 steps a channel round up by 0.496 steps: with inputs that are all positive the outputs shift."""
    rng = np.random.default_rng(0)
    step = 1 / 127
    weight = np.full((16, 8), 10.504 * step)
    weight[0] = 1.0  # the scale of each channel is 1/127
    model = network("c (float[N,16] x) => (float[N,8] logits) { logits = Gemm (x, w, b) }", w=weight, b=np.zeros(8))
    batches = in_batches(rng.uniform(0, 1, size=(64, 16)).astype(np.float32))
    simulation = calibrated(model, batches)
    calibration = measured(simulation, batches)

    def shift() -> float:
        with simulation.mode("quantize"):
            rough = [forward(simulation, batch)["logits"] for batch in batches]
        return float((torch.cat([e["logits"] for e in calibration.exact]) - torch.cat(rough)).mean().abs())

    assert shift() > 0.02  # 15 weights, each wrong by 0.496/127, times a mean input of 0.5: 0.029
    assert correct_bias(simulation, calibration) == ["corrected the biases of 1 layers"]
    assert shift() < 0.005


def test_estimating_batch_norms_anew_gives_each_channel_back_its_mean_and_deviation():
    model, batches = convolutions(), in_batches(images(32))
    recipe = lb.Recipe((lb.Rule("*", "int3 channel:0", "uint8"),))
    simulation = calibrated(model, batches, recipe)
    codes = {name: torch.as_tensor(q.stored.codes).clone() for name, (_, q) in simulation.constants().items()}

    def deviations() -> torch.Tensor:
        """Of the outputs, the quantized network's in parts of the float network's."""
        with simulation.mode("quantize"):
            rough = torch.cat([forward(simulation, batch)["logits"] for batch in batches])
        return rough.std(0) / torch.cat([e["logits"] for e in calibration.exact]).std(0)

    calibration = measured(simulation, batches)
    before = deviations()
    assert reestimate_batchnorm(simulation, calibration) == ["estimated the batch norms of 3 layers anew"]
    after = deviations()
    assert (before - 1).abs().max() > 0.05
    assert (after - 1).abs().max() < 0.01
    assert all(torch.equal(torch.as_tensor(q.stored.codes), codes[n]) for n, (_, q) in simulation.constants().items())


def test_a_bias_that_would_need_45_bits_gets_a_wider_scale():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2, 3, 3))
    weight[2] *= 1e-13
    model = network(
        "d (float[N,2,6,6] x) => (float[N,4,4,4] y) { y = Conv (x, w, b) }", w=weight, b=np.array([0.5, -0.5, 3.0, 0])
    )
    batches = [{"x": rng.normal(size=(32, 2, 6, 6)).astype(np.float32)}]
    simulation = calibrated(model, batches)
    before = simulation.quantizers["w"].scale.reshape(-1).clone()
    assert len(widen_scales_for_biases(simulation)) == 1
    after = simulation.quantizers["w"].scale.reshape(-1)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert 3.0 / float(after[2] * simulation.quantizers["x"].scale) <= 1.001 * LARGEST_BIAS


def test_a_wider_scale_leaves_the_codes_of_other_channels_to_their_solver():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2, 3, 3))
    weight[2] *= 1e-13
    model = network("d (float[N,2,6,6] x) => (float[N,4,4,4] y) { y = Conv (x, w, b) }", w=weight, b=np.full(4, 3.0))
    simulation = calibrated(model, [{"x": rng.normal(size=(32, 2, 6, 6)).astype(np.float32)}])
    quantizer = simulation.quantizers["w"]
    solved = torch.zeros_like(quantizer.stored.codes)  # no rounding to nearest gives zeros
    quantizer.store(replace(quantizer.stored, codes=solved))
    assert len(widen_scales_for_biases(simulation)) == 1
    assert torch.equal(quantizer.stored.codes, solved)


def test_layers_behind_a_bias_of_45_bits_see_it_whole_while_they_are_solved():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2, 3, 3))
    weight[2] *= 1e-13
    model = network(
        "d (float[N,2,6,6] x) => (float[N,4,2,2] z) { y = Conv (x, w, b) r = Relu (y) z = Conv (r, v, c) }",
        w=weight,
        b=np.array([0.5, -0.5, 3.0, 0]),
        v=rng.normal(size=(4, 4, 3, 3)),
        c=np.zeros(4),
    )
    x = rng.normal(size=(64, 2, 6, 6)).astype(np.float32)
    gptq = Recipe((Rule("*", TensorSpec("int4 channel:0", solve="gptq"), TensorSpec("uint8", "minmax")),))
    found = lb.quantize(model, x, gptq).run({"x": x})["z"]
    assert sqnr_db(model.run({"x": x})["z"], found) > 15  # 7.0 dB where the bias is cut to 32 bits until all are solved


def test_smoothing_moves_an_outlier_channel_and_changes_no_output():
    rng = np.random.default_rng(0)
    scale = np.ones(16)
    scale[3] = 100
    model = network(
        """
        s (float[N,16] x) => (float[N,8] y) {
            n = LayerNormalization <axis = -1> (x, g, h)
            y = MatMul (n, w)
        }""",
        g=scale,
        h=np.zeros(16),
        w=rng.normal(size=(16, 8)),
    )
    x = rng.normal(size=(64, 16)).astype(np.float32)
    exact = model.run({"x": x})["y"]
    assert smooth_activations(model.program, in_batches(x)) == ["'n' smoothed into 'matmul_1'"]
    model.changed()
    assert np.allclose(model.run({"x": x})["y"], exact, rtol=1e-4, atol=1e-3)
    reader = next(node for node in model.program.graph if node.op_type == "MatMul")
    made = model.program.clone()
    made.graph.outputs[:] = [next(n for n in made.graph if n.op_type == "LayerNormalization").outputs[0]]
    largest = np.abs(Model(made).run({"x": x})[str(reader.inputs[0].name)]).max(axis=0)
    assert largest.max() / np.median(largest) < 20  # it was 100


def test_a_network_where_nothing_can_be_smoothed_is_not_run(monkeypatch):
    monkeypatch.setattr("lowbit.repair.smooth.ENGINES", {})
    assert smooth_activations(convolutions().program, [{"x": images(4)}]) == []


def test_few_samples_are_shared_out_and_one_sample_is_said_to_judge_itself():
    few = lb.quantize(convolutions(), images(6)).metadata["lowbit.passes"]
    one = lb.quantize(convolutions(), images(1)).metadata["lowbit.passes"]
    assert "there are no others" not in few
    assert "there are no others" in one


def test_batches_follow_from_the_memory_that_is_given(monkeypatch):
    sizes = []
    original = lb.flows.ptq.observe
    monkeypatch.setattr(
        "lowbit.flows.ptq.observe",
        lambda simulation, batches, chosen=None: original(
            simulation, (sizes.append(len(b["x"])) or b for b in batches), chosen
        ),
    )
    model, x = convolutions(), images(64)
    a = lb.quantize(model, x, memory=2**30)
    assert set(sizes) == {16}
    sizes.clear()
    b = lb.quantize(model, x, memory=50_000)
    assert max(sizes) <= 4
    assert sqnr_db(a.run({"x": x})["logits"], b.run({"x": x})["logits"]) > 25


def test_the_steps_are_told_as_they_begin():
    told = []
    lb.quantize(convolutions(), images(32), stage=told.append)
    assert told == ["choosing ranges", "solving weights", "correcting biases", "writing and proving"]
