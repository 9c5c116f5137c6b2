"""The loop on plain modules: it resumes bit for bit, and stops with the layer's name where numbers are not finite."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.errors import DivergedError, InputError
from lowbit.storage import atomic
from lowbit.training import distill
from lowbit.training.average import Average
from lowbit.training.checkpoints import Checkpoints
from lowbit.training.distill import Task
from lowbit.training.loop import Loop, Training, first_not_finite
from lowbit.training.optimizer import OPTIMIZERS, Optimizer, Pace, trainable
from lowbit.training.samples import Samples


class Named(nn.Module):
    """Two layers whose forward gives {output: tensor}."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.second(self.first(x).relu())}


def training(batch: int = 8, **options: object) -> Training:
    generator = torch.Generator().manual_seed(0)
    samples = Samples((torch.randn(40, 4, generator=generator),), torch.arange(40) % 3)
    return Training(Task.of(Named(1), samples, 0.5, 2.0), samples, batch, **options)  # type: ignore[arg-type]


def loop(module: nn.Module, optimizer: Optimizer, **options: object) -> Loop:
    defaults = {"rate": lambda step: 0.05, "checkpoints": Checkpoints(None, {}), "state": lambda done: ({}, {})}
    return Loop(module, options.pop("training", None) or training(), optimizer, **(defaults | options))  # type: ignore[arg-type]


def test_answers_that_take_too_much_memory_are_asked_for_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = training()
    monkeypatch.setattr(distill, "MEMORY", 40 * 3 * 4 - 1)
    asked = training()
    assert kept.task.answers is not None
    assert asked.task.answers is None
    assert torch.allclose(asked.loss(Named(0), 3, 0), kept.loss(Named(0), 3, 0))


def optimizer_of(module: nn.Module, kind: str = "sgd", decay: float = 0.0) -> Optimizer:
    chosen = trainable(module)
    return Optimizer(kind, chosen, {key: Pace(1.0, decay) for key in chosen})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_in_two_runs_end_with_the_bits_of_one(kind: str, tmp_path: Path) -> None:
    def run(module: nn.Module, optimizer: Optimizer, start: int, total: int) -> None:
        def state(done: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
            return {f"module/{k}": t for k, t in module.state_dict().items()} | optimizer.state()[0], {"step": done}

        checkpoints = Checkpoints(tmp_path / "run.state", {}, every_seconds=0)
        loop(module, optimizer, rate=lambda step: 0.05 / (1 + step), checkpoints=checkpoints, state=state).run(
            start, total
        )

    whole = Named(0)
    run(whole, optimizer_of(whole, kind, 0.01), 0, 9)
    before = Named(0)
    run(before, optimizer_of(before, kind, 0.01), 0, 4)
    tensors, notes = Checkpoints(tmp_path / "run.state", {}).load()  # type: ignore[misc]
    after = Named(2)
    after.load_state_dict({k.removeprefix("module/"): t for k, t in tensors.items() if k.startswith("module/")})
    run(after, optimizer_of(after, kind, 0.01).resume(tensors), notes["step"], 9)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), after.parameters(), strict=True))
    assert not torch.equal(whole.first.weight, before.first.weight)


def test_a_loss_that_is_no_number_stops_before_anything_moves_and_names_the_layer() -> None:
    module = Named(0)
    module.second.register_forward_hook(lambda _, __, y: y * float("nan"))
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(DivergedError, match=r"step 3: the loss is nan; .* 'second'\. The learning rate was 0\.07"):
        loop(module, optimizer_of(module), rate=lambda step: 0.07).run(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_function_of_a_traced_network_is_named_too() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.relu(x) - 1).exp()

    traced = torch.fx.symbolic_trace(Root())
    next(node for node in traced.graph.nodes if node.name == "log").meta["node"] = "log_7"
    assert first_not_finite(nn.Sequential(traced), (torch.zeros(2),)).endswith("out of 'log_7'")
    assert first_not_finite(nn.Sequential(traced), (torch.ones(2) * 3,)) == ""


