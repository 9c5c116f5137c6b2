"""Damaged and hostile files: one line that names what is wrong, never a crash, nothing big allocated."""

import os
import random
import resource

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from lowbit.errors import InputError, LowbitError, UnsupportedError
from lowbit.graph.load import read_bytes, read_file, read_proto
from lowbit.model import load


def net(*nodes: onnx.NodeProto, shape=(2, 3), **weights: np.ndarray) -> onnx.ModelProto:
    """x → nodes (by default a MatMul by w) → y."""
    nodes = nodes or (helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul"),)
    weights = weights or {"w": np.ones((3, 4), np.float32)}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def change(edit) -> onnx.ModelProto:
    """The good network with one thing spoilt."""
    proto = net()
    edit(proto)
    return proto


def attribute(name: str, number: int) -> onnx.ModelProto:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", **{name: [number] if name != "group" else number})
    return net(conv, shape=(1, 2, 8), w=np.ones((2, 2, 3), np.float32))


def if_in_if(depth: int) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    inner = plain = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [out])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=plain)
        inner = helper.make_graph([node], "g", [], [out])
    proto = net(*inner.node)
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    return proto


def function_that_calls_itself() -> onnx.ModelProto:
    proto = net(helper.make_node("F", ["x"], ["y"], domain="d"))
    proto.opset_import.append(helper.make_opsetid("d", 1))
    body = [helper.make_node("F", ["a"], ["b"], domain="d")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("d", 1)]
    proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], body, opsets))
    return proto


def tensor(**fields) -> onnx.ModelProto:
    def edit(proto):
        weight = proto.graph.initializer[0]
        for name, value in fields.items():
            if name == "dims":
                del weight.dims[:]
                weight.dims.extend(value)
            else:
                setattr(weight, name, value)

    return change(edit)


CYCLE = (helper.make_node("Add", ["x", "b"], ["a"], name="one"), helper.make_node("Relu", ["a"], ["b"], name="two"))
SAME = (helper.make_node("Relu", ["x"], ["y"], name="one"), helper.make_node("Neg", ["x"], ["y"], name="two"))

