"""Samples in memory or in a mapped file, schedules as words and TOML, augmentation of images."""

import tempfile
import tomllib

import numpy as np
import pytest
import torch

from lowbit.errors import DataError, InputError
from lowbit.training.augment import crop_and_flip
from lowbit.training.samples import Samples
from lowbit.training.schedule import Schedule


def batches(count: int = 5) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    rng = np.random.default_rng(0)
    return [({"x": rng.normal(size=(4, 3)).astype(np.float32)}, np.arange(4) + 4 * i) for i in range(count)]


def test_samples_in_a_file_are_those_in_memory() -> None:
    held, mapped = Samples.of(batches()), Samples.of(batches(), most_bytes=200)
    assert len(held) == len(mapped) == 20
    rows = torch.tensor([17, 3, 3, 0])
    assert torch.equal(held.take(rows).inputs[0], mapped.take(rows).inputs[0])
    assert mapped.take(rows).labels.tolist() == [17, 3, 3, 0]  # type: ignore[union-attr]


def test_samples_that_find_no_room_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(prefix: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(DataError, match=r"no room for them in .* No space left on device. Set TMPDIR"):
        Samples.of(batches(), most_bytes=100)


def test_samples_of_several_shapes_cannot_be_mixed() -> None:
    odd = [*batches(1), ({"x": np.zeros((2, 5), np.float32)}, np.zeros(2, int))]
    with pytest.raises(DataError, match=r"'x' has samples of shape \[5\] and of \[3\]"):
        Samples.of(odd)


def test_a_schedule_is_words_toml_and_a_table() -> None:
    chosen = Schedule.of("rate=0.02 optimizer=adamw features=relu_1,relu_2 bfloat16=false warm_up=0.5")
    assert chosen == Schedule(rate=0.02, optimizer="adamw", features=("relu_1", "relu_2"), bfloat16=False, warm_up=0.5)
    assert Schedule.of(tomllib.loads(chosen.to_toml())) == chosen
    assert eval(repr(chosen)) == chosen


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rte=1", "there is no 'rte'. Did you mean 'rate'?"),
        ("rate=fast", "rate='fast' is not int or float"),
        ("batch=8.5", "batch=8.5 is not int"),
        ("optimizer=lion", "optimizer 'lion' does not exist. There are sgd, adam, adamw"),
        ("augment=crop_flip", "augment 'crop_flip' does not exist. Did you mean 'crop-flip'"),
        ("epochs=0", "epochs=0, batch=128, rate=0.01: all are above 0"),
        ("distill=2", "distill=2 is 0 … 1"),
        ("weight_decay=-1", "weight_decay=-1: it is 0 or more"),
        ("quick", "'quick' is not name=value"),
        ("no.toml", "schedule 'no.toml' cannot be read"),
    ],
)
def test_a_schedule_that_is_wrong_says_where(words: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        Schedule.of(words)
    assert told in str(error.value)


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    chosen = Schedule(rate=1.0, warm_up=2)
    rates = [chosen.rate_at(step, 20, 2) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5)
    assert 0 < rates[19] < 0.01


def test_a_cropped_image_is_a_shifted_window_of_the_image_or_of_its_mirror() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    y = crop_and_flip(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), mode="reflect")[0, 0]
    windows = [padded[r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    windows += [window.flip(1) for window in windows]
    found = {next(i for i, window in enumerate(windows) if torch.equal(window, image[0])) for image in y}
    assert found == set(range(18))
    assert torch.equal(crop_and_flip(x.movedim(1, 3), torch.Generator().manual_seed(0)), y.movedim(1, 3))
    with pytest.raises(DataError, match=r"not for \[2, 7\]"):
        crop_and_flip(torch.zeros(2, 7), torch.Generator())
