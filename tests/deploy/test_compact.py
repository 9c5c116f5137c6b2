"""A smaller file that computes the same bits: what may go goes, and the user's names stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.deploy.compact import compact
from lowbit.deploy.export import export
from lowbit.deploy.write import ActivationTensor, write
from lowbit.engines.compile import ENGINES, serialize
from lowbit.network.calibrate import observe, solve_weights
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.numerics import Int
from lowbit.repair.ranges import choose_ranges

IMAGENET = "scale=255 mean=.485,.456,.406 std=.229,.224,.225 layout=NCHW"


def written() -> tuple[ir.Model, ir.Model]:
    """The toy as the writer leaves it, and the program that it was written from."""
    model, batches = convolutions(), [{"x": images(32)}]
    simulation = Network(model.program, place(model.program, lb.Recipe(lb.RECIPES["int8"]().rules)))
    observe(simulation, batches)
    solve_weights(simulation)
    choose_ranges(simulation, batches)
    return export(simulation), simulation.program


def quantized_input(scale: float = 0.1) -> ActivationTensor:
    return ActivationTensor("x", np.float32(scale), np.array(10), Int(8, signed=False))


def names(program: ir.Model) -> set[str]:
    values = {str(v.name) for node in program.graph for v in node.outputs}
    return values | set(map(str, program.graph.initializers)) | {str(v.name) for v in program.graph.inputs}


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_are_the_same_bit_for_bit(engine):
    pytest.importorskip(engine)
    before, original = written()
    small = compact(before, original)
    runs = [ENGINES[engine].compile(program, threads=1) for program in (before, small)]
    a, b = (run({"x": images(16, seed=3)})["logits"] for run in runs)
    assert np.array_equal(a, b)
    assert len(serialize(small)) < 0.6 * len(serialize(before))  # measured 0.55


def test_onnx_accepts_what_is_left():
    message = onnx.ModelProto.FromString(serialize(compact(*written())))
    onnx.checker.check_model(message, full_check=True)
    assert not message.graph.value_info


def test_the_users_names_stay_and_lowbits_have_two_letters_at_most():
    before, original = written()
    small = compact(before, original)
    assert [v.name for v in (*small.graph.inputs, *small.graph.outputs)] == ["x", "logits"]
    users = {str(node.name) for node in original.graph}
    assert {node.name for node in small.graph} - {None} == users & {node.name for node in before.graph}
    assert {name for name in names(small) if len(name) > 2} <= names(original)
    assert small.graph.initializers["conv1.weight"].const_value.dtype is ir.DataType.INT8
    assert small.graph.initializers["conv1.bias"].const_value.dtype is ir.DataType.INT32


def test_a_users_value_is_what_its_readers_see():
    """b is the Relu behind conv1: in the file it is the dequantized value, and compare holds that against float's b."""
    small = compact(*written())
    value = next(v for node in small.graph for v in node.outputs if v.name == "b")
    assert value.producer().op_type == "DequantizeLinear"
    assert [use.node.op_type for use in value.uses()] == ["MaxPool"]
    model = convolutions()
    found = lb.compare(model, lb.quantize(model, images()), images(8), latency=False)
    assert {"a", "b", "c", "d", "e", "f", "g"} <= {layer.value for layer in found.layers}


def test_a_name_that_lowbit_would_give_may_be_the_users():
    """Values `a`, `b` and a weight `w` beside another one, `w_codes`: no two things get one name."""
    model = network(
        "m (float[N,3] x) => (float[N,2] y) { a = MatMul (x, w) b = Add (a, w_codes) y = Relu (b) }",
        w=np.eye(3)[:, :2],
        w_codes=[1.0, 2.0],
    )
    before = write(model.program, [quantized_input()])
    small = compact(before, model.program)
    assert {"a", "b", "w", "w_codes"} <= names(small)
    x = {"x": np.eye(3, dtype=np.float32)}
    assert np.array_equal(lb.load(before).run(x)["y"], lb.load(small).run(x)["y"])


def test_equal_constants_are_stored_once():
    model = network("m (float[N,3] x) => (float[N,3] y) { h = Relu (x) y = Neg (h) }")
    tensors = [quantized_input(), ActivationTensor("h", np.float32(0.1), np.array(10), Int(8, signed=False))]
    before = write(model.program, tensors)
    assert len(before.graph.initializers) == 4
    assert len(compact(before, model.program).graph.initializers) == 2  # one scale, one zero point


def test_the_scales_of_a_bias_are_computed_from_those_of_its_layer():
    """Of conv2's 16 biases no scale is stored; fc's 4 would take less than the node that computes them."""
    small = compact(*written())
    decoders = {str(n.inputs[0].name): n for n in small.graph if n.op_type == "DequantizeLinear"}
    assert decoders["conv2.bias"].inputs[1].producer().op_type == "Mul"
    assert decoders["fc.bias"].inputs[1].is_initializer()


def test_weights_stay_in_their_order_so_that_a_file_has_the_same_bytes_again():
    before, original = written()
    small = compact(before, original).graph.initializers
    assert [name for name in small if name in original.graph.initializers] == list(original.graph.initializers)


def test_attributes_that_say_the_default_are_left_out():
    model = network(
        """m (float[N,2,5,5] x) => (float[N,1,3,3] y) {
            y = Conv <auto_pad = "NOTSET", group = 1, strides = [1,1], dilations = [1,1], pads = [0,0,0,0],
                      kernel_shape = [3,3]> (x, w)
        }""",
        w=np.ones((1, 2, 3, 3)),
    )
    (node,) = compact(model.program, model.program).graph
    assert set(node.attributes) == {"kernel_shape"}
    (node,) = model.program.graph
    assert len(node.attributes) == 6


def test_a_branch_reads_the_value_that_was_renamed():
    branch = "{ b_%s = %s (h) }"
    text = f"""m (float[N,3] x, bool c) => (float[N,3] y) {{
        h = Relu (x)
        z = If (c) <then_branch = yes () => (float[N,3] b_t) {branch % ("t", "Neg")},
                    else_branch = no () => (float[N,3] b_e) {branch % ("e", "Abs")}>
        y = Relu (z)
    }}"""
    model = network(text)
    before = write(model.program, [ActivationTensor("h", np.float32(0.1), np.array(0), Int(8, signed=False))])
    small = compact(before, model.program)
    for choice in (True, False):
        batch = {"x": np.array([[-1.0, 0.33, 2.0]], np.float32), "c": np.array(choice)}
        assert np.array_equal(lb.load(small).run(batch)["y"], lb.load(before).run(batch)["y"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "how", "bar"),
    [
        ("speech/kws-dscnn", "speech/kws-features.npz", None, 36_000),  # measured 32,568
        ("cifar10-resnet20", "cifar10-train-0.npz", IMAGENET, 301_543),  # 0.275 of 1,096,522; measured 287,399
    ],
)
def test_real_networks_are_as_small_as_they_should_be(data, tmp_path, name, source, how, bar):
    model = lb.load(data / f"{name}.onnx")
    quantized = lb.quantize(model, lb.Data.of(data / source, model.inputs, preprocess=how, limit=64))
    assert quantized.save(tmp_path / "small.onnx") < bar
    assert "lowbit.ledger" in lb.load(tmp_path / "small.onnx").metadata
