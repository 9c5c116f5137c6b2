"""The container gives back what was packed, bit for bit, and reads no more than it is asked for."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from container_models import model, save_external, weights
from onnx import helper, numpy_helper
from safetensors.numpy import save
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

from lowbit.errors import InputError
from lowbit.storage import plan
from lowbit.storage.container import Container, pack, unpack, unpacked_bytes
from lowbit.storage.inspect import inspect, read_tensor
from lowbit.storage.products import factor_between, multiplied
from lowbit.storage.wire import numbers


def round_trip(source: Path, folder: Path) -> int:
    """Bytes of the container; the unpacked file equals the source."""
    size = pack(source, folder / "net.lowbit")
    assert size == (folder / "net.lowbit").stat().st_size
    unpack(folder / "net.lowbit", folder / "again.onnx")
    assert (folder / "again.onnx").read_bytes() == source.read_bytes()
    return size


@pytest.mark.parametrize("raw", [True, False], ids=["raw_data", "typed fields"])
def test_an_onnx_file_comes_back_bit_for_bit(raw: bool, tmp_path: Path) -> None:
    onnx.save(model(raw=raw), tmp_path / "net.onnx")
    assert round_trip(tmp_path / "net.onnx", tmp_path) < 0.75 * (tmp_path / "net.onnx").stat().st_size


@pytest.mark.parametrize(
    "name",
    [
        "cifar10-resnet20.onnx",
        "cifar10-resnet20.safetensors",
        "speech/silero_vad_16k_op15.onnx",
        "detection/face-RFB-320.onnx",
        "text/charlstm-charlotte_bronte.onnx",
    ],
)
def test_real_models_come_back_bit_for_bit(name: str, data: Path, tmp_path: Path) -> None:
    assert round_trip(data / name, tmp_path) < 0.87 * (data / name).stat().st_size  # float32: measured 0.78 … 0.83


def test_unknown_fields_and_odd_orders_come_back_too(tmp_path: Path) -> None:
    odd = b"\xfa\x7f\x03abc" + model().SerializeToString() + b"\xc8\xbb\x01\x96\x01"  # fields 2047 and 3001
    (tmp_path / "net.onnx").write_bytes(odd)
    round_trip(tmp_path / "net.onnx", tmp_path)


def test_a_file_that_no_library_would_write_comes_back_too(tmp_path: Path) -> None:
    whole = model()
    nodes, weights_first = onnx.GraphProto(name="g", node=whole.graph.node), onnx.GraphProto()
    weights_first.initializer.extend(whole.graph.initializer)
    graph = weights_first.SerializeToString() + nodes.SerializeToString()  # initialisers are field 5, nodes are field 1
    data = b"\x3a" + numbers([len(graph)]) + graph
    assert onnx.ModelProto.FromString(data).SerializeToString(deterministic=True) != data
    (tmp_path / "net.onnx").write_bytes(data)
    assert round_trip(tmp_path / "net.onnx", tmp_path) < 0.75 * len(data)
    assert np.array_equal(read_tensor(tmp_path / "net.lowbit", "int8"), weights()["int8"])


def test_external_data_comes_back_beside_the_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path = save_external(source)
    pack(path, tmp_path / "net.lowbit")
    other = tmp_path / "other"
    other.mkdir()
    unpack(tmp_path / "net.lowbit", other / "net.onnx")
    for name in ("net.onnx", "weights.bin"):
        assert (other / name).read_bytes() == (source / name).read_bytes()
    assert np.array_equal(read_tensor(tmp_path / "net.lowbit", "int8"), weights()["int8"])
    with pytest.raises(InputError, match="holds 2 files"):
        unpacked_bytes(tmp_path / "net.lowbit")


def test_every_tensor_can_be_read_alone(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "net.onnx")
    pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    for name, array in weights().items():
        read = read_tensor(tmp_path / "net.lowbit", name)
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)
    int4 = next(t for t in model().graph.initializer if t.name == "int4")
    assert np.array_equal(read_tensor(tmp_path / "net.lowbit", "int4"), numpy_helper.to_array(int4))
    assert read_tensor(tmp_path / "net.lowbit", "constant_out").shape == (100,)
    assert "inner_weight" in [tensor.name for tensor in inspect(tmp_path / "net.lowbit").tensors]
    with pytest.raises(InputError, match="no tensor 'nothing'"):
        read_tensor(tmp_path / "net.lowbit", "nothing")


def test_reading_one_tensor_reads_no_other_payload(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "net.onnx")
    pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    with Container(tmp_path / "net.lowbit") as container:
        sizes = [unit.payload_bytes for unit in container.index.units]
        payload = container.payload(sizes.index(max(sizes)))
    damaged = bytearray((tmp_path / "net.lowbit").read_bytes())
    damaged[damaged.index(payload) + len(payload) // 2] ^= 1
    (tmp_path / "net.lowbit").write_bytes(damaged)
    failed = []
    for name, array in weights().items():
        try:
            assert np.array_equal(read_tensor(tmp_path / "net.lowbit", name), array)
        except InputError:
            failed.append(name)
    assert len(failed) == 1
    with pytest.raises(InputError, match="damaged"):
        unpack(tmp_path / "net.lowbit", tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


def test_a_state_dict_of_tensors_comes_back(tmp_path: Path) -> None:
    tied = torch.randn(30, 40)
    state = {
        "a.weight": tied,
        "b.weight": tied,
        "c": torch.randn(7).bfloat16(),
        "n": np.arange(50),
        "t": torch.randn(9, 8).T,
    }
    size = pack(state, tmp_path / "state.lowbit")
    again = load_safetensors(unpacked_bytes(tmp_path / "state.lowbit"))
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], torch.as_tensor(tensor))
    assert size < 4 * 1200 * 0.9 + 1000  # the tied weights are stored once
    assert np.array_equal(read_tensor(tmp_path / "state.lowbit", "n"), np.arange(50))
    with pytest.raises(InputError, match="'x' is a list"):
        pack({"x": [1, 2]}, tmp_path / "state.lowbit")


def test_a_safetensors_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_file({"w": torch.randn(100, 20), "e": torch.zeros(0)}, tmp_path / "a.safetensors", {"made": "by hand"})
    round_trip(tmp_path / "a.safetensors", tmp_path)


def test_int8_codes_cost_their_entropy_with_all_overhead_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = np.clip(np.round(rng.laplace(0, 12, (400, 1000))), -127, 127).astype(np.int8)
    small = helper.make_model(
        helper.make_graph([], "g", [], [], [numpy_helper.from_array(codes, "codes")]),
    )
    onnx.save(small, tmp_path / "net.onnx")
    _, counts = np.unique(codes, return_counts=True)
    entropy = -(counts * np.log2(counts / codes.size)).sum() / 8
    assert pack(tmp_path / "net.onnx", tmp_path / "net.lowbit") < 1.01 * entropy  # measured 1.003


def test_int4_codes_cost_their_entropy_with_all_overhead_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = np.clip(np.round(rng.laplace(0, 1.4, 400_001)), -8, 7).astype(np.int64)
    small = helper.make_model(
        helper.make_graph([], "g", [], [], [numpy_helper.from_array(codes.astype(ml_dtypes.int4), "codes")]),
    )
    onnx.save(small, tmp_path / "net.onnx")
    _, counts = np.unique(codes, return_counts=True)
    entropy = -(counts * np.log2(counts / codes.size)).sum() / 8
    assert round_trip(tmp_path / "net.onnx", tmp_path) < 1.01 * entropy  # measured 1.004


def test_the_scales_of_a_bias_cost_one_factor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(1e-4, 0.3, 500).astype(np.float32)
    alone, both, other = (
        pack(save(arrays), tmp_path / "a.lowbit")
        for arrays in (
            {"w": scales},
            {"w": scales, "z": scales * np.float32(0.0123)},
            {"w": scales, "z": np.nextafter(scales * np.float32(0.0123), np.float32(1))},
        )
    )
    assert both < alone + 40  # 2,000 bytes of floats; a name, a place and a factor are left
    assert other > alone + 1000
    pack(save({"w": scales, "z": scales * np.float32(0.0123)}), tmp_path / "a.lowbit")
    assert np.array_equal(read_tensor(tmp_path / "a.lowbit", "z"), scales * np.float32(0.0123))


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, 1e-20, 3e38, np.float32(1) / 3])
def test_a_factor_is_found_exactly_or_not_at_all(factor: float) -> None:
    numbers = np.random.default_rng(1).normal(0, 1, 100).astype(np.float32)
    with np.errstate(over="ignore"):
        product = numbers * np.float32(factor)
    found = factor_between(product, numbers)
    if factor == 0 or not np.isfinite(product).all():
        assert found is None
    else:
        assert np.array_equal(multiplied(numbers, found), product)
    product[7] = np.nextafter(product[7], np.float32(9))
    assert factor_between(product, numbers) is None


def test_a_large_tensor_is_coded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LARGEST_UNIT", 1000)
    onnx.save(model(), tmp_path / "net.onnx")
    round_trip(tmp_path / "net.onnx", tmp_path)
    assert np.array_equal(read_tensor(tmp_path / "net.lowbit", "float"), weights()["float"])


def test_inspect_accounts_for_every_byte(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "net.onnx")
    size = pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    report = inspect(tmp_path / "net.lowbit")
    assert report.size == size == sum(report.bytes_by_use.values())
    assert report.unpacked_size == (tmp_path / "net.onnx").stat().st_size
    rows = {row.name: row for row in report.tensors}
    assert rows["pruned"].codec.startswith("sparse")
    assert rows["pruned"].sparsity == np.mean(weights()["pruned"] == 0)
    assert rows["int8"].entropy_bits is not None
    assert rows["int8"].bits == pytest.approx(rows["int8"].entropy_bits, rel=0.02)
    assert rows["scalar"].codec == "program"
    assert report.bytes_by_use["indices"] > 50


def test_progress_is_told_until_all_is_coded(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "net.onnx")
    seen: list[tuple[int, int]] = []
    pack(tmp_path / "net.onnx", tmp_path / "net.lowbit", lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
