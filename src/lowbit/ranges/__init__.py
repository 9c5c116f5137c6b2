"""Where to clip: statistics folded from data, and the ranges that read them."""

from lowbit.ranges.analytic import ACIQ
from lowbit.ranges.auto import LOSSES, Auto
from lowbit.ranges.extremes import MeanStd, MinMax, MovingAverage, Percentile, Range
from lowbit.ranges.learned import METHODS, Learned
from lowbit.ranges.parse import RANGES, parse_range, range_words
from lowbit.ranges.search import MSE, OCTAV, Entropy
from lowbit.ranges.statistics import Histogram, RawRows
from lowbit.ranges.tensor import error, quantize_tensor
