"""`lowbit train` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_train import data, floats, top1

import lowbit as lb
from lowbit.cli import main
from lowbit.storage import atomic
from lowbit.training.checkpoints import Checkpoints

OPTIONS = ["--epochs", "1", "--schedule", "batch=40 rate=0.02 bfloat16=false"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with net.onnx, two archives to train on and one to judge on."""
    monkeypatch.chdir(tmp_path)
    floats().save("net.onnx")
    samples = data()
    for name, rows in (("one.npz", slice(0, 200)), ("two.npz", slice(200, None))):
        np.savez(name, x=samples["x"][rows], labels=samples["labels"][rows])
    np.savez("test.npz", **data(400, seed=1))
    return tmp_path


def lowbit(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["train", "net.onnx", *words])
    return int(end.value.code or 0)


def test_several_archives_are_trained_on_and_the_file_says_what_happened(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["--data", "one.npz", "--data", "two.npz", "--test", "test.npz"]
    assert lowbit(*sources, "--limit", "100:260", "-o", "small.onnx", *OPTIONS, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    small = lb.load("small.onnx")
    assert told["samples"] == json.loads(small.metadata["lowbit.calibration"])["samples"] == 160
    assert told["epochs"][-1]["value"] == pytest.approx(top1(small), abs=0.005)
    assert {path.name for path in place.iterdir()} == {"net.onnx", "one.npz", "two.npz", "test.npz", "small.onnx"}


@pytest.mark.slow
def test_an_interrupted_command_writes_the_best_and_goes_on_when_it_is_typed_again(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints.__init__, "__defaults__", (0.0, *Checkpoints.__init__.__defaults__[1:]))  # type: ignore[index]
    words = ["--data", "one.npz", "-o", "small.onnx", "--epochs", "3", "--schedule", "batch=40 bfloat16=false"]
    assert lowbit(*words) == 0
    captured, whole = capsys.readouterr(), Path("small.onnx").read_bytes()
    assert "epoch 3 of 3: loss" in captured.err
    assert "wrote small.onnx" in captured.out
    confirm, calls = Checkpoints.confirm, iter(range(100))

    def interrupted(self: Checkpoints) -> None:
        confirm(self)
        if next(calls) == 7:  # in the second epoch of 5 steps
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "confirm", interrupted)
    assert lowbit(*words) == 130
    assert "interrupted: this is the best epoch so far" in capsys.readouterr().out
    assert Path("small.onnx.state").exists()
    assert lowbit(*words) == 0
    assert Path("small.onnx").read_bytes() == whole
    assert not Path("small.onnx.state").exists()


@pytest.mark.slow
def test_a_full_disk_at_the_end_loses_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = atomic._sync

    def full(path: Path) -> None:
        if "small.onnx" in path.name and ".state" not in path.name:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(atomic, "_sync", full)
    assert lowbit("--data", "one.npz", "-o", "small.onnx", *OPTIONS) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert Path("small.onnx.state").exists()
    monkeypatch.setattr(atomic, "_sync", sync)
    assert lowbit("--data", "one.npz", "-o", "small.onnx", *OPTIONS) == 0
    assert "epoch" not in capsys.readouterr().err  # the steps were all done


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--schedule", "rte=1"], "schedule: there is no 'rte'. Did you mean 'rate'?"),
        (["--recipe", "w9a9"], "recipe 'w9a9' does not exist"),
        (["--epochs", "0"], "epochs=0"),
        (["--limit", "10"], "10 samples and a batch 128: give more samples, or a batch from 2 to 10"),
        (["--test", "none.npz"], "there is no file 'none.npz'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    place: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lowbit("--data", "one.npz", *words) == 1
    assert told in capsys.readouterr().err
