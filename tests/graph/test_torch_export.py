"""PyTorch modules become programs that compute the same, with names that their author knows."""

import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import sqnr_db

from lowbit.errors import InputError, ModelError, UnsupportedError
from lowbit.flows.prepare import prepare
from lowbit.flows.ptq import quantize
from lowbit.graph.torch_projections import without_projections
from lowbit.model import load


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image):
        x = torch.relu(self.bn(self.conv(image))).flatten(2).transpose(1, 2)
        return self.dropout(nn.functional.gelu(self.fc(self.norm(x)))).softmax(-1)


@pytest.fixture(scope="module")
def net():
    module = Net()
    module.train()
    module.bn.eval()  # a frozen batch norm in a module that trains
    return module, load(module, torch.randn(1, 3, 8, 8))


def run(module, *args, **kwargs):
    module.eval()
    with torch.no_grad():
        return module(*args, **kwargs)


def test_it_computes_what_the_module_does_at_any_batch_size(net):
    module, model = net
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        expected = run(module, x).numpy()
        np.testing.assert_allclose(model.run({"image": x.numpy()})["output"], expected, atol=1e-6)


def test_inputs_outputs_and_parameters_keep_their_names(net):
    module, model = net
    assert str(model.inputs[0]) == "'image' float32[batch, 3, 8, 8]"
    assert [port.name for port in model.outputs] == ["output"]
    floats = {
        n for n, v in model.program.graph.initializers.items() if v.const_value.size > 1 and v.dtype.is_floating_point()
    }
    assert floats == {name for name, value in module.state_dict().items() if value.numel() > 1}


