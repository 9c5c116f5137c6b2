"""Labelled samples that a network is judged on while it trains."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit import processes
from lowbit.data import Data
from lowbit.errors import InputError
from lowbit.flows.metrics import Metric, metric_of

BATCH = 256  # samples at a time


@dataclass
class Watched:
    """The samples and what they are judged by."""

    data: Data
    metric: Metric

    @staticmethod
    def of(data: Data, metric: Any) -> "Watched":
        return Watched(data, metric_of("top1" if metric is None else metric))

    @torch.no_grad()
    def value(self, module: nn.Module) -> float:
        """Of the module as it is now, in float32; of several processes each takes some of the batches."""
        training, device = module.training, next(p.device for p in module.parameters())
        module.eval()
        mine = {}
        for number, (inputs, labels) in enumerate(self.data.batches(BATCH)):
            if number % processes.count() != processes.number():
                continue
            outputs = module(*(torch.from_numpy(x).to(device) for x in inputs.values()))
            if labels is None:
                raise InputError(f"the test data has no labels, and the metric '{self.metric.name}' needs them.")
            mine[number] = self.metric.rows({name: x.float().cpu().numpy() for name, x in outputs.items()}, labels)
        module.train(training)
        everyone = {number: rows for one in processes.gathered(mine) for number, rows in one.items()}
        return self.metric.total([everyone[number] for number in sorted(everyone)])

    def better(self, one: float, than: float) -> bool:
        return one > than if self.metric.better == "higher" else one < than
