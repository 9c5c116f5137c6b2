"""`lowbit formats`: the catalogue, and every format on a network's own weights."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lowbit as lb
from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.flows.weight_formats import COMPARED, formats_on, weights_on
from lowbit.numerics import FORMATS, parse_format
from lowbit.numerics.catalogue import SOURCES, catalogue


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 96])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), "net.onnx")
    return tmp_path / "net.onnx"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_every_format_has_its_row_and_its_source():
    rows = {row.name: row for row in catalogue()}
    assert list(rows) == list(FORMATS)
    assert all(row.source for row in rows.values())
    assert set(SOURCES) <= set(FORMATS)
    assert (rows["mxfp4"].bits, rows["mxfp4"].largest, rows["mxfp4"].step, rows["mxfp4"].codes) == (4.25, 6, 0.5, 15)
    assert rows["vsq4"].shares == "group:16, scale 4 bits per channel:0"


def test_the_catalogue_is_printed(capsys):
    assert call("formats") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in FORMATS)


def test_one_format_in_words(capsys):
    assert call("formats", "int4 group:64", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["formats"]
    assert (row["bits"], row["codes"], row["largest"]) == (4.5, 16, 7)


def test_formats_on_a_network(net, capsys):
    assert call("formats", "--on", str(net), "--plot", "formats.html", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["formats"]
    assert [row["format"] for row in rows] == sorted(COMPARED, key=lambda words: -_bits(rows, words))
    by_name = {row["format"]: row for row in rows}
    assert by_name["mxfp4"]["bytes"] == 64 * 96 * 4.25 / 8
    assert (
        by_name["int8 channel:0"]["sqnr_db"]
        > by_name["int4 channel:0"]["sqnr_db"]
        > by_name["int3 channel:0"]["sqnr_db"]
    )
    page = Path("formats.html").read_text(encoding="utf-8")
    assert all(f'"{words}"' in page for words in COMPARED)
    assert not re.findall(r"<(?:script|link)[^>]*\b(?:src|href)=", page)  # read without a network


def test_without_plotly_the_error_names_the_extra(net, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "lowbit.report.plot", raising=False)
    assert call("formats", "--on", "net.onnx", "--plot", "formats.html") == 1
    assert capsys.readouterr().err == "lowbit: error: plotly is not installed: pip install 'lowbit[plot]'.\n"


def _bits(rows: list[dict], words: str) -> float:
    return next(row["bits"] for row in rows if row["format"] == words)


def test_formats_on_a_network_as_a_table(net, capsys):
    assert call("formats", "--on", str(net), "nf4", "codebook4") == 0
    text = capsys.readouterr().out
    assert "nf4" in text
    assert "24,576 bytes as float32" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("formats", "--plot", "x.html"), "give --on MODEL"),
        (("formats", "int99"), "format 'int99' is unknown"),
        (("formats", "--on", "absent.onnx"), "absent.onnx"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, net, capsys):
    assert call(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_all_compared_words_are_formats():
    assert all(parse_format(words) for words in COMPARED)


def test_a_network_without_large_weights_says_so(net):
    model = lb.load(net)
    model.program.graph.initializers["w"].const_value = __import__("onnx_ir").tensor(
        np.ones((2, 2), np.float32), name="w"
    )
    assert weights_on(model) == {}
    with pytest.raises(InputError, match="no float32 weight of 1024"):
        formats_on(model)
