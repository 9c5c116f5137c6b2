"""`lowbit diagnose` as a stranger meets it: a page or JSON, and one clear line for whatever goes wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy_networks import convolutions, images

from lowbit.cli import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with net.onnx and data.npz."""
    monkeypatch.chdir(tmp_path)
    convolutions().save("net.onnx")
    np.savez("data.npz", x=images(24))
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", "net.onnx", *words])
    return int(stop.value.code or 0)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert call(*words) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_page_is_written_and_the_verdict_said(place, capsys):
    assert call("--data", "data.npz", "--shift", "noise:0.5", "-o", "report.html") == 0
    text, page = capsys.readouterr().out, (place / "report.html").read_text(encoding="utf-8")
    assert "net.onnx" in page
    assert "noise:0.5" in page
    assert text.startswith("net.onnx in int8 ")
    assert "wrote report.html" in text


def test_json_is_printed_and_nothing_written(place, capsys):
    assert call("--data", "data.npz", "--json", "--shift", "none", "--recipe", "int8-fast") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shifts"] == []
    assert told["samples"] == 24
    assert sorted(path.name for path in place.iterdir()) == ["data.npz", "net.onnx"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "missing.npz"], "missing.npz"),
        (["-o", "report.html"], "--data"),
        (["--data", "data.npz", "-o", "gone/report.html"], "there is no folder 'gone'"),
        (["--data", "data.npz", "-o", "report.pdf"], ".html (a page)"),
        (["--data", "data.npz", "-o", "."], "is a folder"),
        (["--data", "data.npz", "--shift", "fog:1"], "shift 'fog' does not exist"),
        (["--data", "data.npz", "--recipe", "int7.toml"], "int7.toml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place, capsys, words, told):
    assert told in error_of(capsys, *words)


def test_nan_in_the_data_names_its_sample(place, capsys):
    x = images(8)
    x[5] = np.nan
    np.savez("bad.npz", x=x)
    assert "sample 5" in error_of(capsys, "--data", "bad.npz")
