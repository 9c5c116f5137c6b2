"""build(): what the fx module looks like, where constants go, and what it can do that any torch module can."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from network import networks
from onnx import helper, numpy_helper
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_networks import network as toy

from lowbit.errors import ModelError, UnsupportedError
from lowbit.model import Model, load
from lowbit.network.build import build
from lowbit.network.engine_node import EngineNode


def program(text: str, opset: int = 21, **constants: Any) -> ir.Model:
    """An ONNX text graph, `name (inputs) => (outputs) { nodes }`, with these initialisers."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "my.domain" : 1]>'
    model = onnx.parser.parse_model(header + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return ir.from_proto(model)


CONV = "agraph (float[N,2,4,4] x) => (float[N,3,4,4] y) { c = Conv <pads = [1,1,1,1]> (x, w, b) y = Relu (c) }"


def conv_program(dtype: Any = np.float32) -> ir.Model:
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((3, 2, 3, 3)).astype(dtype), rng.standard_normal(3).astype(dtype)
    return program(
        CONV if dtype == np.float32 else CONV.replace("float[", {np.float16: "float16[", np.float64: "double["}[dtype]),
        w=w,
        b=b,
    )


def test_forward_takes_positions_or_names_and_returns_outputs_by_name() -> None:
    module = build(program("g (float[2] a, float[2] b) => (float[2] s, float[2] d) { s = Add(a, b) d = Sub(a, b) }"))
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    assert {k: v.tolist() for k, v in module(a, b).items()} == {"s": [4, 6], "d": [2, 2]}
    assert module(b=b, a=a)["d"].tolist() == [2, 2]


def test_input_names_that_python_cannot_say_become_identifiers() -> None:
    model = helper.make_graph(
        [helper.make_node("Add", ["in/0:a", "lambda"], ["out:0"])],
        "g",
        [helper.make_tensor_value_info(n, 1, [1]) for n in ("in/0:a", "lambda")],
        [helper.make_tensor_value_info("out:0", 1, [1])],
    )
    module = build(ir.from_proto(helper.make_model(model, opset_imports=[helper.make_opsetid("", 21)])))
    assert module(in_0_a=torch.ones(1), _lambda=torch.ones(1)) == {"out:0": torch.tensor([2.0])}


def test_every_computed_value_carries_its_name_operator_and_node() -> None:
    text = "g (float[4,2] x) => (float[2,2] y) { u, v = Split <num_outputs = 2, axis = 0> (x) y = Add (u, v) }"
    nodes = {n.meta["value"]: n for n in build(program(text)).graph.nodes if "value" in n.meta}
    assert list(nodes) == ["x", "u", "v", "y"]
    assert nodes["x"].op == "placeholder"
    assert [nodes[k].meta["op"] for k in "uvy"] == ["Split", "Split", "Add"]
    assert nodes["u"].meta["node"] == nodes["v"].meta["node"] == nodes["u"].args[0].meta["node"]
    assert nodes["y"].args == (nodes["u"], nodes["v"])


def test_unused_outputs_and_absent_inputs_cost_nothing() -> None:
    text = "g (float[1,1,6] x) => (float[1,1,3] y) { y, i = MaxPool <kernel_shape = [2], strides = [2]> (x) }"
    module = build(program(text))
    assert [n.meta["value"] for n in module.graph.nodes if "value" in n.meta] == ["x", "y"]
    clip = build(program("g (float[3] x) => (float[3] y) { y = Clip (x, , top) }", top=np.float32(1)))
    assert clip(torch.tensor([-5.0, 0, 5]))["y"].tolist() == [-5, 0, 1]


def test_float_initialisers_are_parameters_under_their_onnx_names() -> None:
    names = ["body.0.weight", "stem/conv:0", "onnx::Conv_17", "layers.2.norm.bias"]
    nodes = [helper.make_node("Add", [f"v{i}", name], [f"v{i + 1}"]) for i, name in enumerate(names)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", 1, [2])],
        [helper.make_tensor_value_info("v4", 1, [2])],
        [numpy_helper.from_array(np.float32([i, i]), name) for i, name in enumerate(names)],
    )
    module = build(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])))
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()} == set(names)
    assert module(torch.zeros(2))["v4"].tolist() == [6, 6]


@pytest.mark.parametrize("name", ["as", "lambda.weight", "encoder.in"])
def test_names_that_are_words_of_python_get_another_key(name: str) -> None:
    """torch writes `self.as`, which Python cannot read."""
    model = program("agraph (float[N,2] x) => (float[N,2] y) { y = Mul (x, w) }", w=np.float32([3, -2]))
    weight = model.graph.initializers.pop("w")
    weight.name = name
    model.graph.register_initializer(weight)
    module = build(model)
    assert module(torch.ones(1, 2))["y"].tolist() == [[3, -2]]
    assert [parameter.tolist() for parameter in module.parameters()] == [[3, -2]]


