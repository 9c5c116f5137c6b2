"""LQ-Nets: a weight as sums of ± the factors of a basis, which is solved by least squares at each step of training.

Source: Zhang et al. 2018 (LQ-Nets, arXiv 1807.10029), algorithm 1 (QEM): nearest codes, then the basis of least squared
error for them, v = (B Bᵀ)⁻¹ B w; the basis follows by a moving average. The gradient reaches the weight
straight through. One basis for each tile of the format, `bases2` for two bits.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.errors import UnsupportedError
from lowbit.network.straight_through import straight_through
from lowbit.numerics import Bases, QuantTensor, decode_rows, describe_format, encode_rows
from lowbit.numerics.rows import from_rows, tiles_to_rows

FOLLOWS = 0.1  # of the solved basis in each step's average; 0.9 stays
FIRST_STEPS = 20  # of the same algorithm before training, each taken whole
RIDGE = 1e-6  # of the number of values: codes that are not used leave the equations singular


class LearnedBases(nn.Module):
    """A weight on the grid `Bases`.

    factors  (n_blocks, count), sorted downwards
    scale    ones for each tile: its table holds the values themselves
    """

    factors: Tensor
    scale: Tensor
    signs: Tensor

    def __init__(self, template: QuantTensor, weight: Tensor) -> None:
        super().__init__()
        self.grid = template.format.grid
        if not isinstance(self.grid, Bases):
            raise UnsupportedError(
                f"range 'lqnets' is for weights on sums of bases, and this one is in "
                f"'{describe_format(template.format)}'. Use 'bases2' for two bits, 'bases4' for four."
            )
        self.template, count = template, self.grid.count
        codes = torch.arange(1 << count)[:, None] >> torch.arange(count)
        self.register_buffer("signs", 1.0 - 2.0 * (codes & 1))  # (n_codes, count)
        rows = tiles_to_rows(weight.detach().float(), template.tile)
        start = rows.abs().mean(1, keepdim=True) * 0.5 ** torch.arange(count)
        self.register_buffer("factors", start)
        self.register_buffer("scale", start.new_ones(template.tiles), persistent=False)
        for _ in range(FIRST_STEPS):
            self._follow(rows, 1.0)

    def _table(self) -> tuple[Tensor, Tensor]:
        """Sorted sums of each row, (n_blocks, n_codes), and the signs that make them."""
        table, order = (self.factors @ self.signs.T).sort(dim=1, stable=True)
        return table, self.signs[order]

    def _codes(self, rows: Tensor, table: Tensor) -> Tensor:
        one = rows.new_ones(1, 1)
        return encode_rows(rows, one, one * 0, self.template.format.grid, table=table)

    @torch.no_grad()
    def _follow(self, rows: Tensor, share: float) -> None:
        """Move the basis to that of least squares for the nearest codes."""
        table, signs = self._table()
        positions = self._codes(rows, table).long()
        used = signs.gather(1, positions[:, :, None].expand(-1, -1, signs.shape[2]))  # (n_blocks, n, count)
        normal = used.mT @ used + RIDGE * rows.shape[1] * torch.eye(signs.shape[2], device=rows.device)
        solved = torch.linalg.solve(normal, used.mT @ rows[:, :, None])[:, :, 0]
        solved = solved.abs().sort(dim=1, descending=True).values  # a factor's sign only renames codes
        self.factors.lerp_(solved, share)

    def forward(self, weight: Tensor) -> Tensor:
        rows = tiles_to_rows(weight.float(), self.template.tile)
        if self.training and torch.is_grad_enabled():
            self._follow(rows.detach(), FOLLOWS)
        table, _ = self._table()
        one = rows.new_ones(1, 1)
        values = decode_rows(self._codes(rows.detach(), table), one, one * 0, self.template.format.grid, table)
        return from_rows(straight_through(rows, values), tuple(weight.shape), self.template.tile).to(weight.dtype)

    @torch.no_grad()
    def stored(self, weight: Tensor) -> QuantTensor:
        """The codes and the table of a weight: decoded, they are what `forward` gives."""
        rows, (table, _) = tiles_to_rows(weight.float(), self.template.tile), self._table()
        codes = from_rows(self._codes(rows, table), tuple(weight.shape), self.template.tile)
        return replace(self.template, codes=codes, table=table)

    def penalty(self) -> Tensor:
        return self.factors.new_zeros(())
