"""What an exporter notes on a network's source code is neither kept nor counted as saved."""

import numpy as np
import onnx
import pytest
from onnx import helper
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.graph.notes import drop_notes, sizes

TRACE = "File /home/somebody/net.py, line 17, in forward: " * 4


def noted(path, user="classes: cat, dog"):
    """The toy with a note on every node and value, and the user's own words on model, graph and input."""
    convolutions().save(path)
    message = onnx.load(path)
    for part in (*message.graph.node, *message.graph.value_info):
        part.doc_string = TRACE
        part.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=TRACE)
    message.metadata_props.add(key="pkg.torch.export.signature", value=TRACE)
    message.doc_string = message.graph.doc_string = message.graph.input[0].doc_string = user
    helper.set_model_props(message, {"classes": user, "pkg.torch.export": TRACE})
    onnx.save(message, path)
    return path


def test_notes_go_and_the_users_words_stay(tmp_path):
    model = lb.load(noted(tmp_path / "noted.onnx"))
    drop_notes(model.program)
    model.save(tmp_path / "bare.onnx")
    assert TRACE.encode() not in (tmp_path / "bare.onnx").read_bytes()
    message = onnx.load(tmp_path / "bare.onnx")
    words = (message.doc_string, message.graph.doc_string, message.graph.input[0].doc_string)
    assert {*words, *(entry.value for entry in message.metadata_props)} == {"classes: cat, dog"}


def test_a_file_without_notes_has_none(tmp_path):
    size = convolutions().save(tmp_path / "toy.onnx")
    assert sizes(tmp_path / "toy.onnx") == (size, 0)


def test_the_share_of_notes_is_exact(tmp_path):
    size, notes = sizes(noted(tmp_path / "noted.onnx"))
    assert size == (tmp_path / "noted.onnx").stat().st_size
    message = onnx.load(tmp_path / "noted.onnx")
    for part in (*message.graph.node, *message.graph.value_info):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    (mine,) = [entry for entry in message.metadata_props if entry.key == "classes"]
    helper.set_model_props(message, {mine.key: mine.value})
    assert abs(size - notes - message.ByteSize()) < 8


def test_compare_does_not_count_notes_as_saved(tmp_path):
    file = noted(tmp_path / "noted.onnx")
    quantized = lb.quantize(lb.load(file), images())
    size = quantized.save(tmp_path / "int8.onnx")
    assert TRACE.encode() not in (tmp_path / "int8.onnx").read_bytes()
    found = lb.compare(file, tmp_path / "int8.onnx", images(8), latency=False, layers=False)
    whole, notes = sizes(file)
    assert (found.reference.bytes_on_disk, found.reference.note_bytes) == (whole, notes)
    assert found.times_smaller == pytest.approx((whole - notes) / size)
    assert "without exporters' notes" in str(found)
    plain = lb.compare(convolutions(), quantized, images(8), latency=False, layers=False)
    assert "notes" not in str(plain)


def test_external_data_are_counted(tmp_path):
    big = network("m (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }", w=np.ones((64, 64)))
    big.save(tmp_path / "inner.onnx")
    onnx.save(
        onnx.load(tmp_path / "inner.onnx"), tmp_path / "outer.onnx", save_as_external_data=True, location="w.data"
    )
    (tmp_path / "inner.onnx").unlink()
    assert sizes(tmp_path / "outer.onnx") == (sum(path.stat().st_size for path in tmp_path.iterdir()), 0)
