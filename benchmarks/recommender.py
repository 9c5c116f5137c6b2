"""A click model of DLRM's shape, trained here, with its tables in few bits. `python -m benchmarks.recommender`

The data is generated in Criteo's layout: a label, 13 counts with gaps, 26 categories as 32-bit hashes. The truth behind
it is a sum of effects of each category and products of hidden vectors, and nobody reads Criteo's files. 26 tables of
100,000 × 16 and two MLPs learn it, one epoch. Then the tables go to few bits and the MLPs to int8.

Source of the network: Naumov et al. 2019 (arXiv 1906.00091).
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import lowbit as lb
from benchmarks.tables import show
from benchmarks.timing import alternating
from lowbit.engines.compile import ENGINES
from lowbit.presets import find_recipe
from lowbit.recipe import Recipe, Rule, TensorSpec

COUNTS, TABLES, ROWS, COLUMNS = 13, 26, 100_000, 16
VALUES = np.geomspace(4, 300_000, TABLES).astype(int)  # of each category
HIDDEN = 4  # numbers of a category's hidden vector
BATCH = 1024
PACKED = "channel:0 scale:uint8 scale_tensor"
FORMATS = ("int8 channel:0", "int4 channel:0", f"int8 {PACKED}", f"int4 {PACKED}", f"int2 {PACKED}")
SIZES = (1, 128, 2048)  # lookups of each table at a time


@dataclass(frozen=True)
class Clicks:
    """Rows of Criteo's layout.

    labels       (n,) 1 = clicked
    counts       (n, 13) float32, NaN where there is a gap
    categories   (n, 26) int64, hashes of 32 bits; 0 where there is a gap
    """

    labels: NDArray[np.int64]
    counts: NDArray[np.float32]
    categories: NDArray[np.int64]

    def inputs(self) -> dict[str, NDArray[Any]]:
        """What the network reads: log(1 + count), and the row of each category in its table."""
        counts = np.log1p(np.nan_to_num(self.counts).clip(0))
        return {"counts": counts.astype(np.float32), "ids": self.categories % ROWS}


def clicks(count: int, seed: int) -> Clicks:
    """Generated rows; the truth behind them is the same for every seed."""
    truth, draw = np.random.default_rng(0), np.random.default_rng(seed)
    ranks = (VALUES ** draw.random((count, TABLES))).astype(np.int64)  # the n-th value is met 1/n as often as the first
    counts = np.exp(draw.normal(1.5, 1.5, (count, COUNTS))).astype(np.int64).astype(np.float32)
    logit = -1.6 + np.log1p(counts) @ truth.normal(0, 0.1, COUNTS)
    hidden = np.zeros((count, HIDDEN))
    for k, values in enumerate(VALUES):
        logit += truth.normal(0, 0.25, values + 1)[ranks[:, k]]
        vectors = truth.normal(0, 0.3, (values + 1, HIDDEN))[ranks[:, k]]
        logit += (vectors * hidden).sum(1) if k % 2 else 0.0
        hidden = vectors
    labels = (draw.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64)
    counts[draw.random(counts.shape) < 0.2] = np.nan
    hashes = (ranks * 2654435761 + np.arange(1, TABLES + 1) * 40503) % (1 << 32)
    return Clicks(labels, counts, np.where(draw.random(hashes.shape) < 0.05, 0, hashes))


class Tables(nn.Module):
    """ids (n, 26) → rows (n, 26, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, COLUMNS, sparse=True) for _ in range(TABLES))
        for table in self.tables:
            nn.init.uniform_(table.get_parameter("weight"), -0.05, 0.05)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[:, k]) for k, table in enumerate(self.tables)], 1)


class Pooled(nn.Module):
    """ids (n, 26) → the sum of their rows (n, 16): lookups with a reader behind them, as every network has one."""

    def __init__(self, rows: Tables) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids).sum(1)  # type: ignore[no-any-return]


