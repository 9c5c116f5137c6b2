"""What a number can be: grids, blocks, formats, and the codes of a tensor."""

from lowbit.numerics.encode import decode_rows, encode_rows, fake_quantize_rows
from lowbit.numerics.fitted import Bases, KMeans, Piecewise
from lowbit.numerics.formats import FORMATS, INT8, UINT8, Format, fixed_point
from lowbit.numerics.grids import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    AdditivePow2,
    Codebook,
    Fitted,
    Float,
    Grid,
    Int,
    Pow2,
    SignedPow2,
    is_fitted,
)
from lowbit.numerics.qtensor import QuantTensor
from lowbit.numerics.quantize import (
    Error,
    measure,
    quantize,
    scale_and_zero,
)
from lowbit.numerics.roundings import Rounding, parse_rounding, stochastic
from lowbit.numerics.rows import ELEMENT, TENSOR, WHOLE, Block, channel, from_rows, group, tile, to_rows
from lowbit.numerics.words import describe_format, parse_format, spell_format
