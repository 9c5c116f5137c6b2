"""torch's LSTM with `proj_size` as an LSTM without: ONNX has no operator that projects the states. Exact but for sums.

    h = P s, s = o · tanh(c)        gates = W x + R h + b = W x + (R P) s + b

So R P is the recurrent weight of an LSTM whose states are s, and h is a product behind it. First states h need s with
P s = h: the pseudoinverse of P gives one, as long as P has full rank. R P has hidden / proj_size times the values of R.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowbit.errors import UnsupportedError

States = tuple[Tensor, Tensor]


class Unprojected(nn.Module):
    """Takes the inputs of an LSTM with `proj_size` and gives its outputs, in eval mode."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        for key in nn.LSTM.__constants__:  # a module around it may read them
            setattr(self, key, getattr(lstm, key))
        self.directions = ("", "_reverse") if lstm.bidirectional else ("",)
        self.layers, self.projections = nn.ModuleList(), nn.ModuleList()
        self.begins: list[bool] = []  # whether each projection can give the first states
        for index in range(lstm.num_layers):
            width = lstm.input_size if index == 0 else lstm.proj_size * len(self.directions)
            layer = nn.LSTM(
                width, lstm.hidden_size, bias=lstm.bias, batch_first=lstm.batch_first, bidirectional=lstm.bidirectional
            )
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    parameter.copy_(_merged(lstm, name.replace("_l0", f"_l{index}")))
            self.layers.append(layer)
            for direction in self.directions:
                p = getattr(lstm, f"weight_hr_l{index}{direction}").detach()  # (projected, hidden)
                projection = nn.Linear(lstm.hidden_size, lstm.proj_size, bias=False)
                projection.weight = nn.Parameter(p.clone())
                projection.register_buffer("inverse", torch.linalg.pinv(p), persistent=False)
                self.begins.append(int(torch.linalg.matrix_rank(p)) == lstm.proj_size)
                self.projections.append(projection)

    def forward(self, x: Tensor, hx: States | None = None) -> tuple[Tensor, States]:
        count, last = len(self.directions), list[States]()
        for index, layer in enumerate(self.layers):
            own = self.projections[index * count : (index + 1) * count]
            y, (s, c) = layer(x) if hx is None else layer(x, self._first(*hx, index))
            parts = y.chunk(count, -1) if count > 1 else [y]
            x = torch.cat([project(part) for project, part in zip(own, parts, strict=True)], -1)
            last.append((torch.stack([project(s[d]) for d, project in enumerate(own)]), c))
        h, c = (torch.cat(states) for states in zip(*last, strict=True))
        return x, (h, c)

    def _first(self, h: Tensor, c: Tensor, index: int) -> States:
        """The states of one layer before its first step."""
        count = len(self.directions)
        part, found = slice(index * count, (index + 1) * count), list[Tensor]()
        for state, projection, begins in zip(h[part], self.projections[part], self.begins[part], strict=True):
            if not begins:
                raise UnsupportedError(
                    f"weight_hr of layer {index} has less than full rank: ONNX's LSTM cannot begin with first states "
                    "of its projection. Leave the first states out, or train the projection further."
                )
            found.append(state @ projection.inverse.T)
        return torch.stack(found), c[part]


def _merged(lstm: nn.LSTM, name: str) -> Tensor:
    """A parameter; R times the projection of its layer and direction."""
    held: Tensor = getattr(lstm, name).detach()
    return held @ getattr(lstm, name.replace("_hh_", "_hr_")).detach() if "weight_hh" in name else held


@contextlib.contextmanager
def without_projections(module: nn.Module) -> Iterator[nn.Module]:
    """The module with every LSTM that projects its states replaced; afterwards it is as it was."""
    places = [
        (parent, name, layer)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.LSTM) and layer.proj_size
    ]
    if isinstance(module, nn.LSTM) and module.proj_size:
        yield Unprojected(module)
        return
    made = {id(layer): Unprojected(layer) for _, _, layer in places}
    try:
        for parent, name, layer in places:
            setattr(parent, name, made[id(layer)])
        yield module
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
