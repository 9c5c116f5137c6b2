"""Resize, and sampling on a grid.

Where torch's interpolation kernels compute the same thing they are used; every other case is separable: one small
matrix an axis, applied in turn.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.network.operators_types import Ints, Number, ints

_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.asarray(np.ceil(x - 0.5)),
    "round_prefer_ceil": lambda x: np.asarray(np.floor(x + 0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _floats(values: Number) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        return tuple(values.flatten().tolist())
    return (float(values),) if isinstance(values, (int, float)) else tuple(values)


def _source_positions(length: int, wanted: int, scale: float, transform: str, roi: tuple[float, float]) -> np.ndarray:
    """Where in the input each element of the output lies.

    In float32, as engines compute it: where a position falls on the edge between two elements, its rounding decides.
    """
    one = np.float32
    i, n, ratio = np.arange(wanted, dtype=one), one(length), one(scale)
    if transform == "half_pixel" or (transform == "pytorch_half_pixel" and wanted > 1):
        return (i + one(0.5)) / ratio - one(0.5)
    if transform == "half_pixel_symmetric":
        return n / 2 * (1 - one(wanted) / (ratio * n)) + (i + one(0.5)) / ratio - one(0.5)
    if transform == "asymmetric":
        return i / ratio
    start, end = map(one, roi)
    if transform == "tf_crop_and_resize":
        if wanted == 1:
            return np.array([one(0.5) * (start + end) * (n - 1)])
        return start * (n - 1) + i * ((end - start) * (n - 1) / one(wanted - 1))
    return i * (n - 1) / one(max(wanted - 1, 1))  # align_corners, or pytorch_half_pixel of one element


def _kernel(distance: np.ndarray, mode: str, a: float) -> np.ndarray:
    """The weight of a neighbour at a distance, linear or cubic (Keys 1981)."""
    d = np.abs(distance)
    if mode == "linear":
        return np.asarray(np.maximum(0, 1 - d))
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights: np.ndarray = np.where(d <= 1, near, np.where(d < 2, far, 0))
    return weights


@lru_cache(maxsize=256)
def _axis_matrix(
    length: int,
    wanted: int,
    scale: float,
    mode: str,
    transform: str,
    roi: tuple[float, float],
    a: float,
    antialias: bool,
    exclude_outside: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(wanted, length) weights, and which outputs lie outside of the input."""
    position = _source_positions(length, wanted, scale, transform, roi)
    stretch = min(1.0, scale) if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / stretch)
    neighbours = np.floor(position)[:, None] + np.arange(1 - reach, reach + 1)[None]
    weights = _kernel((neighbours - position[:, None]) * stretch, mode, a)
    inside = (neighbours >= 0) & (neighbours < length)
    if exclude_outside or antialias:
        weights = weights * inside if exclude_outside else weights
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((wanted, length))
    rows = np.broadcast_to(np.arange(wanted)[:, None], neighbours.shape)
    np.add.at(matrix, (rows, np.clip(neighbours, 0, length - 1).astype(np.int64)), weights)
    return matrix, (position < 0) | (position > length - 1)


@lru_cache(maxsize=256)
def _nearest(
    length: int, wanted: int, scale: float, transform: str, roi: tuple[float, float], rounding: str
) -> tuple[np.ndarray, np.ndarray]:
    """(wanted,) indices, and which outputs lie outside of the input."""
    position = _source_positions(length, wanted, scale, transform, roi)
    index = np.clip(_ROUNDINGS[rounding](position), 0, length - 1).astype(np.int64)
    return index, (position < 0) | (position > length - 1)


def _wanted_sizes(
    x: Tensor, scales: Number | None, sizes: Ints | None, axes: tuple[int, ...], policy: str
) -> dict[int, tuple[int, float]]:
    """For each axis its new length, and the scale that positions are computed with."""
    if sizes is None or (isinstance(sizes, Tensor) and sizes.numel() == 0):
        assert scales is not None
        return {
            axis: (math.floor(x.shape[axis] * scale), scale) for axis, scale in zip(axes, _floats(scales), strict=True)
        }
    asked = ints(sizes)
    ratios = [size / x.shape[axis] for axis, size in zip(axes, asked, strict=True)]
    if policy == "stretch":
        return {axis: (size, ratio) for axis, size, ratio in zip(axes, asked, ratios, strict=True)}
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return {axis: (math.floor(ratio * x.shape[axis] + 0.5), ratio) for axis in axes}


