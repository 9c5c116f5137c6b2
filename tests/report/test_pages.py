"""Pages and JSON from results: small tensors are summed up, a damaged ledger is named, JSON has no infinities."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_networks import convolutions, images

import lowbit as lb
from lowbit.errors import InputError
from lowbit.report.comparison import as_text
from lowbit.report.ledger import Ledger
from lowbit.report.table import table
from lowbit.report.words import plain, written_text


def test_small_tensors_are_one_row_of_the_ledger_unless_all_are_asked_for(tmp_path):
    quantized = lb.quantize(convolutions(), images())
    quantized.save(tmp_path / "net.onnx")
    ledger = Ledger.of(quantized)
    short, long = (as_text(ledger.view(tmp_path / "net.onnx", every)) for every in (False, True))
    assert "smaller ones (--all)" in short
    assert "smaller ones (--all)" not in long
    assert all(str(row["tensor"]) in long for row in ledger.stored())


@pytest.mark.parametrize("key", ["lowbit.ledger", "lowbit.calibration"])
@pytest.mark.parametrize("text", ["[1, 2]", "{", "zlib:x"])
def test_a_damaged_ledger_is_an_error_that_names_the_file(key, text):
    quantized = lb.quantize(convolutions(), recipe="int8 channel:0")
    quantized.metadata[key] = text
    with pytest.raises(InputError, match="its ledger cannot be read"):
        Ledger.of(quantized)


def test_json_has_null_for_what_it_cannot_say():
    @dataclass
    class Found:
        db: float
        rows: tuple[float, ...]

    assert plain({"a": Found(float("inf"), (1.0, float("nan")))}) == {"a": {"db": None, "rows": [1.0, None]}}


def test_a_heading_over_numbers_stands_to_the_right():
    lines = as_text(table(("name", ">bytes"), [("a", "1"), ("b", None, "dim")])).splitlines()
    assert [line.rstrip() for line in (lines[0], *lines[2:])] == ["name   bytes", "a          1", "b"]


def test_an_exporters_notes_are_not_counted_as_saved():
    assert written_text(Path("q.onnx"), 1.26, 250, 1200, 200) == (
        "wrote q.onnx in 1.3 s: 250 B, was 1,200 B less 200 B of the exporter's notes (4.0× smaller)"
    )