def test_names_that_torch_cannot_hold_get_another_key_that_is_told() -> None:
    names = ["a", "a.b", "forward", 'say "w"', "x..y", "meta", "a_b"]
    nodes = [helper.make_node("Add", [f"v{i}", name], [f"v{i + 1}"]) for i, name in enumerate(names)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", 1, [1])],
        [helper.make_tensor_value_info("v7", 1, [1])],
        [numpy_helper.from_array(np.float32([1 << i]), name) for i, name in enumerate(names)],
    )
    module = build(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])))
    assert module(torch.zeros(1))["v7"].item() == 127
    state = module.state_dict()
    assert {name: state[key].item() for name, key in module.meta["keys"].items()} == {
        n: 1 << i for i, n in enumerate(names)
    }


def test_shapes_axes_and_bounds_are_numbers_in_the_call() -> None:
    text = """g (float[2,6] x) => (float[6,2] y) {
        r = Reshape (x, shape) t = Transpose <perm = [1,0]> (r) c = Clip (t, low, high) y = Slice (c, s, e, a, p) }"""
    constants = {"shape": np.array([2, -1]), "low": np.float32(0), "high": np.float32(6)}
    window = {"s": np.array([0]), "e": np.array([6]), "a": np.array([0]), "p": np.array([1])}
    module = build(program(text, **constants, **window))
    assert not module.state_dict()
    calls = {n.meta["op"]: n.args[1:] for n in module.graph.nodes if n.op == "call_function"}
    assert calls == {"Reshape": ((2, -1),), "Transpose": (), "Clip": (0.0, 6.0), "Slice": ((0,), (6,), (0,), (1,))}


def test_running_statistics_are_buffers() -> None:
    text = "g (float[1,2,3] x) => (float[1,2,3] y) { y = BatchNormalization (x, scale, bias, mean, var) }"
    module = build(program(text, **{k: np.ones(2, np.float32) for k in ("scale", "bias", "mean", "var")}))
    assert {name for name, _ in module.named_parameters()} == {"scale", "bias"}
    assert {name for name, _ in module.named_buffers()} == {"mean", "var"}


def test_tables_of_integers_are_buffers() -> None:
    module = build(program("g (float[200] x) => (float[100] y) { y = Gather (x, i) }", i=np.arange(0, 200, 2)))
    assert {name: b.dtype for name, b in module.named_buffers()} == {"i": torch.int64}
    assert module(torch.arange(200.0))["y"].tolist() == list(range(0, 200, 2))


ATTENTION_MASK = """g (float[B,T,4] x) => (float[B,T,T] y) {
    shape = Shape (x) batch = Gather (shape, zero) time = Gather (shape, one)
    steps = Range (zero, time, one) row = Unsqueeze (steps, first) column = Unsqueeze (steps, last)
    seen = LessOrEqual (row, column)
    b1 = Unsqueeze (batch, first) t1 = Unsqueeze (time, first) wide = Concat <axis = 0> (b1, t1, t1)
    mask = Expand (seen, wide) scores = Einsum <equation = "bik,bjk->bij"> (x, x) y = Where (mask, scores, low) }"""
MASK_CONSTANTS = {
    "zero": np.array(0), "one": np.array(1), "first": np.array([0]), "last": np.array([1]), "low": np.float32(-9),
}  # fmt: skip


@pytest.mark.parametrize("size", [(1, 3), (2, 5)])
def test_shapes_may_change_from_call_to_call(size: tuple[int, int]) -> None:
    x = torch.randn(*size, 4)
    wanted = torch.where(torch.ones(size[1], size[1]).tril().bool(), x @ x.transpose(1, 2), -9)
    module = build(program(ATTENTION_MASK, **MASK_CONSTANTS))
    torch.testing.assert_close(module(x)["y"], wanted)


