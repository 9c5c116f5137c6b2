"""lowbit: quantize a trained network to few bits, and prove on the deployed file that it still does its job."""

import ast
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names. The type checker reads them here, and so does `_homes` below, which imports each when it is first
# asked for: `import lowbit` itself takes no torch and no onnxruntime.
if TYPE_CHECKING:
    from lowbit.data import Data as Data
    from lowbit.data import Preprocessing as Preprocessing
    from lowbit.errors import LowbitError as LowbitError
    from lowbit.flows.budget import mixed_precision as mixed_precision
    from lowbit.flows.compare import Comparison as Comparison
    from lowbit.flows.compare import compare as compare
    from lowbit.flows.compress import compress as compress
    from lowbit.flows.compress import compress_tensors as compress_tensors
    from lowbit.flows.diagnose import diagnose as diagnose
    from lowbit.flows.diagnosis import Diagnosis as Diagnosis
    from lowbit.flows.evaluate import evaluate as evaluate
    from lowbit.flows.prepare import convert as convert
    from lowbit.flows.prepare import prepare as prepare
    from lowbit.flows.prepared import Prepared as Prepared
    from lowbit.flows.prices import Sensitivity as Sensitivity
    from lowbit.flows.prices import sensitivity as sensitivity
    from lowbit.flows.ptq import quantize as quantize
    from lowbit.flows.ptq import simulation as simulation
    from lowbit.flows.search import Search as Search
    from lowbit.flows.search import search as search
    from lowbit.flows.shrink import shrink as shrink
    from lowbit.flows.train import train as train
    from lowbit.model import Model as Model
    from lowbit.model import load as load
    from lowbit.numerics import E2M1 as E2M1
    from lowbit.numerics import E2M3 as E2M3
    from lowbit.numerics import E3M2 as E3M2
    from lowbit.numerics import E4M3 as E4M3
    from lowbit.numerics import E5M2 as E5M2
    from lowbit.numerics import E8M0 as E8M0
    from lowbit.numerics import ELEMENT as ELEMENT
    from lowbit.numerics import FORMATS as FORMATS
    from lowbit.numerics import TENSOR as TENSOR
    from lowbit.numerics import AdditivePow2 as AdditivePow2
    from lowbit.numerics import Bases as Bases
    from lowbit.numerics import Codebook as Codebook
    from lowbit.numerics import Float as Float
    from lowbit.numerics import Format as Format
    from lowbit.numerics import Int as Int
    from lowbit.numerics import KMeans as KMeans
    from lowbit.numerics import Piecewise as Piecewise
    from lowbit.numerics import Pow2 as Pow2
    from lowbit.numerics import QuantTensor as QuantTensor
    from lowbit.numerics import SignedPow2 as SignedPow2
    from lowbit.numerics import channel as channel
    from lowbit.numerics import group as group
    from lowbit.numerics import parse_format as parse_format
    from lowbit.numerics import stochastic as stochastic
    from lowbit.numerics import tile as tile
    from lowbit.presets import RECIPES as RECIPES
    from lowbit.ranges import ACIQ as ACIQ
    from lowbit.ranges import MSE as MSE
    from lowbit.ranges import OCTAV as OCTAV
    from lowbit.ranges import RANGES as RANGES
    from lowbit.ranges import Auto as Auto
    from lowbit.ranges import Entropy as Entropy
    from lowbit.ranges import Histogram as Histogram
    from lowbit.ranges import MeanStd as MeanStd
    from lowbit.ranges import MinMax as MinMax
    from lowbit.ranges import MovingAverage as MovingAverage
    from lowbit.ranges import Percentile as Percentile
    from lowbit.ranges import error as error
    from lowbit.ranges import parse_range as parse_range
    from lowbit.ranges import quantize_tensor as quantize_tensor
    from lowbit.recipe import FLOAT as FLOAT
    from lowbit.recipe import Recipe as Recipe
    from lowbit.recipe import Rule as Rule
    from lowbit.recipe import TensorSpec as TensorSpec
    from lowbit.solve.prune import Pruning as Pruning
    from lowbit.storage.container import pack as pack
    from lowbit.storage.container import unpack as unpack
    from lowbit.storage.inspect import inspect as inspect
    from lowbit.storage.inspect import read_tensor as read_tensor
    from lowbit.targets import TARGETS as TARGETS
    from lowbit.targets import Target as Target
    from lowbit.training.schedule import Schedule as Schedule


def _homes(source: str) -> dict[str, str]:
    """Public name → the module that it is imported from, read off the block of imports above."""
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOME_OF = _homes(__loader__.get_source(__name__))  # type: ignore[name-defined]  # also out of a zip
__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'lowbit' has no attribute '{name}'. Public names are: {', '.join(sorted(_HOME_OF))}.")


def __dir__() -> list[str]:
    return sorted(__all__)
