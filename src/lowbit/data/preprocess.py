"""What happens to an image, or to an array of numbers, before a network sees it: stated, never guessed.

A preprocessing is a line of words that can be pasted back: `size=224 fit=crop short=256 scale=255 mean=.485,.456,.406`.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from lowbit.errors import DataError, InputError, did_you_mean

Fit = Literal["stretch", "crop", "letterbox", "letterbox-corner"]
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos", "area"]
Layout = Literal["NCHW", "NHWC", "flat"]
Color = Literal["RGB", "BGR", "gray"]


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become a network's input: value = (pixel / scale - mean) / std.

    size     (height, width) that the network sees; None: images keep their size
    fit      how an image gets that size: `stretch`; `crop` (short side resized to `short`, or to the size, then the
             centre cut out); `letterbox` (whole image, bars on both sides); `letterbox-corner` (bars right and below)
    short    length of the short side before the centre is cut out, in pixels; only with fit=crop
    fill     pixel value of the bars
    filter   resampling filter of the resize (antialiased, as Pillow's)
    scale, mean, std   one number, or one for each channel; in the units of the formula above
    layout   axes of the network's input; None: arrays are left as they lie, image files become NCHW
    color    order of the channels; image files and arrays are read as RGB

    mean and std of several values need as many channels; size, fill and filter act only on images.
    """

    size: tuple[int, int] | None = None
    fit: Fit = "stretch"
    short: int | None = None
    fill: float = 0.0
    filter: Filter = "bilinear"
    scale: tuple[float, ...] = (1.0,)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout | None = None
    color: Color = "RGB"

    def __post_init__(self) -> None:
        for name, choices in (("fit", Fit), ("filter", Filter), ("color", Color)):
            _one_of(name, getattr(self, name), get_args(choices))
        if self.layout is not None:
            _one_of("layout", self.layout, get_args(Layout))
        if self.short is not None and (self.fit != "crop" or self.size is None):
            raise InputError(f"preprocess short={self.short} needs fit=crop and a size: add 'fit=crop size=…'.")
        if self.fit != "stretch" and self.size is None:
            raise InputError(f"preprocess fit={self.fit} needs a size: add 'size=…'.")
        if self.size is not None and not all(1 <= side <= 32768 for side in self.size):
            raise InputError(f"preprocess size={_text(self.size)}: sides are from 1 to 32768 pixels.")
        if self.short is not None and self.size is not None and not max(self.size) <= self.short <= 32768:
            raise InputError(
                f"preprocess short={self.short}: it is from the size, {_text(self.size)}, to 32768 pixels."
            )
        if 0.0 in (*self.scale, *self.std):
            raise InputError("preprocess: scale and std divide, so they cannot be 0.")

    @classmethod
    def parse(cls, line: str) -> "Preprocessing":
        """From `size=224 scale=255 mean=.485,.456,.406 layout=NCHW`; separated by blanks or semicolons."""
        return cls.of(line)

    @classmethod
    def of(cls, given: "str | Mapping[str, Any] | Preprocessing") -> "Preprocessing":
        """A preprocessing from its line of words, from a table of TOML (values may be text), or as it is."""
        if isinstance(given, Preprocessing):
            return given
        if isinstance(given, str):
            words = shlex.split(given.replace(";", " "))
            if unclear := next((word for word in words if "=" not in word), None):
                example = "'size=224 scale=255 mean=.5 std=.5'"
                raise InputError(f"preprocess: '{unclear}' is not name=value. Example: {example}.")
            given = dict(word.split("=", 1) for word in words)
        values = {}
        for name, value in given.items():
            if name not in _READERS:
                raise InputError(f"preprocess: there is no '{name}'. {did_you_mean(name, _READERS)}")
            try:
                values[name] = _READERS[name](value)
            except (ValueError, TypeError):
                problem = f"preprocess: {name}={value!r} cannot be read. {_EXAMPLES.get(name, '')}"
                raise InputError(problem.strip()) from None
        return cls(**values)

    def __str__(self) -> str:
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={_text(getattr(self, name))}" for name in changed) or "scale=1"

    @property
    def of_images(self) -> bool:
        """Whether it speaks of images (axes, size, colour), not only of values."""
        return self.layout is not None or self.size is not None or self.color != "RGB"

    def values(self, array: np.ndarray, of_channels: bool = False) -> np.ndarray:
        """(array / scale - mean) / std in float32; several numbers go along the last axis, if that is `of_channels`."""
        numbers = (self.scale, self.mean, self.std)
        if set(self.scale) == {1.0} and set(self.mean) == {0.0} and set(self.std) == {1.0}:
            return array
        widths = {len(values) for values in numbers} - {1}
        if widths and not of_channels:
            raise DataError(f"preprocess '{self}' has a value for each channel: add layout=NCHW or layout=NHWC.")
        if widths and widths != {array.shape[-1]}:
            raise DataError(f"preprocess '{self}' has {max(widths)} channels, the data has {array.shape[-1]}.")
        scale, mean, std = (np.asarray(values, np.float32) for values in numbers)
        result: np.ndarray = (array.astype(np.float32) / scale - mean) / std
        return result

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (n, height, width, channels), RGB or gray → the network's input, in its layout, float32 unless raw."""
        if self.size is not None and pixels.shape[1:3] != self.size:
            pixels = np.stack([self.resized(image) for image in pixels])
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        elif self.color == "gray" and pixels.shape[-1] == 3:
            pixels = _gray(pixels)
        result = self.values(pixels, of_channels=True)
        if self.layout == "flat":
            return np.ascontiguousarray(result.reshape(len(result), -1))
        return np.ascontiguousarray(result if self.layout == "NHWC" else result.transpose(0, 3, 1, 2))

    def resized(self, image: np.ndarray) -> np.ndarray:
        """image (height, width, channels) uint8 → the same at `size`, by `fit`."""
        if self.size is None:
            return image
        if image.dtype != np.uint8:
            raise DataError(
                f"images of {image.dtype} cannot be resized; give uint8 pixels, or arrays of the final size."
            )
        height, width = self.size
        if self.fit == "stretch":
            return self._scaled(image, height, width)
        if self.fit == "crop":
            ratio = (self.short or min(height, width)) / min(image.shape[:2])
            ratio = max(ratio, height / image.shape[0], width / image.shape[1])
            large = self._scaled(image, *(max(1, round(side * ratio)) for side in image.shape[:2]))
            top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
            return large[max(0, top) :, max(0, left) :][:height, :width]
        ratio = min(height / image.shape[0], width / image.shape[1])
        # Rounded down, as the letterboxing detectors do: rounding up could exceed the frame by a pixel.
        inner = self._scaled(image, *(max(1, int(side * ratio)) for side in image.shape[:2]))
        framed = np.full((height, width, image.shape[2]), round(self.fill), np.uint8)
        corner = self.fit == "letterbox-corner"
        top = 0 if corner else (height - inner.shape[0]) // 2
        left = 0 if corner else (width - inner.shape[1]) // 2
        framed[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return framed

    def _scaled(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        from PIL import Image

        kind = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "area": 4}[self.filter]
        squeezed = image[..., 0] if image.shape[2] == 1 else image
        resized = Image.fromarray(squeezed).resize((width, height), Image.Resampling(kind))
        return np.asarray(resized).reshape(height, width, image.shape[2])


def _gray(pixels: np.ndarray) -> np.ndarray:
    # ITU-R 601 luma, as Pillow's mode "L".
    luma = pixels.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)
    return luma.round().astype(pixels.dtype)[..., None]


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"preprocess: {name}={value} is not one of {', '.join(choices)}.")


