"""A diagnosis: where the error of a quantized network arises, why, and what to do, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from json import dumps
from typing import TYPE_CHECKING, Any

from lowbit.engines.profile import OperatorTime
from lowbit.flows.causes import Finding
from lowbit.flows.compare import Comparison
from lowbit.flows.operations import Operations
from lowbit.flows.tensor_facts import TensorFacts
from lowbit.report.words import plain, share_text

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerRow:
    """A node that has a quantized weight, makes a quantized value, or multiplies.

    name            what a rule calls it
    weight, activation   names of its tensors; an activation that shares another's scale goes by that one's name
    accumulated_db  SQNR of what it makes in the file, errors of all layers before it included
    multiply_adds   of one sample
    bits            of the weights and activations that it multiplies as integers; None: it computes in float
    reason          why it computes in float, where anything is known of that
    """

    name: str
    node: str
    operator: str
    weight: str | None
    activation: str | None
    accumulated_db: float | None
    multiply_adds: int
    bits: tuple[int, int] | None
    reason: str


@dataclass(frozen=True)
class Shifted:
    """Both networks on shifted samples; `problem` says why there is no comparison."""

    shift: str
    told: Comparison | None
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Where the error arises, why, what to do, and what it is worth.

    recipe       TOML of what was done; the lines of a remedy go behind it
    comparison   float beside the file, on the test data, or where there is none on the calibration data
    tensors      of the layers, in the network's order
    findings     causes, the most costly first
    measured_db  SQNR of the outputs, simulated on the judging samples; estimated_db: what the tensors' costs add up to
    operations, times   float, quantized
    tries        rows of a search, as they were given
    """

    source: str
    recipe_name: str
    recipe: str
    samples: int
    on_test_data: bool
    comparison: Comparison
    layers: tuple[LayerRow, ...]
    tensors: tuple[TensorFacts, ...]
    findings: tuple[Finding, ...]
    measured_db: float
    estimated_db: float
    shifts: tuple[Shifted, ...]
    operations: tuple[Operations, Operations]
    times: tuple[tuple[OperatorTime, ...], tuple[OperatorTime, ...]]
    bytes_by_kind: Mapping[str, int]
    left_in_float: tuple[Mapping[str, Any], ...]
    steps: tuple[str, ...]
    tries: tuple[Mapping[str, Any], ...]

    @property
    def verdict(self) -> str:
        """Whether it keeps the job, and what costs most: plain sentences with numbers."""
        return f"{self.comparison.verdict} {self.main}"

    @property
    def main(self) -> str:
        """What costs most, in a sentence."""
        first = next((f for f in self.findings if f.share or f.cause == "preprocessing"), None)
        if first is None:
            return "No single cause stands out."
        if first.share is None:
            return f"First of all, {first.told}."
        where = f" of '{first.tensors[0]}'" + " and others" * (len(first.tensors) > 1) if first.tensors else ""
        return f"The largest cause is {first.cause}{where}: {share_text(first.share)} of the error."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found: dict[str, Any] = plain(asdict(self))
        found["comparison"] = self.comparison.to_dict()
        found["shifts"] = [plain(asdict(s)) | {"told": s.told and s.told.to_dict()} for s in self.shifts]
        for row, x in zip(found["tensors"], self.tensors, strict=True):
            row |= plain({"alone_db": x.alone_db, "tail": x.tail})
        return {"verdict": self.verdict} | found

    def to_json(self) -> str:
        return dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs no network."""
        from lowbit.report.diagnosis import page

        return page(self)

    def __rich__(self) -> "RenderableType":
        from lowbit.report.diagnosis import summary

        return summary(self)
