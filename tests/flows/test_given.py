"""Every flow takes a Model, a path, bytes or a torch module, and data in any form; errors come before the work."""

import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import convolutions, images, network, sqnr_db

import lowbit as lb
from lowbit.engines.compile import serialize
from lowbit.errors import InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 20)

    def forward(self, image, scale=None):
        y = self.fc(torch.relu(self.conv(image)).mean((2, 3)))
        return y if scale is None else y * scale


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(8, 32), nn.Linear(8, 32)

    def forward(self, a, b):
        return torch.relu(self.left(a)) + self.right(b)


LABELS = np.arange(64) % 4


@pytest.fixture
def sources(tmp_path):
    model = convolutions()
    model.save(tmp_path / "net.onnx")
    lb.pack(model, tmp_path / "net.lowbit")
    path = tmp_path / "net.onnx"
    return {
        "model": model,
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "packed": path.with_suffix(".lowbit"),
    }


@pytest.mark.parametrize("kind", ["model", "path", "str", "bytes", "packed"])
def test_quantize_simulation_compare_and_compress_take_what_load_takes(sources, kind):
    given = sources[kind]
    quantized = lb.quantize(given, images())
    assert "INT8" in {value.const_value.dtype.name for value in quantized.program.graph.initializers.values()}
    assert lb.simulation(given, images()).activations()
    assert lb.compare(given, quantized, images(), latency=False, layers=False).outputs[0].sqnr_db > 25
    assert lb.compare(sources["model"], lb.compress(given, images(), ratio=2), images(), latency=False, layers=False)


def batches():
    return (images()[i : i + 8] for i in range(0, 64, 8))


DATA = {
    "array": lambda folder: images(),
    "float64": lambda folder: images().astype(np.float64),
    "tensor": lambda folder: torch.from_numpy(images()),
    "with labels": lambda folder: (images(), LABELS),
    "dict": lambda folder: {"image": images(), "labels": LABELS},
    "another name": lambda folder: {"pixels": images()},
    "list of batches": lambda folder: list(batches()),
    "generator": lambda folder: batches(),
    "function": lambda folder: batches,
    "loader": lambda folder: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(images()), torch.from_numpy(LABELS)), batch_size=5
    ),
    "dataset": lambda folder: [(image, int(label)) for image, label in zip(images(), LABELS, strict=True)],
    "npz": lambda folder: folder / "x.npz",
    "npy": lambda folder: str(folder / "x.npy"),
}


FEW = ("array", "generator", "npz")  # the other forms take seconds each: an export