def _numbers(value: Any) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    numbers = tuple(float(part) for part in parts)
    if not numbers or not all(np.isfinite(numbers)):
        raise ValueError(value)
    return numbers


def _size(value: Any) -> tuple[int, int]:
    parts = value.lower().replace(",", "x").split("x") if isinstance(value, str) else value
    sides = tuple(int(part) for part in parts) if isinstance(parts, (list, tuple)) else (int(parts),)
    if len(sides) not in (1, 2):
        raise ValueError(value)
    return (sides[0], sides[-1])


_READERS: dict[str, Callable[[Any], Any]] = {
    "size": _size,
    "fit": str,
    "short": int,
    "fill": float,
    "filter": str,
    "scale": _numbers,
    "mean": _numbers,
    "std": _numbers,
    "layout": lambda text: "flat" if str(text).lower() == "flat" else str(text).upper(),
    "color": lambda text: "gray" if str(text).lower() in ("gray", "grey") else str(text).upper(),
}
_EXAMPLES = {
    "size": "Examples: size=224, size=240x320 (height x width).",
    "mean": "Examples: mean=.5, mean=.485,.456,.406.",
    "std": "Examples: std=.5, std=.229,.224,.225.",
    "scale": "Example: scale=255.",
}


def _text(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(part, int) for part in value):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    if isinstance(value, tuple):
        return ",".join(f"{part:.10g}" for part in value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)
