"""Resize, nearest and linear; and sampling on a grid.

Where torch's interpolation kernels compute the same thing they are used; every other case is separable: elements are
picked, or pairs of them mixed, along one axis after the other. Cubic and antialiased resizing, regions of interest and
kept aspect ratios run in onnxruntime (`engine_node`).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
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
_TRANSFORMS = {"half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"}


def is_separable(node: ir.Node) -> bool:
    """Whether `resize` computes the node's form."""
    how = node.attributes
    plain = how.get_int("antialias", 0) == 0 and how.get_string("keep_aspect_ratio_policy", "stretch") == "stretch"
    known = how.get_string("coordinate_transformation_mode", "half_pixel") in _TRANSFORMS
    return plain and known and how.get_string("mode", "nearest") in ("nearest", "linear")


def _positions(length: int, wanted: int, scale: float, transform: str) -> np.ndarray:
    """Where in the input each element of the output lies, from the first element to the last.

    In float32, as engines compute it: where a position falls on the edge between two elements, its rounding decides.
    """
    one = np.float32
    i, n, ratio = np.arange(wanted, dtype=one), one(length), one(scale)
    if transform == "half_pixel" or (transform == "pytorch_half_pixel" and wanted > 1):
        return (i + one(0.5)) / ratio - one(0.5)
    if transform == "asymmetric":
        return i / ratio
    return i * (n - 1) / one(max(wanted - 1, 1))  # align_corners, or pytorch_half_pixel of one element


def _wanted_sizes(
    x: Tensor, scales: Number | None, sizes: Ints | None, axes: tuple[int, ...]
) -> dict[int, tuple[int, float]]:
    """For each axis that changes its new length, and the scale that positions are computed with."""
    if sizes is None or (isinstance(sizes, Tensor) and sizes.numel() == 0):
        assert scales is not None
        ratios = torch.as_tensor(scales, dtype=torch.float64).flatten().tolist()
        found = {axis: (math.floor(x.shape[axis] * scale), scale) for axis, scale in zip(axes, ratios, strict=True)}
    else:
        found = {axis: (size, size / x.shape[axis]) for axis, size in zip(axes, ints(sizes), strict=True)}
    return {axis: (n, scale) for axis, (n, scale) in found.items() if n != x.shape[axis] or scale != 1}


def resize(
    x: Tensor,
    roi: Number | None = None,
    scales: Number | None = None,
    sizes: Ints | None = None,
    *,
    axes: tuple[int, ...] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    **unused: Any,
) -> Tensor:
    """unused: attributes of the forms that run elsewhere"""
    over = tuple(a % x.dim() for a in axes) if axes is not None else tuple(range(x.dim()))
    plan = _wanted_sizes(x, scales, sizes, over)
    if not plan:
        return x
    transform = coordinate_transformation_mode
    if kernel := _torch_mode(x, plan, mode, transform, nearest_mode):
        lengths = [plan.get(axis, (x.shape[axis], 1.0))[0] for axis in range(2, x.dim())]
        corners = None if mode == "nearest" else transform == "align_corners"
        return F.interpolate(x, lengths, mode=kernel, align_corners=corners)
    wide = x if mode == "nearest" or x.is_floating_point() else x.float()
    for axis, (wanted, scale) in plan.items():
        last = x.shape[axis] - 1
        position = _positions(x.shape[axis], wanted, scale, transform)
        if mode == "nearest":
            wide = _picked(wide, axis, _ROUNDINGS[nearest_mode](position).clip(0, last))
            continue
        position = position.clip(0, last)
        low = np.floor(position)
        share = torch.from_numpy(position - low).to(wide.device, wide.dtype)
        share = share.reshape(-1, *[1] * (x.dim() - 1 - axis))
        wide = torch.lerp(_picked(wide, axis, low), _picked(wide, axis, (low + 1).clip(0, last)), share)
    return wide if wide.dtype == x.dtype else torch.round(wide).to(x.dtype)


def _picked(x: Tensor, axis: int, index: np.ndarray) -> Tensor:
    return x.index_select(axis, torch.from_numpy(index.astype(np.int64)).to(x.device))


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
    if transform == "asymmetric" or (transform == "pytorch_half_pixel" and any(n == 1 for n, _ in plan.values())):
        return None
    return ("linear", "bilinear", "trilinear")[rank - 1]


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