def test_shape_values_stay_in_main_memory_when_the_module_moves() -> None:
    """The meta device refuses to mix with tensors in main memory and to be read: a GPU would wait at each of those."""
    module = build(program(ATTENTION_MASK, **MASK_CONSTANTS)).to("meta")
    y = module(torch.randn(2, 5, 4, device="meta"))["y"]
    assert (y.device.type, y.shape) == ("meta", (2, 5, 5))
    moved = [n for n in module.graph.nodes if getattr(n.target, "__name__", "") == "to_device_of"]
    assert len(moved) == 1  # the finished mask alone
    assert {n.meta["value"] for n in module.graph.nodes if n.meta.get("on_host")} >= {"shape", "time", "seen", "mask"}


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_run(dtype: Any) -> None:
    module = build(conv_program(dtype))
    x = torch.randn(2, 2, 4, 4)
    y = module(x.to(next(module.parameters()).dtype))["y"]
    assert y.dtype == (torch.float16 if dtype == np.float16 else torch.float64)
    torch.testing.assert_close(y.float(), build(conv_program())(x)["y"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_module_can_be_cast(dtype: torch.dtype) -> None:
    x = torch.randn(2, 2, 4, 4)
    y = build(conv_program()).to(dtype)(x.to(dtype))["y"]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), build(conv_program())(x)["y"], rtol=2e-2, atol=5e-2)


def losses_of_training(model: Model, example: torch.Tensor) -> list[float]:
    """Of eight steps; a gradient reaches every parameter."""
    torch.manual_seed(0)
    module = build(model.program)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    (first,) = module(example).values()
    target = torch.randn(first.shape)
    losses = []
    for _ in range(8):
        (y,) = module(example).values()
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_convolutions_with_a_residual_train() -> None:
    text = """m (float[N,3,8,8] x) => (float[N,5] y) {
        a = Conv <pads=[1,1,1,1]> (x, w) r = Relu (a) b = Conv <pads=[1,1,1,1]> (r, v) c = Add (b, r)
        p = GlobalAveragePool (c) f = Flatten (p) y = Gemm (f, g, h) }"""
    shapes = {"w": (4, 3, 3, 3), "v": (4, 4, 3, 3), "g": (4, 5), "h": (5,)}
    rng = np.random.default_rng(0)
    model = toy(text, **{key: rng.normal(size=shape) for key, shape in shapes.items()})
    first, *_, last = losses_of_training(model, torch.randn(2, 3, 8, 8))
    assert last < first


@pytest.mark.slow
@pytest.mark.parametrize("make", [networks.resnet, networks.UNet], ids=["resnet", "u-net"])
def test_image_networks_train(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 32, 32)
    first, *_, last = losses_of_training(load(make().eval(), example), example)
    assert last < first


@pytest.mark.slow
def test_recurrent_networks_train() -> None:
    torch.manual_seed(0)
    example = torch.randint(0, 50, (3, 7))
    first, *_, last = losses_of_training(load(networks.TokenClassifier(nn.LSTM).eval(), example), example)
    assert last < first


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    module, x = build(conv_program()), torch.randn(2, 2, 4, 4)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x)["y"], module(x)["y"])
    with torch.no_grad():
        twin.get_parameter("b").add_(1)
    assert not torch.equal(twin(x)["y"], module(x)["y"])


@pytest.mark.slow
def test_the_module_compiles_whole() -> None:
    model = load(networks.mobilenet(nn.Hardswish, excite=True).eval(), torch.randn(2, 3, 32, 32))
    module = build(model.program).eval()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(list(compiled(x).values()), list(module(x).values()))


