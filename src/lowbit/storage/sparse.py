"""A mostly constant array as the distances between its other elements.

Source: Han et al. 2016 (arXiv 1510.00149), section 3: relative indices of bounded width; where a distance does not
fit, the largest one is written with an element of the background itself, and counting goes on from there.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import InputError
from lowbit.storage.kernel import kernel


def split(elements: NDArray[Any], background: int, gap_bits: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """(m,) gaps of at most 2**gap_bits - 1 background elements, and (m,) the element that follows each.

    What comes after the last entry is background.
    """
    limit = (1 << gap_bits) - 1
    count = _count(elements, background, limit)
    gaps, values = np.empty(count, np.uint8), np.empty(count, elements.dtype)
    _split(elements, background, limit, gaps, values)
    return gaps, values


def join(gaps: NDArray[np.uint8], values: NDArray[Any], background: int, count: int) -> NDArray[Any]:
    """The (count,) elements that `split` took apart."""
    elements = np.full(count, background, values.dtype)
    if not _join(gaps, values, elements):
        raise InputError(f"a sparse tensor is damaged: its entries lie beyond its {count} elements.")
    return elements


@kernel
def _count(elements: Any, background: int, limit: int) -> int:
    entries = 0
    gap = 0
    for i in range(elements.size):
        if elements[i] != background or gap == limit:
            entries += 1
            gap = 0
        else:
            gap += 1
    return entries


@kernel
def _split(elements: Any, background: int, limit: int, gaps: Any, values: Any) -> None:
    """Bounds: gaps and values have _count entries."""
    at = 0
    gap = 0
    for i in range(elements.size):
        if elements[i] != background or gap == limit:
            gaps[at] = gap
            values[at] = elements[i]
            at += 1
            gap = 0
        else:
            gap += 1


@kernel
def _join(gaps: Any, values: Any, elements: Any) -> bool:
    """False if an entry lies beyond `elements`. Bounds: gaps and values are of one length."""
    at: Any = -1
    for i in range(gaps.size):
        at += np.int64(gaps[i]) + 1
        if at >= elements.size:
            return False
        elements[at] = values[i]
    return True
