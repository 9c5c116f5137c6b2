"""`lowbit pack`, `unpack`, `show` and `run` on containers, as a user types them."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lowbit
from lowbit.cli.app import main


def lowbit_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """y = x · w with an int8 weight of 64×40."""
    rng = np.random.default_rng(0)
    codes = np.clip(np.round(rng.laplace(0, 12, (64, 40))), -127, 127).astype(np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w_codes", "w_scale"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 40])],
        [numpy_helper.from_array(codes, "w_codes"), numpy_helper.from_array(np.float32(0.01), "w_scale")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "net.onnx"
    )
    return tmp_path / "net.onnx"


def test_pack_show_run_unpack(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "net.lowbit"
    assert lowbit_command("pack", net, "-o", packed) == 0
    assert "smaller" in capsys.readouterr().out
    assert lowbit_command("show", packed, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bytes_on_disk"] == packed.stat().st_size == sum(shown["bytes_by_use"].values())
    assert {tensor["name"] for tensor in shown["tensors"]} == {"w_codes", "w_scale"}
    assert lowbit_command("show", packed, "--all") == 0
    assert "frequency tables" in capsys.readouterr().out
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    assert lowbit_command("run", packed, "--data", tmp_path / "x.npz", "-o", tmp_path / "y.npz") == 0
    expected = lowbit.load(net).run({"x": x})["y"]
    assert np.array_equal(np.load(tmp_path / "y.npz")["y"], expected)
    assert lowbit_command("unpack", packed, "-o", tmp_path / "again.onnx") == 0
    assert (tmp_path / "again.onnx").read_bytes() == net.read_bytes()


def test_errors_take_one_line_and_leave_the_old_file(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.lowbit").write_bytes(b"nothing of use")
    (tmp_path / "old.onnx").write_bytes(b"old")
    assert lowbit_command("unpack", tmp_path / "bad.lowbit", "-o", tmp_path / "old.onnx") == 1
    assert lowbit_command("show", tmp_path / "bad.lowbit") == 1
    assert lowbit_command("pack", tmp_path / "bad.lowbit", "-o", tmp_path / "x.lowbit") == 1
    assert lowbit_command("pack", net, "-o", net) == 1
    assert lowbit_command("unpack", tmp_path / "missing.lowbit", "-o", tmp_path / "x.onnx") == 1
    assert (tmp_path / "old.onnx").read_bytes() == b"old"
    assert len(capsys.readouterr().err.strip().splitlines()) == 5