class LiveTensors(TorchDispatchMode):
    """Counts how many results are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Any]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append(weakref.ref(result))
        self.most = max(self.most, sum(r() is not None for r in self.seen))
        return result


def test_intermediate_values_are_freed_after_their_last_use() -> None:
    chain = " ".join(f"v{i + 1} = Sin (v{i})" for i in range(30))
    module = build(program(f"g (float[8] v0) => (float[8] v30) {{ {chain} }}"))
    x = torch.ones(8)
    with torch.no_grad(), LiveTensors() as live:
        module(x)
    assert len(live.seen) == 30
    assert live.most <= 2


def test_a_graph_out_of_order_is_named() -> None:
    model = program("g (float[2] x) => (float[2] y) { t = Neg (x) y = Neg (t) }")
    first, second = list(model.graph)
    model.graph.remove(first)
    model.graph.append(first)
    with pytest.raises(ModelError, match="'t' is used before"):
        build(model)
    assert second.inputs[0] is not None


def engines(module: fx.GraphModule) -> list[EngineNode]:
    return [m for m in module.modules() if isinstance(m, EngineNode)]


def test_an_operator_outside_the_table_runs_alone_in_onnxruntime() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { a = Mul (x, w) b = com.microsoft.QuickGelu (a) y = Add (b, w) }"
    module = build(program(text, w=np.float32([2])))
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x)["y"], 2 * x * torch.sigmoid(1.702 * 2 * x) + 2)
    assert len(engines(module)) == 1
    assert [n.meta["op"] for n in module.graph.nodes if "op" in n.meta] == ["Mul", "QuickGelu", "Add"]
    module(x)["y"].sum().backward()
    assert module.get_parameter("w").grad is not None  # through the Add; nothing passes the engine's node
    assert torch.equal(copy.deepcopy(module)(x)["y"], module(x)["y"])


def test_sequences_of_tensors_pass_from_engine_node_to_engine_node() -> None:
    """Split into a dynamic number of parts, one more inserted at the front, one erased, joined again; and counted."""
    text = """g (float[N,2] x, float[1,2] first) => (float[M,2] y, int64 count) {
        parts = SplitToSequence (x, one) more = SequenceInsert (parts, first, zero) fewer = SequenceErase (more)
        y = ConcatFromSequence <axis = 0> (fewer) count = SequenceLength (fewer) }"""
    model = program(text, one=np.array(1), zero=np.array(0))
    module = build(model)
    for n in (2, 5):
        x, first = torch.randn(n, 2), torch.zeros(1, 2)
        result = module(x, first)
        assert torch.equal(result["y"], torch.cat([first, x[:-1]]))
        assert result["count"].item() == n


def test_an_engine_node_has_several_outputs_of_sizes_known_only_when_it_runs() -> None:
    module = build(program("g (float[N] x) => (float[M] y, int64[M] n) { y, , , n = Unique (x) }"))
    for x, values, counts in (([3.0, 1, 3], [1, 3], [1, 2]), ([2.0], [2], [1])):
        result = module(torch.tensor(x))
        assert (result["y"].tolist(), result["n"].tolist()) == (values, counts)


def test_an_engine_node_on_shapes_stays_in_main_memory() -> None:
    """The meta device cannot be read: the shape must not have moved there."""
    text = """g (float[B,T,4] x) => (float[M,4] y) {
        s = Shape (x) b = BitwiseOr (s, bits) c = Slice (b, one, end) y = Reshape (x, c) }"""
    module = build(program(text, bits=np.array([0, -1, 0]), one=np.array([1]), end=np.array([3])))
    assert {n.meta["value"] for n in module.graph.nodes if n.meta.get("on_host")} >= {"s", "b"}
    assert module.to("meta")(torch.randn(2, 5, 4, device="meta"))["y"].shape == (10, 4)


def test_unsigned_integers_of_64_bits_come_back_from_an_engine_node() -> None:
    """onnxruntime returns them as "unsigned long long", which torch does not take for its uint64."""
    module = build(program("g (uint64[2] a, uint64[2] b) => (uint64[2] y) { y = BitwiseAnd (a, b) }"))
    a, b = (torch.tensor(v, dtype=torch.uint64) for v in ([6, 2**63], [3, 2**63 + 1]))
    assert module(a, b)["y"].tolist() == [2, 2**63]


def test_a_type_that_onnxruntime_does_not_exchange_is_named() -> None:
    model = program("g (float[2] x, float s) => (int4[2] y) { y = QuantizeLinear <output_dtype = 22> (x, s) }")
    with pytest.raises(UnsupportedError, match=r"QuantizeLinear.*does not exchange INT4, the type of 'y'"):
        build(model)


def test_control_flow_runs_in_onnxruntime_with_what_it_takes_from_outside() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        a = Mul (x, w)
        y = If (c) <
            then_branch = yes () => (float[2] p) { p = Add (a, w) },
            else_branch = no () => (float[2] q) { t = Sub (a, x) q = Neg (t) }
        > }"""
    module = build(program(text, w=np.float32([2, 3])))
    x = torch.tensor([1.0, 1.0])
    assert module(x, torch.tensor(True))["y"].tolist() == [4, 6]
    assert module(x, torch.tensor(False))["y"].tolist() == [-1, -2]
    assert set(module.state_dict()) == {"w"}


def test_what_nothing_can_run_is_named_with_domain_and_node() -> None:
    model = program("g (float[2] x) => (float[2] y) { y = my.domain.Frobnicate (x) }")
    next(iter(model.graph)).name = "block3/frob"
    with pytest.raises(UnsupportedError, match=r"operator Frobnicate of domain my\.domain, node 'block3/frob'"):
        build(model)


def test_an_attribute_of_an_older_opset_is_refused() -> None:
    model = program("g (float[2] x) => (float[2] y) { y = Clip <min = 0.0, max = 6.0> (x) }", opset=6)
    with pytest.raises(UnsupportedError, match=r"Clip.*max, min.*lowbit\.load"):
        build(model)


def test_single_numbers_are_parameters_that_no_step_moves() -> None:
    module = build(program("g (float[2] x) => (float[2] y) { y = Mul (x, factor) }", factor=np.float32(0.5)))
    assert {name: p.requires_grad for name, p in module.named_parameters()} == {"factor": False}
