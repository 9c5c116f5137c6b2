"""Which codec writes an array in the fewest bytes, its own description counted.

Nothing is encoded to find out: histograms give the coders' lengths to within a few bytes.
"""

import numpy as np

from lowbit.storage.ans import Ans, histogram
from lowbit.storage.codecs import Codec, Elements, Palette, Planes, Raw, Sparse
from lowbit.storage.tables import entropy_bits

SMALLEST_TABLE_BITS = 64
Choice = tuple[float, Codec]
"""Bits that description and payload take, and the codec."""

SPARSE_SHARE = 0.6
"""Bytes: a sparse form is tried where this share of them is equal; below, it has never been the smallest."""
SPARSE_SHARE_WIDE = 0.25
"""The same share of wider elements, whose other forms spend more on each zero."""


def choose(elements: Elements, packed_bits: int = 8) -> Codec:
    """The codec of the fewest bytes for `elements` (n,), unsigned integers of 1, 2, 4 or 8 bytes.

    packed_bits   2 or 4 where the bytes hold several codes each
    """
    if elements.itemsize > 1:
        return _wide(elements)[1]
    choices = [_bytes(elements)]
    if packed_bits < 8:
        choices.append(_planes(elements, packed_bits, rotate=False, sparse=True))
    return _smallest(choices)[1]


def _smallest(choices: list[Choice]) -> Choice:
    return min(choices, key=lambda choice: choice[0])


def _bytes(symbols: Elements, sparse: bool = True) -> Choice:
    """The best codec for bytes."""
    choices: list[Choice] = [(8 + 8 * symbols.size, Raw())]
    if symbols.size > 8:
        counts = histogram(symbols)
        if entropy_bits(counts) < 8 * symbols.size - SMALLEST_TABLE_BITS:
            ans = Ans.fit(counts)
            choices.append((8 + ans.table.size_bits() + ans.payload_bits(counts), ans))
        background = int(counts.argmax())
        if sparse and SPARSE_SHARE * symbols.size < counts[background] < symbols.size:
            choices.append(_sparse(symbols, background))
    return _smallest(choices)


def _sparse(elements: Elements, background: int) -> Choice:
    """The best codec that writes only the elements that differ from `background`."""
    gaps, values = Sparse.split(elements, background)
    gap_bits, gap_codec = _bytes(gaps, sparse=False)
    value_bits, value_codec = (_bytes if values.itemsize == 1 else _wide)(values, sparse=False)
    return 56 + gap_bits + value_bits, Sparse(background, (gap_codec, value_codec))


def _wide(elements: Elements, sparse: bool = True) -> Choice:
    """The best codec for elements of several bytes."""
    width = elements.itemsize
    choices: list[Choice] = [(8 + 8 * width * elements.size, Raw(width))]
    if elements.size < 4:
        return choices[0]
    choices.append(_planes(elements, 8, _rotation(elements), sparse=False))
    values = _few_values(elements)
    if values is not None:
        bits, child = _bytes(np.searchsorted(values, elements).astype(np.uint8), sparse)
        choices.append((16 + 8 * width * len(values) + bits, Palette(width, tuple(values.tolist()), (child,))))
    zeros = elements.size - int(np.count_nonzero(elements))
    if sparse and SPARSE_SHARE_WIDE * elements.size < zeros < elements.size:
        choices.append(_sparse(elements, 0))
    return _smallest(choices)


def _planes(elements: Elements, bits: int, rotate: bool, sparse: bool) -> Choice:
    """The best codec for each field of `bits` bits."""
    planes = Planes(elements.itemsize, bits, rotate, ()).split(elements)
    costs, codecs = zip(*(_bytes(plane, sparse) for plane in planes), strict=True)
    return 16 * len(planes) + sum(costs), Planes(elements.itemsize, bits, rotate, codecs)


def _rotation(elements: Elements) -> bool:
    """Whether the planes have less entropy when the sign goes to the end."""
    bits = [
        sum(entropy_bits(histogram(plane)) for plane in Planes(elements.itemsize, 8, rotate, ()).split(elements))
        for rotate in (False, True)
    ]
    return bits[1] < bits[0]


def _few_values(elements: Elements) -> Elements | None:
    """The different values in rising order, if there are at most 256; a sample rules most tensors out."""
    if len(np.unique(elements[:: max(1, elements.size // 4096)])) > 256:
        return None
    values = np.unique(elements)
    return values if len(values) <= 256 else None
