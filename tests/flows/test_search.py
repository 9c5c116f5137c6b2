"""The search for the smallest file that keeps the metric: its tries, what it keeps, and how it goes on."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.cli.app import main
from lowbit.errors import DataError, InputError
from lowbit.flows import search as module
from lowbit.flows.bench import Bench
from lowbit.flows.judge import Judge, Measured
from lowbit.flows.metrics import METRICS
from lowbit.flows.ptq import observed
from lowbit.flows.tries import Tries, Try
from lowbit.metadata import from_text
from lowbit.model import Model

MINMAX = lb.Recipe((lb.Rule("*", lb.TensorSpec("int8 channel:0", "minmax"), lb.TensorSpec("uint8", "minmax")),))


@pytest.fixture(autouse=True, scope="module")
def hurried() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.flows.judge.SECONDS", 0.005)
        yield


@dataclass(frozen=True)
class Done:
    """A search that ran to its end, the folder of its output, and how often it read the calibration data."""

    found: lb.Search
    folder: Path
    observed: int


@pytest.fixture(scope="module")
def done(hurried: None, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Of `uneven`, from min-max ranges and nearest rounding, to half a point."""
    folder, seen = tmp_path_factory.mktemp("search"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.flows.bench.observed", lambda *given: seen.append(given) or observed(*given))
        found = searched(uneven(), max_drop=0.5, recipe=MINMAX, output=folder / "net.onnx")
    return Done(found, folder, len(seen))


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Path:
    """The output of that search and its tries, in a folder of one's own."""
    for name in ("net.onnx", "net.onnx.tries.json"):
        shutil.copy(done.folder / name, tmp_path)
    return tmp_path / "net.onnx"


def uneven() -> Model:
    """x → three convolutions → mean over pixels: a channel 20 times as large as the others of its tensor."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(32, 3, 3, 3)) / 5, rng.normal(size=(32, 32, 3, 3)) / 17
    first[0] *= 20
    second[:, 0] /= 20
    return network(
        """
        uneven (float[N,3,8,8] x) => (float[N,8] y) {
            a = Conv <pads = [1,1,1,1]> (x, w1)
            b = Relu (a)
            c = Conv <pads = [1,1,1,1]> (b, w2)
            d = Relu (c)
            e = Conv <pads = [1,1,1,1]> (d, w3)
            f = GlobalAveragePool (e)
            y = Flatten (f)
        }""",
        w1=first,
        w2=second,
        w3=rng.normal(size=(8, 32, 3, 3)) / 17,
    )


def labelled(model: Model, count: int = 200) -> dict[str, np.ndarray]:
    """Test samples on which the float network is always right."""
    x = images(count, seed=2)
    return {"x": x, "labels": next(iter(model.run({"x": x}).values())).argmax(1)}


def searched(model: Model, **options: Any) -> lb.Search:
    return lb.search(model, images(32), labelled(model), **options)


def test_where_int8_keeps_the_metric_one_try_is_enough():
    found = searched(convolutions(), max_drop=3)
    assert found.reached
    assert [row.what for row in found.tries] == ["int8", "float"]
    assert found.metric.name == "top1"
    assert "leave_in_float" not in found.recipe.passes
    assert found.tries[0].measured.bytes < 0.9 * found.tries[1].measured.bytes


def test_where_repairs_do_not_help_as_few_layers_as_can_be_stay_in_float(done):
    found = done.found
    assert found.reached
    assert found.tries[0].drop > 2  # measured 3.5 points
    assert "in float" in found.best.what
    again = lb.evaluate(done.folder / "net.onnx", labelled(uneven()), "top1")  # the file itself, in the engine
    assert 100 * (1 - again) == pytest.approx(found.best.drop)
    assert found.best.drop <= 0.5 + 1e-9
    assert found.why(found.best) == "kept"


def test_the_smallest_of_those_that_reach_the_drop_wins(done):
    good = [row for row in done.found.tries[:-1] if row.reaches(0.5)]
    assert done.found.best.measured.bytes == min(row.measured.bytes for row in good)


def test_with_latency_preferred_the_fastest_of_those_that_reach_the_drop_wins(tmp_path):
    def row(what: str, drop: float, size: int, faster: float) -> Try:
        return Try(what, what, 1.0, measured=Measured(0.5, drop, size, 1.0, faster))

    rows = [row("small", 0.1, 10, 1.0), row("fast", 0.2, 20, 2.0), row("too far", 0.7, 5, 3.0)]
    model = convolutions()
    judge = Judge.of(model, lb.Data.of(labelled(model), model.inputs), None, "onnxruntime")
    best = {p: Tries(judge, {}, 0.5, p, tmp_path / "net.onnx", rows=rows).best() for p in ("bytes", "latency")}
    assert [row.what for row in best.values()] == ["small", "fast"]


def test_a_layer_whose_activations_cost_computes_in_float_with_its_weights_still_stored(done):
    rules = done.found.recipe.rules[1:]
    assert [rule.weights for rule in rules] == [None, None]
    assert all(rule.activations == lb.FLOAT for rule in rules)
    rows = {row["tensor"]: row for row in from_text(done.found.model.metadata["lowbit.ledger"])}
    assert rows["w2"]["status"] == "quantized"


def test_layers_of_few_bits_get_eight_before_any_stays_in_float(monkeypatch):
    monkeypatch.setattr(module, "REPAIRS_OF_FEW_BITS", {})
    found = searched(uneven(), max_drop=6, recipe=lb.Recipe((lb.Rule("*", "int2 channel:0", "uint8"),)))
    assert found.reached
    assert "in 8 bits" in found.best.what
    assert all("in float" not in row.what for row in found.tries)


def test_samples_are_observed_once_for_all_recipes_with_the_same_passes(done):
    assert len(done.found.tries) > 4
    assert done.observed == 2  # without and with the passes of the repairs


def test_repairs_that_take_minutes_are_for_few_bits():
    def rungs(recipe: lb.Recipe) -> list[str]:
        bench = Bench(convolutions(), None, recipe, "net", 2**30, print)
        return [what for what, _ in module._rungs(bench, METRICS["mse"])]

    assert rungs(MINMAX) == ["net", "net, GPTQ"]
    few = lb.Recipe((lb.Rule("*", "int4 channel:0", "uint8"),))
    assert rungs(few) == ["net", "net, GPTQ", "net, AdaRound", "net, reconstructed"]


def test_a_drop_that_only_training_could_reach_is_said_and_the_best_is_kept(monkeypatch):
    monkeypatch.setattr(module, "HALVINGS", 0)
    found = searched(uneven(), max_drop=0, recipe=MINMAX)
    assert not found.reached
    assert found.verdict.startswith("not reached: top1 100.00 % →")
    assert "quantization-aware training" in found.verdict
    assert found.best.drop == min(row.drop for row in found.tries[:-1])


def test_without_labels_the_float_network_s_classes_are_right():
    model = convolutions()
    found = lb.search(model, images(32), images(100, seed=2), max_drop=5)
    assert found.metric.name == "agreement with float"
    assert found.tries[-1].measured.metric == 1.0


def test_the_drop_of_a_share_is_in_points_and_of_an_error_in_percent_of_the_float_value():
    judge = Judge.of(convolutions(), lb.Data.of(labelled(convolutions()), convolutions().inputs), "top1", "onnxruntime")
    assert judge.drop(0.98) == pytest.approx(2)
    x = images(50)
    errors = {"x": x, "labels": convolutions().run({"x": x})["logits"] + 2}  # a mean squared error of 4
    judge = Judge.of(convolutions(), lb.Data.of(errors, convolutions().inputs), "mse", "onnxruntime")
    assert judge.drop(4.2) == pytest.approx(5, abs=0.01)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [-0.1, float("nan")])
def test_a_drop_below_zero_or_that_is_no_number_is_refused(drop):
    with pytest.raises(InputError, match="are 0 or more"):
        searched(convolutions(), max_drop=drop)


def test_labels_that_the_metric_needs_are_asked_for():
    with pytest.raises(DataError, match="the metric 'top1' needs labels, and the data has none"):
        lb.search(convolutions(), images(16), images(20), metric="top1")


def test_a_metric_that_is_no_number_for_the_float_network_ends_the_search():
    with pytest.raises(DataError, match="of the float network is nan on the test data"):
        searched(convolutions(), metric=lambda outputs, labels: float("nan"))


def test_a_try_whose_metric_is_no_number_is_a_row_and_the_search_goes_on():
    calls = []

    def sometimes(outputs: Any, labels: Any) -> float:
        calls.append(1)
        return float("nan") if len(calls) == 2 else 0.5  # the first is of the float network

    found = searched(uneven(), metric=sometimes)
    assert found.why(found.tries[0]) == "failed: sometimes is no number"
    assert found.reached


def test_samples_both_calibrated_and_tested_on_are_counted():
    model = convolutions()
    test = labelled(model)
    with pytest.warns(UserWarning, match="7 of the 200 test samples are calibration samples too"):
        lb.search(model, np.concatenate([images(20), test["x"][:7]]), test, max_drop=5)


def test_a_generator_is_refused_before_any_work():
    with pytest.raises(DataError, match="the calibration data is a generator"):
        lb.search(convolutions(), (x[None] for x in images(8)), labelled(convolutions()))


def test_what_a_recipe_cannot_do_is_a_row_of_its_own(monkeypatch):
    made = module.Bench.make

    def fails_once(self: Any, recipe: lb.Recipe) -> Any:
        if recipe.rules[0].weights.solve == "nearest":
            raise InputError("no such kernel")
        return made(self, recipe)

    monkeypatch.setattr(module.Bench, "make", fails_once)
    found = searched(convolutions(), max_drop=5)
    assert found.why(found.tries[0]) == "failed: no such kernel"
    assert found.reached


# ---- going on ------------------------------------------------------------------------------------------------------


def test_tries_are_not_made_again(done, copied, monkeypatch):
    monkeypatch.setattr(module.Bench, "make", lambda *_: pytest.fail("a try was made again"))
    again = searched(uneven(), max_drop=0.5, recipe=MINMAX, output=copied)
    assert again.tries[:-1] == done.found.tries[:-1]
    assert copied.read_bytes() == (done.folder / "net.onnx").read_bytes()


def test_a_looser_drop_uses_the_same_tries_and_makes_its_best_file_again(done, copied):
    loose = searched(uneven(), recipe=MINMAX, max_drop=90, output=copied)
    assert len(loose.tries) == len(done.found.tries)
    assert loose.best.measured.bytes < done.found.best.measured.bytes
    assert copied.stat().st_size == loose.best.measured.bytes


def test_ctrl_c_keeps_the_best_and_the_search_goes_on(tmp_path, monkeypatch):
    made, count = module.Bench.make, []

    def interrupted(self: Any, recipe: lb.Recipe) -> Any:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return made(self, recipe)

    monkeypatch.setattr(module.Bench, "make", interrupted)
    found = searched(uneven(), recipe=MINMAX, output=tmp_path / "net.onnx")
    assert found.interrupted
    assert "Interrupted: the best so far is kept" in found.verdict
    assert len(found.tries) == 3  # two and the float network
    assert lb.evaluate(tmp_path / "net.onnx", labelled(uneven()), "top1") == found.best.measured.metric
    monkeypatch.setattr(module, "HALVINGS", 0)
    rest = searched(uneven(), recipe=MINMAX, output=tmp_path / "net.onnx")
    assert rest.tries[:2] == found.tries[:2]
    assert len(rest.tries) == 4


def test_tries_of_other_data_are_not_used(tmp_path):
    searched(convolutions(), max_drop=5, output=tmp_path / "net.onnx")
    with pytest.warns(UserWarning, match="is of another calibration data: the search starts anew"):
        lb.search(convolutions(), images(16), labelled(convolutions()), max_drop=5, output=tmp_path / "net.onnx")


def test_a_torn_file_of_tries_is_named_and_made_anew(tmp_path):
    (tmp_path / "net.onnx.tries.json").write_text('{"of": ')
    with pytest.warns(UserWarning, match=r"net.onnx.tries.json' cannot be read"):
        found = searched(convolutions(), max_drop=5, output=tmp_path / "net.onnx")
    assert found.reached
    assert json.loads((tmp_path / "net.onnx.tries.json").read_text())["tries"][0]["what"] == "int8"


# ---- on the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    convolutions().save("net.onnx")
    np.savez("calib.npz", x=images(32))
    np.savez("test.npz", **labelled(convolutions()))
    return tmp_path


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


QUANTIZE = ("quantize", "net.onnx", "--data", "calib.npz", "-o", "net.q.onnx")


def test_quantize_to_a_drop_shows_its_tries(folder, capsys):
    assert call(*QUANTIZE, "--test", "test.npz", "--metric", "top1", "--max-drop", "4") == 0
    out = capsys.readouterr().out
    assert "reached: top1 100.00 % →" in out
    assert "wrote net.q.onnx" in out
    assert call(*QUANTIZE, "--test", "test.npz", "--max-drop", "4", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reached"] is True
    assert [row["what"] for row in told["tries"]] == ["int8", "float"]
    assert told["file_bytes"] == (folder / "net.q.onnx").stat().st_size


def test_a_drop_that_is_not_reached_is_exit_status_2_and_the_file_is_there(folder, capsys, monkeypatch):
    monkeypatch.setattr(module, "HALVINGS", 0)
    (folder / "plain.toml").write_text(MINMAX.to_toml())
    uneven().save("net.onnx")
    np.savez("test.npz", **labelled(uneven()))
    assert call(*QUANTIZE, "--recipe", "plain.toml", "--test", "test.npz", "--max-drop", "0") == 2
    assert "not reached" in capsys.readouterr().out
    assert (folder / "net.q.onnx").exists()


def test_a_budget_of_bits_is_where_the_search_starts(folder, capsys, monkeypatch):
    monkeypatch.setattr(module, "REPAIRS_OF_FEW_BITS", {})
    monkeypatch.setattr(module, "HALVINGS", 1)
    uneven().save("net.onnx")
    np.savez("test.npz", **labelled(uneven()))
    (folder / "int4.toml").write_text(lb.Recipe((lb.Rule("*", "int4 channel:0", "uint8"),)).to_toml())
    words = (*QUANTIZE, "--recipe", "int4.toml", "--test", "test.npz", "--bits", "4", "--max-drop", "90", "--json")
    assert call(*words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in told["tries"]] == ["recipe", "float"]
    formats = {
        rule.weights.format.grid.bits for rule in lb.Recipe.from_toml(told["tries"][0]["recipe"]).rules if rule.weights
    }
    assert min(formats) < 8


def test_ctrl_c_on_the_command_line_is_exit_status_130_and_says_where_the_best_is(folder, capsys, monkeypatch):
    made, count = module.Bench.make, []

    def interrupted(self: Any, recipe: lb.Recipe) -> Any:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return made(self, recipe)

    monkeypatch.setattr(module.Bench, "make", interrupted)
    uneven().save("net.onnx")
    np.savez("test.npz", **labelled(uneven()))
    assert call(*QUANTIZE, "--test", "test.npz", "--max-drop", "0", "--json") == 130
    told = capsys.readouterr()
    assert told.err.endswith("lowbit: interrupted; the best so far is in net.q.onnx\n")
    assert json.loads(told.out)["interrupted"] is True
    assert lb.evaluate("net.q.onnx", "test.npz", "top1") > 0.9  # measured 0.98


def test_options_that_belong_together_are_asked_for(folder, capsys):
    assert call(*QUANTIZE, "--max-drop", "1") == 1
    assert "needs --data to calibrate on and --test to judge on" in capsys.readouterr().err
    assert call(*QUANTIZE, "--test", "test.npz") == 1
    assert "give it too" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_search_leaves_whole_files_and_goes_on(folder):
    words = [sys.executable, "-m", "lowbit", *QUANTIZE, "--test", "test.npz", "--max-drop", "0", "--json"]
    state = folder / "net.q.onnx.tries.json"
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not state.exists() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = json.loads(state.read_text())["tries"]
    assert kept
    lb.load(folder / "net.q.onnx")
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240)
    rows = json.loads(ended.stdout)["tries"]
    assert [row["recipe"] for row in rows[: len(kept)]] == [row["recipe"] for row in kept]


# ---- settings on optuna --------------------------------------------------------------------------------------------


def test_settings_are_searched_and_the_storage_is_shared(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("lowbit.flows.study.SOLVERS", ("nearest", "gptq"))
    storage = f"sqlite:///{tmp_path}/study.db"
    one = searched(convolutions(), max_drop=3, trials=2, storage=storage, output=tmp_path / "one.onnx")
    assert len(one.tries) == 3
    assert one.reached
    assert one.tries[0].recipe == lb.Recipe.from_toml(one.tries[0].recipe).to_toml()
    two = searched(convolutions(), max_drop=3, trials=1, storage=storage, output=tmp_path / "two.onnx")
    assert {row.recipe for row in one.tries} <= {row.recipe for row in two.tries}  # those of the other machine too
    assert (tmp_path / "two.onnx").stat().st_size == two.best.measured.bytes
    with pytest.raises(InputError, match="holds the study of another metric"):
        searched(convolutions(), metric="top5", trials=1, storage=storage)


def test_a_storage_that_cannot_be_opened_is_named():
    pytest.importorskip("optuna")
    with pytest.raises(InputError, match=r"storage 'sqlite:////nowhere/a\.db' cannot be opened"):
        searched(convolutions(), trials=1, storage="sqlite:////nowhere/a.db")


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 'lowbit\[search\]'"):
        searched(convolutions(), trials=1)


def test_search_on_the_command_line_writes_a_recipe_beside_the_file(folder, capsys):
    pytest.importorskip("optuna")
    words = ("search", "net.onnx", "--data", "calib.npz", "--test", "test.npz", "--trials", "2", "--max-drop", "4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert call(*words, "-o", "small.onnx", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reached"] is True
    best = next(row for row in told["tries"] if row["why"] == "kept")
    assert (folder / "small.toml").read_text() == best["recipe"]
    assert lb.load(folder / "small.onnx").metadata["lowbit.recipe"] == best["recipe"]
