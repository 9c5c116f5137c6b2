"""What a convolution or pooling pads: the attributes auto_pad and pads as widths in front of and behind each axis."""

from collections.abc import Sequence


def pads_of(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    auto_pad: str = "NOTSET",
    pads: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """(in front, behind) of each axis. SAME_…: an output has ceil(size / stride) elements."""
    if not auto_pad.startswith("SAME"):
        given = [0] * (2 * len(kernel)) if pads is None or auto_pad == "VALID" else list(pads)
        return given[: len(kernel)], given[len(kernel) :]
    total = [
        max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    front = [(t + (auto_pad == "SAME_LOWER")) // 2 for t in total]
    return front, [t - f for t, f in zip(total, front, strict=True)]
