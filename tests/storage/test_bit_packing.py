import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import InputError
from lowbit.storage.bits import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", range(1, 17))
def test_unpack_undoes_pack_at_every_width_and_length(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for count in (0, 1, 2, 7, 8, 9, 63, 1000):
        codes = rng.integers(0, 2**bits, count).astype(np.uint16)
        packed = pack(codes, bits)
        assert packed.size == packed_bytes(count, bits) == -(-count * bits // 8)
        assert np.array_equal(unpack(packed, bits, count), codes)


@given(st.integers(1, 16).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1)))))
def test_unpack_undoes_pack(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    assert unpack(pack(np.array(codes, np.uint16), bits), bits, len(codes)).tolist() == codes


def test_four_bit_codes_lie_as_onnx_keeps_them() -> None:
    assert pack(np.array([0x1, 0x2, 0x3]), 4).tolist() == [0x21, 0x03]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="from 0 to 15; these go from 3 to 16"):
        pack(np.array([3, 16]), 4)
    with pytest.raises(InputError, match="1 to 16 bits, not 17"):
        pack(np.array([3]), 17)
    with pytest.raises(InputError, match="take 2 bytes; 1 were given"):
        unpack(np.zeros(1, np.uint8), 4, 3)