@pytest.mark.parametrize("kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in DATA])
def test_a_torch_module_takes_its_example_from_the_data(kind, tmp_path):
    np.savez(tmp_path / "x.npz", image=images(), labels=LABELS)
    np.save(tmp_path / "x.npy", images())
    module = Net()
    quantized = lb.quantize(module, DATA[kind](tmp_path))
    assert quantized.inputs[0].shape == ("batch", 3, 8, 8)
    with torch.no_grad():
        exact = module(torch.from_numpy(images(5))).numpy()
    assert sqnr_db(exact, quantized.run({"image": images(5)})["output"]) > 25  # 54.1 dB


def test_a_module_of_two_inputs_takes_tuples_and_dicts_and_optional_inputs_by_name():
    a, b = (np.random.default_rng(i).normal(size=(40, 8)).astype(np.float32) for i in (0, 1))
    for data in (
        (a, b),
        (a, b, np.arange(40)),
        {"b": b, "a": a},
        [{"a": a[:20], "b": b[:20]}, {"a": a[20:], "b": b[20:]}],
    ):
        assert [port.name for port in lb.quantize(Two(), data).inputs] == ["a", "b"]
    scaled = lb.quantize(Net(), {"image": images(), "scale": np.ones((64, 20), np.float32)})
    assert [port.name for port in scaled.inputs] == ["image", "scale"]


@pytest.mark.slow
def test_a_module_is_compared_evaluated_and_compressed():
    module, quantized = Net(), lb.quantize(Net(), images())
    found = lb.compare(module, quantized, (images(), LABELS), metric="top1", latency=False)
    assert found.reference.metric == lb.evaluate(module, (images(), LABELS), "top1")
    assert lb.compare(quantized, module, images(), latency=False, layers=False).outputs[0].sqnr_db > 25
    assert lb.compress(module, iter([images()]), ratio=2).inputs[0].name == "image"


# ---------------------------------------------------------------- no data


def test_weights_alone_need_no_data():
    model = convolutions()
    quantized = lb.quantize(model, recipe="int4 group:32")
    assert sqnr_db(model.run({"x": images()})["logits"], quantized.run({"x": images()})["logits"]) > 15  # 28.0 dB
    assert lb.quantize(model, recipe="int4 group:32").program.graph.initializers.keys() == (
        lb.quantize(model, images(), "int4 group:32").program.graph.initializers.keys()
    )
    assert lb.simulation(model, recipe="nf4").constants()


def test_a_network_of_ids_and_masks_is_proved_on_made_up_ones():
    table = np.random.default_rng(0).normal(size=(50, 64))
    model = network(
        """text (int64[batch,time] ids, bool[batch,time] mask, float[batch,time,64] bias) => (float[batch,time,64] y) {
            a = Gather (table, ids)
            b = Add (a, bias)
            c = Unsqueeze (mask, axis)
            y = Where (c, b, bias)
        }""",
        table=table,
        axis=np.array([2]),
    )
    assert "lowbit.parity" in lb.quantize(model, recipe="nf4").metadata


def test_made_up_batches_are_alike_on_every_axis_of_that_name():
    """A state has its batch behind the layers."""
    model = network(
        """g (float[batch,16] x, float[2,batch,16] state) => (float[2,batch,64] y) {
            a = Add (x, state)
            y = MatMul (a, w)
        }""",
        w=np.random.default_rng(0).normal(size=(16, 64)),
    )
    assert "lowbit.parity" in lb.quantize(model, recipe="nf4").metadata


def test_a_recipe_with_activations_asks_for_data_before_any_work():
    with pytest.raises(lb.LowbitError, match=r"quantizes activations \(rule '\*'\).*give some hundred typical inputs"):
        lb.quantize("nowhere.onnx")
    recipe = lb.Recipe(lb.RECIPES["int4-weights"]("onnxruntime").rules, ("correct_bias",))
    with pytest.raises(lb.LowbitError, match="pass 'correct_bias' looks at calibration data"):
        lb.quantize(convolutions(), recipe=recipe)
    with pytest.raises(lb.LowbitError, match=r"lowbit\.load\(module, example_inputs\)"):
        lb.quantize(Net(), recipe="nf4")


def test_a_network_that_made_up_inputs_do_not_fit_asks_for_samples():
    model = network(
        "g (float[n,m] x) => (float[a,b] y) { h = Reshape (x, shape)  y = MatMul (h, w) }",
        shape=np.array([-1, 77]),
        w=np.random.default_rng(0).normal(size=(77, 40)),
    )
    with pytest.raises(lb.LowbitError, match=r"does not run on made-up inputs.*give a few samples"):
        lb.quantize(model, recipe="nf4")
    assert lb.quantize(model, np.ones((2, 77), np.float32), "nf4")


# ---------------------------------------------------------------- what is quantized already


def test_a_quantized_file_is_called_that_with_what_to_do(tmp_path):
    quantized = lb.quantize(convolutions(), images())
    quantized.save(tmp_path / "net.int8.onnx")
    for call in (
        lambda: lb.quantize(tmp_path / "net.int8.onnx", images()),
        lambda: lb.quantize(quantized, recipe="nf4"),
        lambda: lb.simulation(quantized, images()),
        lambda: lb.compress(quantized, images(), ratio=2),
    ):
        with pytest.raises(lb.LowbitError, match=r"is quantized already \(by lowbit.*Start from the float network"):
            call()
    for note in [name for name in quantized.metadata if name.startswith("lowbit.")]:
        del quantized.metadata[note]  # as another tool would have written it
    with pytest.raises(lb.LowbitError, match=r"is quantized already \(\d+ (De)?[qQ]uantizeLinear, "):
        lb.quantize(lb.load(serialize(quantized.program)), images())


@pytest.mark.parametrize("operator", ["QLinearConv", "MatMulNBits", "DynamicQuantizeLSTM", "MatMulInteger"])
def test_operators_of_other_tools_show_it_too(operator):
    import onnx_ir as ir

    from lowbit.graph.quantized import how_quantized

    x = ir.Value(name="x")
    node = ir.node(operator, [x], domain="com.microsoft" if "N" in operator else "")
    assert how_quantized(ir.Model(ir.Graph([x], node.outputs, nodes=[node]), ir_version=10)) == f"1 {operator}"


# ---------------------------------------------------------------- what a stranger gets wrong


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Net, lambda: [], "data is empty"),
        (Net, lambda: iter(()), "data is empty"),
        (Net, lambda: np.ones((4, 5, 8, 8), np.float32), r"Net fails on the example inputs \(RuntimeError"),
        (Net, lambda: "nowhere.npz", "there is no file 'nowhere.npz'"),
        (Two, lambda: np.ones((4, 8), np.float32), r"one array for 2 inputs \('a', 'b'\)"),
        (Two, lambda: {"a": np.ones((4, 8), np.float32)}, "no array for the network's input 'b'"),
        (Net, lambda: 5, "data is int; give arrays"),
        (convolutions, lambda: np.ones((0, 3, 8, 8), np.float32), "no samples"),
        (lambda: 7, lambda: images(), "cannot load a int"),
        (lambda: "nowhere.onnx", lambda: images(), "no such file"),
        (lambda: ".", lambda: images(), "a folder, not an ONNX file"),
        (lambda: b"", lambda: images(), "bytes: empty"),
        (lambda: Net, lambda: images(), r"Net is a class.*Net\(…\)"),
        (lambda: {"conv.weight": torch.ones(2)}, lambda: images(), "a state dict holds weights, no network"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(model, data, message):
    with pytest.raises(lb.LowbitError, match=message):
        lb.quantize(model(), data())


def test_a_proof_on_made_up_inputs_is_called_that():
    said = "the proof ran the file on made-up inputs"
    assert said in lb.quantize(convolutions(), recipe="int8 channel:0").metadata["lowbit.passes"]
    assert said not in lb.quantize(convolutions(), images(), "int8 channel:0").metadata["lowbit.passes"]


@pytest.mark.parametrize("memory", [0, -1, "1GB", 1023])
def test_memory_that_is_no_number_of_bytes_is_refused(memory):
    with pytest.raises(InputError, match=r"memory=.* is no number of bytes"):
        lb.quantize(convolutions(), images(), memory=memory)


@pytest.mark.parametrize("recipe", [None, 8, ["int8"]])
def test_what_is_no_recipe_is_refused_by_its_value(recipe):
    with pytest.raises(InputError, match="is neither a name, a file, a Format nor a Recipe"):
        lb.quantize(convolutions(), images(), recipe)
