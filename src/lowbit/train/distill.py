"""What a compressed network is trained for: its labels, and agreement with the float network that it came from.

Source: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531): cross-entropy to the teacher's softened classes, times the
temperature squared. Outputs that are not class scores are held to the teacher's by their relative squared error.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.train.samples import Samples

PASS_SAMPLES = 256
"""Samples of one forward pass of the teacher."""


@dataclass(frozen=True)
class Task:
    """A loss for outputs.

    teacher      the float network; forward gives {output: tensor}
    answers      output → (samples, …) the teacher's answers to all samples, None where samples are augmented
    scores       the output that holds class scores (…, classes); "" if there is none
    probability  scores are probabilities, not logits
    distill      share of agreement with the teacher; the rest is for the labels
    """

    teacher: nn.Module
    answers: Mapping[str, Tensor]
    scores: str
    probability: bool
    distill: float
    temperature: float

    @staticmethod
    def of(teacher: nn.Module, samples: Samples, distill: float, temperature: float) -> "Task":
        """Ask the teacher for its answers to all samples."""
        parts: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for inputs in samples.parts(PASS_SAMPLES, len(samples)):
                for name, output in teacher(*inputs).items():
                    parts.setdefault(name, []).append(output)
        answers = {name: torch.cat(outputs) for name, outputs in parts.items() if outputs[0].is_floating_point()}
        scores = next((name for name, a in answers.items() if a.dim() == 2 and a.shape[1] > 1), "")
        if samples.labels is not None:
            scores = _output_of(samples.labels, answers)
        probability = bool(scores) and _are_probabilities(answers[scores])
        share = distill if samples.labels is not None else 1.0
        return Task(teacher, answers, scores, probability, share, temperature)

    def loss(self, outputs: Mapping[str, Tensor], part: Samples, rows: Tensor | None) -> Tensor:
        """Mean loss of a batch; `rows` are its samples' places among all, None where they were augmented."""
        if rows is not None:
            wanted = {name: answer[rows] for name, answer in self.answers.items()}
        else:
            with torch.no_grad():
                wanted = self.teacher(*part.inputs)
        total = torch.zeros(())
        if self.distill < 1 and part.labels is not None:
            shares = self._log_shares(outputs[self.scores]).flatten(0, -2)
            total = total + (1 - self.distill) * functional.nll_loss(shares, part.labels.long().flatten())
        if self.distill > 0:
            for name in self.answers:
                total = total + self.distill * self._agreement(name, outputs[name], wanted[name])
        return total

    def _log_shares(self, scores: Tensor) -> Tensor:
        return scores.clamp_min(1e-12).log() if self.probability else functional.log_softmax(scores, dim=-1)

    def _agreement(self, name: str, output: Tensor, wanted: Tensor) -> Tensor:
        if name != self.scores:
            power = wanted.square().mean().clamp_min(1e-12)
            return (output - wanted).square().mean() / power
        t = self.temperature
        student = functional.log_softmax(self._log_shares(output) / t, dim=-1).flatten(0, -2)
        teacher = functional.log_softmax(self._log_shares(wanted) / t, dim=-1).flatten(0, -2)
        return t * t * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def _output_of(labels: Tensor, answers: Mapping[str, Tensor]) -> str:
    """The output that has a row of class scores for every label."""
    for name, answer in answers.items():
        if answer.dim() > 1 and answer.shape[:-1] == labels.shape and answer.shape[-1] > 1:
            if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= answer.shape[-1]:
                worst = labels.max() if labels.max() >= answer.shape[-1] else labels.min()
                raise DataError(f"label {worst.item():g} has no class: '{name}' has {answer.shape[-1]} classes.")
            return name
    shapes = ", ".join(f"'{name}' {list(answer.shape)}" for name, answer in answers.items())
    raise DataError(
        f"labels of shape {list(labels.shape)} are not classes of an output (…, classes); outputs are {shapes}. "
        "Leave the labels out to train for agreement with the float network."
    )


def _are_probabilities(scores: Tensor) -> bool:
    return bool((scores >= 0).all()) and bool(((scores.sum(dim=-1) - 1).abs() < 1e-3).all())
