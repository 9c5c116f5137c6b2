"""The commands as a user types them: quantize, run, export, show."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from compiled import STRICT
from small_networks import residual
from toy_networks import convolutions, images

from lowbit.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.onnx, x.npz and net.int8.onnx."""
    place = tmp_path_factory.mktemp("integer")
    model = convolutions()
    model.save(place / "net.onnx")
    labels = model.run({"x": images()})["logits"].argmax(1)
    np.savez(place / "x.npz", x=images(), labels=labels)
    call(place, "quantize net.onnx --data x.npz --recipe int8-fast --target integer -o net.int8.onnx")
    return place


def call(folder: Path, words: str, status: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            main(words.split())
    assert end.value.code == status


def test_the_engine_integer_measures_a_metric(folder: Path, capsys: pytest.CaptureFixture[str]):
    call(folder, "run net.int8.onnx --engine integer --data x.npz --metric top1 --json")
    assert json.loads(capsys.readouterr().out)["metric"]["value"] >= 0.95


def test_exported_c_is_a_program_that_turns_codes_into_codes(folder: Path):
    call(folder, "export net.int8.onnx -o tiny.c --main")
    subprocess.run(["gcc", *STRICT, "tiny.c", "-o", "tiny"], check=True, cwd=folder)
    three = np.zeros((3, 8 * 8 * 3), np.int8).tobytes()
    assert len(subprocess.run([folder / "tiny"], input=three, capture_output=True, check=True).stdout) == 3 * 4


def test_exported_arrays_hold_every_integer_by_name(folder: Path):
    call(folder, "export net.int8.onnx -o net.npz")
    with np.load(folder / "net.npz") as arrays:
        first, *_ = (str(line).split()[0] for line in arrays["layers"])
        assert arrays[f"{first}/weight"].dtype == np.int8
        assert arrays[f"{first}/rescale/multiplier"].min() >= 2**30
        assert str(arrays[f"{first}/input"]) == "x"


def test_exported_tflite_has_its_mark(folder: Path):
    pytest.importorskip("tflite")
    call(folder, "export net.int8.onnx -o net.tflite")
    assert (folder / "net.tflite").read_bytes()[4:8] == b"TFL3"


def test_memory_adds_up(folder: Path, capsys: pytest.CaptureFixture[str]):
    call(folder, "show net.int8.onnx --memory --json")
    told = json.loads(capsys.readouterr().out)
    assert told["products"] == 64 * 8 * 27 + 16 * 16 * 72 + 16 * 4
    assert told["arena_bytes"] >= max(layer["ram"] for layer in told["layers"])


@pytest.mark.parametrize(
    "words",
    [
        "export net.int8.onnx -o net.py",
        "export net.int8.onnx -o net.npz --main",
        "export net.int8.onnx -o net.tflite --kernels cmsis-nn",
    ],
)
def test_what_cannot_be_written_is_said_before_work(folder: Path, words: str, capsys: pytest.CaptureFixture[str]):
    call(folder, words, status=1)
    assert capsys.readouterr().err.startswith("lowbit: error: ")


def test_a_file_of_another_target_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]):
    residual()[0].save(folder / "float.onnx")
    call(folder, "export float.onnx -o float.c", status=1)
    assert "Quantize the float network with --target integer" in capsys.readouterr().err
