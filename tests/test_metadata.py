"""The ledger's text: small, and what comes back is what was put in."""

import base64
import json
import zlib

import pytest

from lowbit.errors import InputError
from lowbit.metadata import from_text, to_text

ROW = {"tensor": "conv.weight", "layer": "conv", "format": "int8 channel:0", "bytes": 4352, "sqnr_db": 44.62}


def test_rows_come_back():
    rows = [ROW, ROW | {"tensor": "b"}, {"tensor": "x", "lo": -1.5, "hi": 0.25, "quantized": True, "shape": [1, 2]}]
    assert from_text(to_text(rows)) == rows
    assert from_text(to_text([])) == []


@pytest.mark.parametrize("name", ["12", "1e3", "null", "true", "NaN", '"q"', "a\tb", "a\nb", "é ü", " a ", "[1]", "-"])
def test_any_name_comes_back_as_a_string(name):
    assert from_text(to_text([{"tensor": name}])) == [{"tensor": name}]


def test_what_is_empty_is_left_out_and_numbers_keep_four_digits():
    row = {
        "tensor": "x",
        "reason": "",
        "sqnr_db": None,
        "lo": -123.47091674804688,
        "bits": 8.0,
        "bytes": 123456,
        "hi": 0,
    }
    assert from_text(to_text([row])) == [{"tensor": "x", "lo": -123.5, "bits": 8, "bytes": 123456, "hi": 0}]


def test_a_table_takes_less_than_its_rows():
    rows = [ROW | {"tensor": f"blocks.{i}.conv.weight", "layer": f"node_Conv_{i}", "bytes": 97 * i} for i in range(64)]
    older = "zlib:" + base64.b64encode(zlib.compress(json.dumps(rows).encode(), 9)).decode()
    assert from_text(older) == rows
    assert len(to_text(rows)) < 0.9 * len(older)  # measured 0.85; ledgers of real networks 0.69


@pytest.mark.parametrize("text", ["table:", "table:é", "table:abcde", "zlib:abc", "{", to_text([ROW])[:-9]])
def test_damaged_text_is_an_error(text):
    with pytest.raises(InputError, match="damaged"):
        from_text(text)
