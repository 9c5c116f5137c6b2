"""What a search has tried: one row each, kept beside the output with the best file, so that it can go on later.

`<output>.tries.json` holds the rows, and digests of all that they depend on: network, data, metric, lowbit's version.
Both files are written aside and renamed, so that a killed search loses no more than the try that it was at.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.flows.judge import Judge, Measured, digest
from lowbit.model import Model
from lowbit.recipe import Recipe
from lowbit.storage.atomic import write_bytes

PREFER = ("bytes", "latency")
Save = Callable[[Model, Path], int]
Make = Callable[[Recipe], tuple[Model, float]]  # a file, and its outputs' signal-to-noise ratio in dB


@dataclass(frozen=True)
class Try:
    """A recipe that was tried.

    recipe     as TOML; empty for the float network
    sqnr_db    of the outputs, on calibration samples that nothing was fitted to: steadier than a metric
    measured   None where there is no file; failed then says why
    """

    what: str
    recipe: str
    seconds: float
    sqnr_db: float = 0.0
    measured: Measured | None = None
    failed: str = ""

    @property
    def drop(self) -> float:
        """Points that the metric dropped by; infinite where there is no number."""
        found = inf if self.measured is None else self.measured.drop
        return found if isfinite(found) else inf

    def reaches(self, max_drop: float) -> bool:
        """Whether it drops by no more."""
        return self.drop <= max_drop + 1e-9

    @staticmethod
    def of(row: Mapping[str, object]) -> "Try":
        """Read what `asdict` wrote."""
        measured = row.get("measured")
        given = {**row, "measured": Measured(**measured) if isinstance(measured, dict) else None}
        return Try(**given)  # type: ignore[arg-type]


@dataclass
class Tries:
    """The tries so far, the best of them, and the file that it made.

    output   where the best file lies
    made     the recipe of the file that lies there
    """

    judge: Judge
    key: dict[str, str]
    max_drop: float
    prefer: str
    output: Path
    save: Save = Model.save
    rows: list[Try] = field(default_factory=list)
    made: str = ""

    def __post_init__(self) -> None:
        self.state = self.output.with_name(self.output.name + ".tries.json")
        if self.state.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.state.read_text(encoding="utf-8"))
            rows, key = [Try.of(row) for row in found["tries"]], found["of"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"'{self.state}' cannot be read ({error}): the search starts anew.", stacklevel=5)
            return
        if other := [name for name, value in self.key.items() if key.get(name) != value]:
            told = f"'{self.state}' is of another {', '.join(other)}: the search starts anew."
            warnings.warn(told, stacklevel=5)
            return
        self.rows = rows
        if self.output.exists() and digest(self.output.read_bytes()).hex() == found["file"]:
            self.made = found["made"]

    def known(self, recipe: Recipe) -> Try | None:
        """The row of a recipe that was tried before."""
        return next((row for row in self.rows if row.recipe == recipe.to_toml()), None)

    def attempt(self, what: str, recipe: Recipe, make: Make) -> Try:
        """Make a file of this recipe and measure it, unless that was done; keep it where it is the best so far."""
        if (known := self.known(recipe)) is not None:
            return known
        start, row = time.perf_counter(), Try(what, recipe.to_toml(), 0.0)
        try:
            model, db = make(recipe)
            with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
                self.save(model, aside := Path(folder) / self.output.name)
                row = replace(row, sqnr_db=db, measured=self.judge.measure(aside))
                if not isfinite(row.drop):
                    row = replace(row, failed=f"{self.judge.metric.name} is no number")
        except LowbitError as error:  # what this recipe cannot do another may
            row = replace(row, failed=str(error))
        row = replace(row, seconds=time.perf_counter() - start)
        self.rows.append(row)
        if row.measured is not None and self.best() is row:
            self.save(model, self.output)
            self.made = row.recipe
        self._write()
        return row

    def best(self) -> Try | None:
        """Of those that reach the drop the smallest, or fastest; else the one that drops least."""
        files = [row for row in self.rows if row.measured is not None]
        good = [row for row in files if row.reaches(self.max_drop)]
        return min(good, key=self._cost) if good else min(files, key=lambda row: row.drop, default=None)

    def _cost(self, row: Try) -> tuple[float, float]:
        assert row.measured is not None
        by = row.measured.bytes if self.prefer == "bytes" else 1 / row.measured.times_faster
        return by, row.drop

    def keep(self, make: Make) -> Try:
        """The best row. Its file is made again, and measured, where another lies in its place."""
        best = self.best()
        assert best is not None
        if self.made != best.recipe:
            self.save(make(Recipe.from_toml(best.recipe))[0], self.output)
            self.made = best.recipe
            again = replace(best, measured=self.judge.measure(self.output))
            self.rows[self.rows.index(best)] = best = again
            self._write()
        return best

    def _write(self) -> None:
        file = digest(self.output.read_bytes()).hex() if self.output.exists() else ""
        found = {"of": self.key, "made": self.made, "file": file, "tries": [asdict(row) for row in self.rows]}
        write_bytes(self.state, json.dumps(found, indent=1).encode())