def test_a_weight_that_is_no_number_is_named() -> None:
    module = Named(0)
    with torch.no_grad():
        module.second.weight[0, 0] = torch.inf
    with pytest.raises(DivergedError, match=r"parameter 'second\.weight' is not finite"):
        loop(module, optimizer_of(module)).run(0, 1)


def test_a_loss_out_of_all_proportion_stops_too() -> None:
    module = Named(0)
    with pytest.raises(DivergedError, match=r"the loss is 2000\d"):
        loop(module, optimizer_of(module), penalty=lambda step: torch.tensor(2e4)).run(0, 1)


def test_a_gradient_that_is_no_number_moves_nothing_and_is_named() -> None:
    module = Named(0)
    module.first.weight.register_hook(lambda g: g * torch.inf)
    before = module.second.weight.clone()
    with pytest.raises(DivergedError, match=r"the gradient of 'first\.weight' is not finite"):
        loop(module, optimizer_of(module)).run(0, 1)
    assert torch.equal(before, module.second.weight)


def test_clipping_brings_the_gradients_norm_down() -> None:
    module = Named(0)
    optimizer = optimizer_of(module)
    optimizer.step(training().loss(module, 0, 0) * 100, 0.0, clip=0.5)
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()  # type: ignore[union-attr]
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_weight_decay_moves_only_what_has_it() -> None:
    module = Named(0)
    chosen = trainable(module)
    optimizer = Optimizer("sgd", chosen, {k: Pace(1.0, 0.1 if k == "first.weight" else 0.0) for k in chosen})
    before = {k: p.detach().clone() for k, p in chosen.items()}
    optimizer.step(sum(p.sum() * 0 for p in chosen.values()), 1.0)  # type: ignore[arg-type]
    assert {k for k, p in chosen.items() if not torch.equal(p, before[k])} == {"first.weight"}


def test_an_average_lies_between_the_weights_that_it_has_seen() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = Average(module, 0.5)
    for value in (1.0, 1.0, 1.0):  # shares of the past: 2/11, 3/12, 4/13
        nn.init.constant_(module.weight, value)
        average.update()
    with average.in_place():
        assert module.weight.item() == pytest.approx(1 - 2 / 11 * 3 / 12 * 4 / 13)
    assert module.weight.item() == 1.0


def test_bfloat16_changes_the_loss_by_its_rounding_alone() -> None:
    exact, rough = (training(bfloat16=on).loss(Named(0), 0, 0) for on in (False, True))
    assert exact.dtype == rough.dtype == torch.float32
    assert 0 < abs((exact - rough).item()) < 0.02


def test_a_full_disk_is_a_warning_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "run.state", {}, every_seconds=0)
    checkpoints.save(lambda: ({"x": torch.ones(2)}, {"step": 1}))
    assert checkpoints.load() is None  # not before it is known to be good
    checkpoints.confirm()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", full)
    with pytest.warns(UserWarning, match="the one before it stays; training goes on.*the disk is full"):
        checkpoints.save(lambda: ({"x": torch.zeros(2)}, {"step": 2}), now=True)
    tensors, notes = checkpoints.load()  # type: ignore[misc]
    assert notes == {"step": 1}
    assert torch.equal(tensors["x"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["run.state"]


def test_a_checkpoint_of_another_run_says_what_differs(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run.state", {"recipe": "a", "data": 1}).save(lambda: ({}, {}), now=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="belongs to another run, with another recipe"):
            Checkpoints(tmp_path / "run.state", {"recipe": "b", "data": 1}).load()


def test_classes_of_images_are_on_the_second_axis_in_training_as_in_metrics():
    class Segmenting(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": torch.cat([x, 2 * x, -x], 1)}  # (n, 3 classes, 4, 5)

    x = torch.randn(6, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    samples = Samples((x,), torch.arange(6 * 4 * 5).reshape(6, 4, 5) % 3)
    task = Task.of(Segmenting(), samples, 0.0, 2.0)
    assert (task.scores, task.axis, task.probability) == ("y", 1, False)
    assert samples.labels is not None
    wanted = nn.functional.cross_entropy(Segmenting()(x)["y"], samples.labels)
    assert torch.allclose(task.loss(Segmenting()(x), samples, None), wanted)