HOSTILE = {
    "no graph": (change(lambda p: p.ClearField("graph")), "has no graph"),
    "no opset": (change(lambda p: p.ClearField("opset_import")), "no opset is declared"),
    "two opsets": (change(lambda p: p.opset_import.append(helper.make_opsetid("", 9))), "two opsets"),
    "future opset": (change(lambda p: setattr(p.opset_import[0], "version", 1 << 40)), "newer than the installed onnx"),
    "no outputs": (change(lambda p: p.graph.ClearField("output")), "no outputs"),
    "no nodes": (change(lambda p: p.graph.ClearField("node")), "no nodes"),
    "cycle": (net(*CYCLE, helper.make_node("Relu", ["b"], ["y"])), r"cycle: node 'one' \(Add\) waits for its own"),
    "self-loop": (net(helper.make_node("Add", ["x", "y"], ["y"], name="n")), "waits for its own result"),
    "made twice": (net(*SAME), "'y' is produced twice"),
    "unknown value": (net(helper.make_node("Add", ["x", "z"], ["y"], name="n")), "reads 'z', which nothing makes"),
    "no weight": (change(lambda p: p.graph.ClearField("initializer")), "reads 'w', which nothing makes"),
    "weight twice": (
        change(lambda p: p.graph.initializer.append(p.graph.initializer[0])),
        "initialisers named 'w'",
    ),
    "unmade output": (change(lambda p: setattr(p.graph.output[0], "name", "q")), "output 'q' is made by no node"),
    "no operator": (net(helper.make_node("", ["x"], ["y"])), "Field 'op_type' of 'node' is required"),
    "unknown operator": (
        net(helper.make_node("Frob", ["x"], ["y"])),
        "No Op registered for Frob with .* 21",
    ),
    "unknown domain": (net(helper.make_node("Frob", ["x"], ["y"], domain="q")), "No opset import for domain 'q'"),
    "too few inputs": (net(helper.make_node("MatMul", ["x"], ["y"])), r"input size 1 not in range \[min=2, max=2\]"),
    "skipped input": (
        net(helper.make_node("Conv", ["", "x"], ["y"])),
        "input 0 .* has an empty string",
    ),
    "too many outputs": (
        net(helper.make_node("Relu", ["x"], ["y", "z"])),
        r"output size 2 not in range \[min=1",
    ),
    "no attribute": (net(helper.make_node("Concat", ["x"], ["y"])), "Required attribute 'axis' is missing"),
    "attribute type": (
        net(helper.make_node("Concat", ["x"], ["y"], axis="one")),
        "Expected: 'INT', actual: 'STRING'",
    ),
    "attribute twice": (
        change(lambda p: p.graph.node[0].attribute.extend([helper.make_attribute("k", 1)] * 2)),
        "appeared multiple times",
    ),
    "attribute of nobody": (
        change(lambda p: p.graph.node[0].attribute.add(name="k", ref_attr_name="r", type=AttributeProto.INT)),
        "refers to an attribute of a function",
    ),
    "group 0": (attribute("group", 0), "'group' is 0; it lies between 1"),
    "strides 0": (attribute("strides", 0), "'strides' is 0"),
    "huge pads": (attribute("pads", 1 << 62), "'pads' is 4611686018427387904"),
    "huge axis": (net(helper.make_node("Softmax", ["x"], ["y"], axis=1 << 31)), "'axis' is 2147483648"),
    "split outputs": (net(helper.make_node("Split", ["x"], ["y", "z"], num_outputs=1)), "but 2 outputs are named"),
    "negative dim": (net(shape=(-3, 3)), r"'x' declares the shape \[-3, 3\]: a dimension is negative"),
    "gigantic input": (net(shape=(1 << 60, 1 << 60)), "bytes, which no model holds"),
    "gigantic weight": (tensor(dims=[1 << 40, 1 << 40]), "which no model holds"),
    "element count": (tensor(dims=[3, 5]), r"declares \[3, 5\] of FLOAT, 60 bytes, but holds 48"),
    "negative weight dim": (tensor(dims=[-3, -4]), "a dimension is negative"),
    "unknown type": (tensor(data_type=99), "unknown element type 99"),
    "no type": (tensor(data_type=0), "no element type"),
    "strings as bytes": (tensor(data_type=TensorProto.STRING), "strings as raw bytes"),
    "self-calling function": (function_that_calls_itself(), "'F' calls itself"),
    "deep nesting": (if_in_if(26), "nested deeper than 24"),
    "line break in a name": (net(helper.make_node("Add", ["x", "a\nb"], ["y"])), r"reads 'a\\nb', which nothing makes"),
}


@pytest.mark.parametrize(("proto", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_model_is_refused_in_one_line_that_says_what_is_wrong(proto, words):
    with pytest.raises(InputError, match=words) as caught:
        read_proto(proto, source="net.onnx")
    assert str(caught.value).startswith("net.onnx: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=words):
        read_bytes(proto.SerializeToString())


def test_the_unspoilt_network_loads():
    assert load(net()).run({"x": np.ones((2, 3), np.float32)})["y"].tolist() == [[3] * 4] * 2
    assert load(if_in_if(2)).inputs[1].name == "c"


def test_sequences_and_sparse_weights_are_unsupported_by_name():
    proto = net()
    proto.graph.sparse_initializer.add()
    with pytest.raises(UnsupportedError, match="sparse initialisers; store the weights densely"):
        read_proto(proto)
    proto = net(helper.make_node("SequenceLength", ["x"], ["y"]))
    proto.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2]))
    with pytest.raises(UnsupportedError, match="input 'x' is a sequence type"):
        read_proto(proto)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["NaN", "infinity"])
def test_a_weight_that_is_not_finite_is_named(bad):
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = bad
    with pytest.raises(InputError, match=r"'w' holds [01] NaN and [01] infinite of its 12 values"):
        load(net(w=weight))
    assert load(net(w=weight), allow_nonfinite=True).inputs


def test_an_infinite_mask_is_no_damaged_weight():
    proto = net(helper.make_node("Add", ["x", "m"], ["y"]), m=np.array([0, 0, -np.inf], np.float32))
    assert load(proto).run({"x": np.ones((2, 3), np.float32)})["y"][0, 2] == -np.inf


