"""The table of kernels: numba and torch give the same, and nobody else asks for a device."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from lowbit.numerics import FORMATS, Float, Int, parse_rounding
from lowbit.numerics.grids import FLOAT16, is_fitted
from lowbit.numerics.kernels import DEVICES, ELSEWHERE, kernels
from lowbit.numerics.roundings import nearest

CPU = DEVICES["cpu"]
GRIDS = {name: kind for name, kind in FORMATS.items() if not is_fitted(kind.grid)}
every_grid = pytest.mark.parametrize("kind", GRIDS.values(), ids=GRIDS)


def rows_and_scales(kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 64, generator=generator) * 3
    scale = torch.rand(50, 1, generator=generator) + 0.1
    scale[3] = 0
    return rows, scale, torch.full((50, 1), 3.0 if kind.zero_point else 0.0)


@every_grid
def test_numba_and_torch_give_the_same_codes(kind):
    rows, scale, zero = rows_and_scales(kind)
    for rounding in (parse_rounding(r) for r in ("nearest", "up", "down", "toward_zero")):
        if isinstance(kind.grid, Int) and rounding is not nearest:
            continue
        codes = CPU.encode(rows, scale, zero, kind.grid, rounding, None)
        assert torch.equal(ELSEWHERE.encode(rows, scale, zero, kind.grid, rounding, None), codes)
        values = CPU.decode(codes, scale, zero, kind.grid, None)
        assert torch.equal(ELSEWHERE.decode(codes, scale, zero, kind.grid, None), values)


@every_grid
def test_numba_and_torch_round_to_the_same_values(kind):
    rows, scale, zero = rows_and_scales(kind)
    rows[0, 0] = torch.nan
    ours, theirs = (k.fake_quantize(rows, scale, zero, kind.grid) for k in (CPU, ELSEWHERE))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.isnan().sum() == 1


@pytest.mark.parametrize("grid", [Float(4, 3, "nan"), Float(2, 1), FLOAT16])
def test_a_float_grid_with_a_zero_rounds_as_its_thresholds_say(grid):
    rows, scale, _ = rows_and_scales(FORMATS["e2m1"])
    zero = torch.linspace(-2, 2, 50).round()[:, None]
    codes = ELSEWHERE.encode(rows, scale, zero, grid, nearest, None)
    assert torch.equal(CPU.encode(rows, scale, zero, grid, nearest, None), codes)
    rounded = ELSEWHERE.decode(codes, scale, zero, grid, None)
    assert torch.equal(CPU.fake_quantize(rows, scale, zero, grid), rounded)


def test_numba_and_torch_find_the_same_extremes_and_scales():
    rows, _, _ = rows_and_scales(FORMATS["int8"])
    rows[5] = 0
    lo, hi = CPU.extremes(rows)
    assert torch.equal(torch.stack(ELSEWHERE.extremes(rows)), torch.stack([lo, hi]))
    for signed in (True, False):
        arguments = (lo, hi, 127.0, signed, 1.0, 1e-3, 0.05)
        scale = CPU.symmetric_scale(*arguments)
        assert torch.equal(ELSEWHERE.symmetric_scale(*arguments), scale)
        assert float(scale[5]) == 1


def test_numba_and_torch_see_the_same_error_along_a_gradient():
    rows, scale, zero = rows_and_scales(FORMATS["uint8"])
    along = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    found = [k.error_along(rows, along, scale[:9, 0], zero[:9, 0], Int(8, signed=False)) for k in (CPU, ELSEWHERE)]
    assert found[0].shape == (50, 9)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)  # float32 sums of 64 products of order 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("past_low", "kind"), [(False, torch.int16), (True, torch.int8)])
def test_numba_and_torch_round_to_a_learned_step_and_sum_its_gradient_alike(dtype, threads, past_low, kind):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 9, 65, 65, generator=generator).to(dtype)  # more than one thread takes, and a last part
    along = torch.randn(images.shape, generator=generator).to(dtype)
    images[:, 0] = 0.0
    step, ends = torch.tensor(0.3), (torch.tensor(0.0), torch.tensor(3.0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (images, images.to(memory_format=torch.channels_last)):
            rounded, marks = CPU.round_to_step(x, step, *ends, past_low, kind)
            others = ELSEWHERE.round_to_step(x, step, *ends, past_low, kind)
            assert torch.equal(rounded, others[0])
            assert torch.equal(marks, others[1])
            ours, theirs = (k.step_gradient(marks, along) for k in (CPU, ELSEWHERE))
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[0][:, 0], torch.zeros_like(along[:, 0]) if past_low else along[:, 0])
            assert torch.allclose(ours[1], theirs[1], rtol=1e-3, atol=0.02)  # sums of 152,100 in another order
    finally:
        torch.set_num_threads(before)


def test_a_device_without_a_row_of_its_own_computes_in_torch():
    assert kernels(torch.empty(1)) is CPU
    assert kernels(torch.empty(1, device="meta")) is ELSEWHERE


def test_no_numeric_code_asks_for_the_device():
    source = Path(lowbit.__file__).parent
    asking = re.compile(r"device\.type|\.is_cuda|\.is_cpu|device *[!=]= *[\"']")
    found = {str(p.relative_to(source)) for p in source.rglob("*.py") if asking.search(p.read_text(encoding="utf-8"))}
    # How pictures lie in memory, what may lie in a mapped file, and torch.autocast's argument: not what is computed.
    other = {"network/operators_spatial.py", "network/stored.py", "training/loop.py"}
    assert found <= {"numerics/kernels/__init__.py"} | other


def test_float16_rows_are_encoded_as_their_float32():
    rows, scale, zero = rows_and_scales(FORMATS["int8"])
    half = rows.to(torch.float16)
    ours, theirs = (CPU.encode(x, scale, zero, Int(8), nearest, None) for x in (half, half.float()))
    assert np.array_equal(ours, theirs)
