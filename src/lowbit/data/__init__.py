"""Calibration and evaluation data: anything that holds samples, in the shape that a network takes them.

Other folders import `Data` and `Preprocessing` from here, and the batches that Data gives from `samples`.
"""

from lowbit.data.dataset import Data
from lowbit.data.preprocess import Preprocessing

__all__ = ["Data", "Preprocessing"]