def external(folder, location: str, **entries) -> onnx.ModelProto:
    proto = net()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    folder.mkdir(exist_ok=True)
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return proto


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "sub/../../secret", "link", "folder_link/secret", "C:\\secret", "..\\secret", "a\0b"],
)
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(48))
    folder = tmp_path / "model"
    external(folder, location)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder_link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"'w' points to .*folder"):
        read_file(folder / "net.onnx")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "absent"}, "needs the external file 'absent', which is not in"),
        ({"location": ""}, "without a location"),
        ({"location": "sub"}, "not a regular file"),
        ({"location": "w", "offset": 8}, "needs bytes 8 to 56 of 'w', which has 48; the file is incomplete"),
        ({"location": "w", "offset": -8}, "needs bytes -8 to 40"),
        ({"location": "w", "length": 40}, "48 bytes, but its external data has 40"),
        ({"location": "w", "offset": "many"}, "is not a number"),
        ({"location": "twice"}, "has 2 hard links"),
    ],
)
def test_external_data_that_does_not_fit_is_refused(tmp_path, entries, words):
    external(tmp_path, **entries)
    (tmp_path / "w").write_bytes(bytes(48))
    (tmp_path / "one").write_bytes(bytes(48))
    os.link(tmp_path / "one", tmp_path / "twice")
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError, match=words):
        read_file(tmp_path / "net.onnx")


def test_a_link_within_the_folder_is_followed(tmp_path):
    external(tmp_path, "link")
    (tmp_path / "w").write_bytes(np.ones(12, np.float32).tobytes())
    (tmp_path / "link").symlink_to("w")
    assert load(tmp_path / "net.onnx").run({"x": np.ones((2, 3), np.float32)})["y"].sum() == 24


def test_what_is_no_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(InputError, match=r"absent\.onnx: no such file"):
        load(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="a folder, not an ONNX file"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"/dev/zero: not a regular file"):
        load("/dev/zero")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(InputError, match=r"empty\.onnx: empty"):
        load(tmp_path / "empty.onnx")
    with pytest.raises(InputError, match="bytes: empty"):
        load(b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(net().SerializeToString())
    path.chmod(0)
    with pytest.raises(InputError, match=r"net\.onnx: cannot be read \(Permission denied\)"):
        load(path)


def test_a_file_too_large_for_its_format_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(5 << 30)  # sparse: no bytes on disk
    with pytest.raises(InputError, match=r"huge\.onnx: 5\.0 GiB; an ONNX file over 2 GiB keeps its weights beside it"):
        load(tmp_path / "huge.onnx")


def test_a_few_bytes_that_ask_for_terabytes_allocate_nothing():
    big = np.array([1 << 20, 1 << 18], np.int64)
    proto = net(helper.make_node("Expand", ["w", "s"], ["y"]), w=np.ones(1, np.float32), s=big)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load(proto).outputs[0].shape == (1 << 20, 1 << 18)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def outcome(data: bytes) -> str:
    """'loaded', or 'refused' in one line; anything else propagates and fails the test."""
    try:
        load(data)
    except LowbitError as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    return "loaded"


@pytest.mark.parametrize("name", ["speech/kws-dscnn", "detection/face-slim-320", "speech/silero_vad_16k_op15"])
def test_a_truncated_file_is_refused(data, name):
    whole = (data / f"{name}.onnx").read_bytes()
    assert {outcome(whole[: len(whole) * k // 12]) for k in range(1, 12)} == {"refused"}


@pytest.mark.parametrize("name", ["speech/kws-dscnn", "detection/face-slim-320", "speech/silero_vad_16k_op15"])
def test_flipped_bytes_never_crash(data, name):
    whole = (data / f"{name}.onnx").read_bytes()
    chance = random.Random(name)
    for _ in range(10):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 3, 20])):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 255, chance.randrange(256)])
        assert outcome(bytes(damaged)) in ("loaded", "refused")


def test_random_bytes_are_refused():
    chance = random.Random(0)
    assert {outcome(chance.randbytes(chance.randrange(1, 400))) for _ in range(300)} == {"refused"}