def test_biases_that_begin_at_zero_stay_and_train():
    """The exporter adds biases of zeros where there are none; those of the module are no such."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False), nn.Flatten(), nn.Linear(32, 5))
    for layer in (module[0], module[3]):
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare(module, x, "w8a8-lsq")
    assert [name for name, p in prepared.named_parameters() if "bias" in name] == ["layers.0.bias", "layers.3.bias"]
    prepared.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in prepared.named_parameters() if "bias" in name)


@pytest.mark.slow
def test_every_submodule_is_back_in_its_own_mode():
    module = Net()
    module.train()
    module.bn.eval()
    load(module, torch.randn(2, 3, 8, 8))
    assert (module.training, module.bn.training, module.dropout.training) == (True, False, True)


def test_known_operators_are_recognised_and_batchnorm_is_kept(net):
    operators = {node.op_type for node in net[1].program.graph}
    assert {"BatchNormalization", "LayerNormalization", "Gelu", "Softmax", "MatMul", "Conv"} <= operators
    assert not {"Shape", "Constant", "Identity", "Dropout", "Erf"} & operators


def test_training_on_does_not_change_the_loaded_weights(net):
    module, model = net
    before = model.program.graph.initializers["conv.bias"].const_value.numpy().copy()
    with torch.no_grad():
        module.conv.bias += 1
    assert np.array_equal(model.program.graph.initializers["conv.bias"].const_value.numpy(), before)


def test_no_path_of_this_machine_gets_into_the_file(net, tmp_path):
    net[1].save(tmp_path / "net.onnx")
    assert b"test_torch_export" not in (tmp_path / "net.onnx").read_bytes()


def test_nothing_is_printed_or_warned(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


class TwoIn(nn.Module):
    def forward(self, ids, mask=None):
        x = ids.float().sin()
        return {"states": x if mask is None else x * mask, "last": x[:, -1]}


def test_keyword_inputs_dict_outputs_and_named_axes():
    example = {"ids": torch.ones(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5)}
    axes = {"ids": {0: "batch", 1: "time"}, "mask": {0: "batch", 1: "time"}}
    model = load(TwoIn(), example, dynamic_axes=axes)
    assert [str(port) for port in model.inputs] == ["'ids' int64[batch, time]", "'mask' float32[batch, time]"]
    assert [port.name for port in model.outputs] == ["states", "last"]
    ids, mask = np.ones((3, 7), np.int64), np.full((3, 7), 2, np.float32)
    assert model.run({"ids": ids, "mask": mask})["states"].shape == (3, 7)


class Pair(NamedTuple):
    mean: torch.Tensor
    parts: tuple[torch.Tensor, torch.Tensor]


@pytest.mark.slow
def test_nested_outputs_are_named_by_their_path():
    class Nested(nn.Module):
        def forward(self, x):
            return Pair(x.mean(1), (x + 1, x + 2))

    model = load(Nested(), (np.ones((2, 3), np.float32),))
    assert [port.name for port in model.outputs] == ["mean", "parts_0", "parts_1"]


def test_lstm_and_gru_stay_one_operator():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru = nn.LSTM(4, 6, batch_first=True), nn.GRU(6, 5, batch_first=True)

        def forward(self, x):
            return self.gru(self.lstm(x)[0])[0]

    module, x = Recurrent(), torch.randn(2, 7, 4)
    model = load(module, x)
    assert {"LSTM", "GRU"} <= {node.op_type for node in model.program.graph}
    np.testing.assert_allclose(model.run({"x": x.numpy()})["output"], run(module, x).numpy(), atol=1e-6)


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


@pytest.mark.slow
def test_a_branch_on_values_says_what_to_do():
    with pytest.raises(ModelError, match=r"Branches cannot be exported to ONNX.*torch\.where or torch\.cond") as caught:
        load(Branches(), torch.ones(2, 3))
    assert "\n" not in str(caught.value)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 12) @ torch.ones(12, 2)


@pytest.mark.slow
def test_a_batch_that_cannot_vary_is_fixed_with_a_warning():
    with pytest.warns(UserWarning, match="FixedBatch could not be exported with a dynamic batch"):
        model = load(FixedBatch(), torch.ones(2, 3, 4))
    assert model.inputs[0].shape == (2, 3, 4)


def test_an_example_that_the_module_refuses_names_its_signature():
    with pytest.raises(InputError, match=r"Net fails on the example inputs \(RuntimeError.*Net\.forward\(image\)"):
        load(Net(), torch.ones(2, 5, 8, 8))
    with pytest.raises(InputError, match=r"needs example_inputs.*Net\.forward\(image\)"):
        load(Net())
    with pytest.raises(InputError, match=r"dynamic_axes names \['picture'\]"):
        load(Net(), torch.ones(2, 3, 8, 8), dynamic_axes={"picture": [0]})


def test_shared_weights_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    module, ids = Tied(), torch.arange(8).reshape(2, 4)
    model = load(module, ids)
    np.testing.assert_allclose(model.run({"ids": ids.numpy()})["output"], run(module, ids).numpy(), atol=1e-6)


class Sequence(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cells = kind(4, 6, **options)

    def forward(self, x):
        return self.cells(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_second_recurrent_network_of_a_process_exports_like_the_first(kind):
    axes = {"x": {0: "batch", 1: "time"}}
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = Sequence(kind, batch_first=True)
        model = load(module, torch.randn(3, 7, 4), dynamic_axes=axes)
        # The exporter declares the example's 7 steps behind an LSTM; axes that vary are declared as what they are.
        assert (model.inputs[0].shape, model.outputs[0].shape) == (("batch", "time", 4), ("batch", "time", 6))
        assert [n.op_type for n in model.program.graph if n.op_type in ("MatMul", kind.__name__)] == [kind.__name__]
        x = torch.randn(2, 11, 4)
        np.testing.assert_allclose(model.run({"x": x.numpy()})["output_0"], run(module, x)[0].numpy(), atol=1e-6)


class Behind(nn.Module):
    """A recurrent layer over (time, batch, inputs) and a layer behind it."""

    def __init__(self, cells, states=None):
        super().__init__()
        self.cells, self.head = cells, nn.Linear(states or cells.hidden_size, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("how", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}])
def test_an_lstm_that_projects_its_states_is_one_without_a_projection(how):
    torch.manual_seed(0)
    cells = nn.LSTM(4, 6, proj_size=2, **how).eval()
    around, x, count = nn.Sequential(cells), torch.randn(3, 3, 4), cells.num_layers * (1 + cells.bidirectional)
    states = torch.randn(count, 3, 2), torch.randn(count, 3, 6)
    with without_projections(around) as replaced, torch.no_grad():
        assert replaced[0] is not cells
        for given in ((x,), (x, states)):
            (y, (h, c)), (wanted, (last_h, last_c)) = replaced[0](*given), cells(*given)
            for ours, theirs in ((y, wanted), (h, last_h), (c, last_c)):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert around[0] is cells


def test_first_states_of_a_projection_without_full_rank_are_refused():
    cells = nn.LSTM(4, 6, proj_size=2).eval()
    nn.init.zeros_(cells.weight_hr_l0)
    states = torch.ones(1, 3, 2), torch.ones(1, 3, 6)
    with without_projections(cells) as replaced, pytest.raises(UnsupportedError, match="weight_hr of layer 0 has less"):
        replaced(torch.ones(5, 3, 4), states)


@pytest.mark.slow  # torch's exporter
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_an_lstm_that_projects_its_states_is_exported_and_quantized():
    torch.manual_seed(0)
    module, x = Behind(nn.LSTM(4, 32, proj_size=8, batch_first=True), 8).eval(), torch.randn(2, 9, 4)
    model = load(module, x)
    exact = module(x).detach().numpy()
    np.testing.assert_allclose(model.run({"x": x.numpy()})["output"], exact, atol=1e-6)
    quantized = quantize(model, None, "int8-dynamic")
    assert "DynamicQuantizeLSTM" in [node.op_type for node in quantized.program.graph]
    assert sqnr_db(exact, quantized.run({"x": x.numpy()})["output"]) > 40


@pytest.mark.slow  # two exports
def test_layers_behind_a_recurrence_take_other_lengths_than_the_example():
    """The exporter declares the example's 7 steps behind it, and a Reshape to 7 was written into the file."""
    module = Behind(nn.GRU(4, 6, 2))
    model = load(module, torch.zeros(7, 2, 4))
    x = torch.randn(11, 2, 4)
    np.testing.assert_allclose(model.run({"x": x.numpy()})["output"], run(module, x).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        pytest.param({"bias": False, "batch_first": True}, marks=pytest.mark.slow),
        pytest.param({"nonlinearity": "relu"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_elman_network_is_written_as_one_rnn_a_layer(options):
    torch.manual_seed(0)
    module, x = Sequence(nn.RNN, **options), torch.randn(5, 3, 4)
    model = load(module, x, dynamic_axes={"x": {0: "a", 1: "b"}})
    operators = [node.op_type for node in model.program.graph]
    assert operators.count("RNN") == options.get("num_layers", 1)
    assert "MatMul" not in operators
    found = model.run({"x": x.numpy()})
    for name, wanted in zip(("output_0", "output_1"), run(module, x), strict=True):
        np.testing.assert_allclose(found[name], wanted.numpy(), atol=1e-6)


def test_an_export_leaves_the_dispatcher_as_it_was():
    operator = torch.ops.aten.rnn_tanh.input
    before = dict(operator.py_kernels)
    load(Sequence(nn.RNN), torch.randn(5, 3, 4))
    assert dict(operator.py_kernels) == before
    assert not operator._dispatch_cache


def test_axes_that_cannot_vary_are_named_with_the_reason():
    with pytest.raises(ModelError, match=r"inferred a static shape of 2 for dimension inputs\['x'\]\.shape\[0\]"):
        load(FixedBatch(), torch.ones(2, 3, 4), dynamic_axes={"x": [0]})