class ClickModel(nn.Module):
    """counts (n, 13), ids (n, 26) → logit (n,): products of all pairs of vectors go to the upper MLP."""

    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        pairs = TABLES * (TABLES + 1) // 2
        self.lower = nn.Sequential(nn.Linear(COUNTS, 64), nn.ReLU(), nn.Linear(64, COLUMNS), nn.ReLU())
        self.rows = Tables()
        self.upper = nn.Sequential(
            nn.Linear(COLUMNS + pairs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
        )
        place = torch.tril_indices(TABLES + 1, TABLES + 1, -1)
        self.register_buffer("pairs", place[0] * (TABLES + 1) + place[1])

    def forward(self, counts: Tensor, ids: Tensor) -> Tensor:
        x = self.lower(counts)
        vectors = torch.cat([x[:, None], self.rows(ids)], 1)
        products = (vectors @ vectors.mT).flatten(1)[:, self.pairs]
        logit: Tensor = self.upper(torch.cat([x, products], 1))
        return logit[:, 0]


def trained(data: Clicks) -> ClickModel:
    """One epoch of Adam, on one thread about a minute for 400,000 rows."""
    torch.manual_seed(0)
    model = ClickModel()
    dense = [p for name, p in model.named_parameters() if not name.startswith("rows")]
    steps = [torch.optim.Adam(dense, 1e-3), torch.optim.SparseAdam(list(model.rows.parameters()), 5e-3)]
    inputs, labels = {k: torch.from_numpy(v) for k, v in data.inputs().items()}, torch.from_numpy(data.labels).float()
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        loss = F.binary_cross_entropy_with_logits(model(**{k: v[part] for k, v in inputs.items()}), labels[part])
        for step in steps:
            step.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for step in steps:
            step.step()
    return model.eval()


def recipe_for(words: str) -> Recipe:
    """int8 in the MLPs, and tables in these words."""
    base = find_recipe("int8")
    return replace(base, rules=(*base.rules, Rule("op:Gather", TensorSpec(words))))


def auc(file: Path, data: Clicks) -> float:
    run = ENGINES["onnxruntime"].compile(file, threads=1)
    inputs = data.inputs()
    parts = [slice(i, i + BATCH) for i in range(0, len(data.labels), BATCH)]
    logits = [next(iter(run({k: v[part] for k, v in inputs.items()}).values())) for part in parts]
    return float(roc_auc_score(data.labels, np.concatenate(logits)))


def whole_model(model: lb.Model, train: Clicks, test: Clicks, folder: Path) -> list[dict[str, Any]]:
    """A row for float and for each format of the tables: AUC of the file in onnxruntime, bytes."""
    path, rows = folder / "clicks.onnx", []
    size = model.save(path)
    exact, whole = auc(path, test), size
    rows.append({"tables": "float", "MLPs": "float", "AUC": exact, "MB": size / 1e6, "of the bytes": 1.0})
    fitted = {k: v[:2000] for k, v in train.inputs().items()}
    for words in FORMATS:
        size = lb.quantize(model, fitted, recipe_for(words)).save(path)
        found = auc(path, test)
        rows.append({"tables": words, "MLPs": "int8", "AUC": found, "MB": size / 1e6, "of the bytes": size / whole})
        rows[-1]["AUC lost"] = exact - found
    return rows


def lookups(model: lb.Model, test: Clicks, folder: Path) -> list[dict[str, Any]]:
    """A row for float and for each format: ms of the lookups, by how many rows of each table are read."""
    ids, runs = test.inputs()["ids"], {}
    for words in ("float", *FORMATS):
        path = folder / "rows.onnx"
        (model if words == "float" else lb.quantize(model, None, words)).save(path)
        runs[words] = ENGINES["onnxruntime"].compile(path, threads=1)
    turns = np.random.default_rng(0)

    def call(words: str, size: int) -> Callable[[], object]:
        return lambda: runs[words]({"ids": ids[(start := int(turns.integers(len(ids) - size))) : start + size]})

    found = {size: alternating({words: call(words, size) for words in runs}) for size in SIZES}
    return [{"tables": words} | {f"ms, {size} rows": found[size][words] for size in SIZES} for words in runs]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000, help="to train with; a quarter as many judge")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    train, test = clicks(options.rows, 1), clicks(options.rows // 4, 2)
    network = trained(train)
    example = tuple(torch.from_numpy(v[:2]) for v in test.inputs().values())
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        rows = whole_model(lb.load(network, example), train, test, Path(folder))
        digits = {"AUC": 5, "AUC lost": 5, "MB": 1, "of the bytes": 3}
        show(f"Click model, {len(test.labels)} rows to judge", rows, options.json, digits)
        rows = lookups(lb.load(Pooled(network.rows), example[1]), test, Path(folder))
        show(
            "Lookups of 26 tables and their sum, one thread, onnxruntime",
            rows,
            options.json,
            {f"ms, {size} rows": 3 for size in SIZES},
        )


if __name__ == "__main__":
    main()
