"""What a compressed network is trained for: its labels, and agreement with the float network that it came from.

Source: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531): cross-entropy to the teacher's softened classes, times the
temperature squared. Outputs that are not class scores are held to the teacher's by their relative squared error.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.classes import are_probabilities, output_of_classes
from lowbit.training.samples import MEMORY, Samples

PASS_SAMPLES = 256
"""Samples of one forward pass of the teacher."""


@dataclass(frozen=True)
class Task:
    """A loss for outputs.

    teacher      the float network; forward gives {output: tensor}
    names        outputs that are of floating point: what the network is held to
    answers      output → (samples, …) the teacher's answers to all samples; None: it is asked at each batch
    scores       the output that holds class scores; "" if there is none
    axis         its axis of classes
    probability  scores are probabilities, not logits
    distill      share of agreement with the teacher; the rest is for the labels
    """

    teacher: nn.Module
    names: tuple[str, ...]
    answers: Mapping[str, Tensor] | None
    scores: str
    axis: int
    probability: bool
    distill: float
    temperature: float

    @staticmethod
    def of(teacher: nn.Module, samples: Samples, distill: float, temperature: float, keep: bool = True) -> "Task":
        """Ask the teacher for its answers to all samples, to keep them, or to a few to see what they are.

        Answers that would take more than MEMORY are not kept.
        """
        parts: dict[str, list[Tensor]] = {}
        device = next((p.device for p in teacher.parameters()), None)
        with torch.no_grad():
            for inputs in samples.parts(PASS_SAMPLES, len(samples) if keep else PASS_SAMPLES):
                for name, output in teacher(*(x.to(device) for x in inputs)).items():
                    parts.setdefault(name, []).append(output.cpu())
                held = sum(sum(output.nbytes for output in outputs) for outputs in parts.values())
                if held > MEMORY:
                    keep = False
                    break
        answers = {name: torch.cat(outputs) for name, outputs in parts.items() if outputs[0].is_floating_point()}
        scores = next((name for name, a in answers.items() if a.dim() == 2 and a.shape[1] > 1), "")
        axis = -1
        if samples.labels is not None:
            seen, count = len(next(iter(answers.values()), ())), len(samples)
            shapes = {name: (count, *a.shape[1:]) for name, a in answers.items() if a.dim() and len(a) == seen}
            instead = "Leave them out to train for agreement with the float network."
            scores, axis = output_of_classes(samples.labels.numpy(), shapes, instead)
        probability = bool(scores) and are_probabilities(answers[scores], axis)
        share = distill if samples.labels is not None else 1.0
        return Task(teacher, tuple(answers), answers if keep else None, scores, axis, probability, share, temperature)

    def loss(self, outputs: Mapping[str, Tensor], part: Samples, rows: Tensor | None) -> Tensor:
        """Mean loss of a batch; `rows` are its samples' places among all, None where they were augmented."""
        total = torch.zeros((), device=part.inputs[0].device)
        if self.distill < 1 and part.labels is not None:
            shares = self._log_shares(outputs[self.scores].float())
            total = total + (1 - self.distill) * functional.nll_loss(shares, part.labels.long().flatten())
        if self.distill > 0:
            wanted = self._wanted(part, rows)
            for name in self.names:
                agreement = self._agreement(name, outputs[name].float(), wanted[name].float())
                total = total + self.distill * agreement
        return total

    def _wanted(self, part: Samples, rows: Tensor | None) -> Mapping[str, Tensor]:
        """What the teacher says of a batch."""
        if rows is not None and self.answers is not None:
            return {name: answer[rows].to(part.inputs[0].device) for name, answer in self.answers.items()}
        with torch.no_grad():
            said: Mapping[str, Tensor] = self.teacher(*part.inputs)
        return said

    def _log_shares(self, scores: Tensor) -> Tensor:
        """(answers, classes): logarithms of what each answer gives to each class."""
        rows = scores.movedim(self.axis, -1).flatten(0, -2)
        return rows.clamp_min(1e-12).log() if self.probability else functional.log_softmax(rows, dim=-1)

    def _agreement(self, name: str, output: Tensor, wanted: Tensor) -> Tensor:
        if name != self.scores:
            power = wanted.square().mean().clamp_min(1e-12)
            return (output - wanted).square().mean() / power
        t = self.temperature
        student, teacher = (functional.log_softmax(self._log_shares(y) / t, dim=-1) for y in (output, wanted))
        return t * t * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
