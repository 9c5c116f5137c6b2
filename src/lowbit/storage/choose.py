"""Which codec writes an array in the fewest bytes, its own configuration counted.

Nothing is encoded to find out: histograms give the coders' lengths to within a few bytes.
"""

from collections.abc import Sequence

import numpy as np

from lowbit.storage import sparse, varints
from lowbit.storage.ans import Ans, histogram
from lowbit.storage.codecs import WIDTHS, Codec, Elements, Packed, Palette, Planes, Raw, Sparse, Unpacked, Varints
from lowbit.storage.configs import config_bits
from lowbit.storage.huffman import Huffman
from lowbit.storage.tables import Counts

Choice = tuple[float, Codec]
"""Bits that codec and payload take, and the codec."""

SPARSE_SHARE = 0.6
"""A sparse form is tried where this share of the elements is equal: below, it has never been the smallest."""
GAP_BITS = (8, 5)
"""Widths of relative indices: the two of Deep Compression's convolutional and fully connected layers."""
TABLES_TRIED = 24
"""How many earlier tables are tried: the most recent ones, which neighbouring layers share."""


def choose(elements: Elements, known: Sequence[Codec] = (), packed_bits: int = 8, numbers: bool = False) -> Codec:
    """The codec of the fewest bytes for `elements` (n,), unsigned integers of 1, 2, 4 or 8 bytes.

    known         table codecs that the file holds already: naming one costs two bytes instead of a table
    packed_bits   2 or 4 where the bytes hold several codes each
    numbers       the bytes are protobuf varints
    """
    if elements.dtype.itemsize > 1:
        return _wide(elements, known)[1]
    choices = _narrow(elements, known, packed_bits)
    if numbers:
        choices += _varints(elements, known, packed_bits)
    return _smallest(choices)[1]


def _smallest(choices: list[Choice]) -> Choice:
    return min(choices, key=lambda choice: choice[0])


def _narrow(elements: Elements, known: Sequence[Codec], packed_bits: int) -> list[Choice]:
    """The best codec for bytes, and for the codes that they hold."""
    choices = [_bytes(elements, known)]
    if packed_bits < 8 and elements.size:
        whole = Unpacked(packed_bits, (Raw(),))
        bits, child = _bytes(whole.split(elements), known)
        choices.append((bits + 16, Unpacked(packed_bits, (child,))))
    return choices


def _bytes(symbols: Elements, known: Sequence[Codec], dense_only: bool = False) -> Choice:
    """The best codec for bytes."""
    if not symbols.size:
        return 16, Raw()
    counts = histogram(symbols)
    choices = [*_dense(counts, symbols.size, known)]
    background = int(counts.argmax())
    if not dense_only and SPARSE_SHARE * symbols.size < counts[background] < symbols.size:
        choices += [_sparse(symbols, background, gap_bits, known) for gap_bits in GAP_BITS]
    return _smallest(choices)


def _dense(counts: Counts, size: int, known: Sequence[Codec]) -> list[Choice]:
    """The codecs that write every byte, from how often each occurs."""
    present = np.flatnonzero(counts)
    low, high = int(present[0]), int(present[-1])
    bits = (high - low).bit_length()
    choices: list[Choice] = [(16 + 8 * size, Raw())]
    if bits < 8:
        choices.append((24 + bits * size, Packed(low, bits)))
    if len(present) > 1 and size > 8:
        ans, huffman = Ans.fit(counts), Huffman.fit(counts)
        choices += [
            (8 + _whole_bytes(c.config_bits()) + _whole_bytes(c.payload_bits(counts)), c) for c in (ans, huffman)
        ]
    for codec in known[-TABLES_TRIED:]:
        if isinstance(codec, (Ans, Huffman)):
            choices.append((24 + _whole_bytes(codec.payload_bits(counts)), codec))
    return choices


def _sparse(elements: Elements, background: int, gap_bits: int, known: Sequence[Codec]) -> Choice:
    """The best codec that writes only the elements that differ from `background`."""
    gaps, values = sparse.split(elements, background, gap_bits)
    gap_choice = _bytes(gaps, known, dense_only=True)
    value_choice = (
        _bytes(values, known, dense_only=True) if elements.itemsize == 1 else _wide(values, known, dense_only=True)
    )
    codec = Sparse(background, gap_bits, (gap_choice[1], value_choice[1]))
    return 24 + 8 * elements.itemsize + 48 + gap_choice[0] + value_choice[0], codec


def _wide(elements: Elements, known: Sequence[Codec], dense_only: bool = False) -> Choice:
    """The best codec for elements of several bytes."""
    width = elements.dtype.itemsize
    choices: list[Choice] = [(16 + 8 * width * elements.size, Raw(width))]
    if elements.size < 4:
        return choices[0]
    for rotate in (False, True):
        planes = Planes(rotate, tuple(Raw() for _ in range(width)))
        best = [_bytes(plane, known, dense_only) for plane in planes.split(elements)]
        choices.append((24 + 16 * width + sum(bits for bits, _ in best), Planes(rotate, tuple(c for _, c in best))))
    values = _few_values(elements)
    if values is not None:
        bits, child = _bytes(np.searchsorted(values, elements).astype(np.uint8), known, dense_only)
        choices.append((24 + 8 * width * len(values) + bits, Palette(width, tuple(values.tolist()), (child,))))
    zeros = elements.size - int(np.count_nonzero(elements))
    if not dense_only and 0.25 * elements.size < zeros < elements.size:
        choices.append(_sparse(elements, 0, 8, known))
    return _smallest(choices)


def _varints(elements: Elements, known: Sequence[Codec], packed_bits: int) -> list[Choice]:
    """The codec that writes the numbers in their fewest bytes; none if they are not written as short as can be."""
    parsed = varints.parse(elements)
    if parsed is None or not parsed.size:
        return []
    low, high = int(parsed.min()), int(parsed.max())
    signed = low < 0
    width = next(width for width in WIDTHS if max(high, -low - 1) < 1 << 8 * width - signed)
    inner = parsed.astype(WIDTHS[width])
    bits, child = _smallest(_narrow(inner, known, packed_bits)) if width == 1 else _wide(inner, known)
    return [(bits + 24 + 32, Varints(signed, (child,)))]


def _few_values(elements: Elements, most: int = 256) -> Elements | None:
    """The different values in rising order, if there are at most `most`; a sample rules most tensors out."""
    if len(np.unique(elements[:: max(1, elements.size // 4096)])) > most:
        return None
    values = np.unique(elements)
    return values if len(values) <= most else None


def _whole_bytes(bits: float) -> float:
    return 8 * np.ceil(bits / 8) if np.isfinite(bits) else bits


def total_bits(codec: Codec, elements: Elements, known: Sequence[Codec] = ()) -> int:
    """Bits that configuration and payload really take, by encoding."""
    return config_bits(codec, known) + 8 * len(codec.encode(elements))