def resize(
    x: Tensor,
    roi: Number | None = None,
    scales: Number | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: tuple[int, ...] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    over = tuple(a % x.dim() for a in axes) if axes is not None else tuple(range(x.dim()))
    plan = _wanted_sizes(x, scales, sizes, over, keep_aspect_ratio_policy)
    transform = coordinate_transformation_mode
    cropped = transform == "tf_crop_and_resize"
    region = _floats(roi) if cropped and roi is not None else ()
    if not cropped:
        plan = {axis: (n, scale) for axis, (n, scale) in plan.items() if n != x.shape[axis] or scale != 1}
    if not plan:
        return x
    plain = not antialias and not exclude_outside and cubic_coeff_a == -0.75
    if plain and (kernel := _torch_mode(x, plan, mode, transform, nearest_mode)):
        lengths = [plan.get(axis, (x.shape[axis], 1.0))[0] for axis in range(2, x.dim())]
        corners = None if mode == "nearest" else transform == "align_corners"
        return F.interpolate(x, lengths, mode=kernel, align_corners=corners)
    outside: Tensor | None = None
    for axis, (wanted, scale) in plan.items():
        at = over.index(axis)
        part = (region[at], region[at + len(over)]) if region else (0.0, 1.0)
        length = x.shape[axis]
        if mode == "nearest":
            index, beyond = _nearest(length, wanted, scale, transform, part, nearest_mode)
            x = x.index_select(axis, torch.from_numpy(index).to(x.device))
        else:
            options = (mode, transform, part, cubic_coeff_a, bool(antialias), bool(exclude_outside))
            matrix, beyond = _axis_matrix(length, wanted, scale, *options)
            x = _along(x, axis, torch.from_numpy(matrix))
        if cropped and beyond.any():
            shape = [1] * x.dim()
            shape[axis] = -1
            mask = torch.from_numpy(beyond).to(x.device).reshape(shape)
            outside = mask if outside is None else outside | mask
    return x if outside is None else torch.where(outside, extrapolation_value, x).to(x.dtype)


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply one axis by a (new, old) matrix; integers by way of float32, rounded."""
    wide = x if x.is_floating_point() else x.float()
    result = (wide.movedim(axis, -1) @ matrix.to(wide.device, wide.dtype).t()).movedim(-1, axis)
    return result if x.is_floating_point() else torch.round(result).to(x.dtype)


def _torch_mode(
    x: Tensor, plan: dict[int, tuple[int, float]], mode: str, transform: str, nearest_mode: str
) -> str | None:
    """The mode of F.interpolate that computes the same, if there is one."""
    rank = x.dim() - 2
    if min(plan) < 2 or not x.is_floating_point() or rank not in (1, 2, 3):
        return None
    if any(abs(n - x.shape[axis] * scale) > 1e-6 * n for axis, (n, scale) in plan.items()):
        return None  # F.interpolate would compute the scale from the sizes, which says something else here
    if mode == "nearest":
        whole = all(n % x.shape[axis] == 0 for axis, (n, _) in plan.items())
        return "nearest" if whole and (transform, nearest_mode) == ("asymmetric", "floor") else None
    if transform not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    if transform == "pytorch_half_pixel" and any(n == 1 for n, _ in plan.values()):
        return None
    if mode == "linear":
        return ("linear", "bilinear", "trilinear")[rank - 1]
    return "bicubic" if rank == 2 else None


_GRID_MODES = {
    "linear": "bilinear",
    "bilinear": "bilinear",
    "nearest": "nearest",
    "cubic": "bicubic",
    "bicubic": "bicubic",
}


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    return F.grid_sample(x, grid.to(x.dtype), _GRID_MODES[mode], padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, list(ints(size)), bool(align_corners))
