"""A group whose input channels can be exchanged: its inverse kept by up- and down-dates.

For the inputs S of a group the tableau ``K = P M_S`` is kept, with P the inverse of H_SS and M the
system [H, T^T] of :class:`~groupconv.optimize.schur.Regression`. Taking channels out and putting
others in changes P and K by products of low rank, and from K follows at once what every possible
exchange of two channels would gain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from groupconv.optimize.schur import Regression

# Replacements evaluated at once: bounds the memory of their blocks.
_CHUNK = 16_384
# Past this share of the channels a fresh inverse costs less than the up- and down-dates.
_REBUILD = 0.3


class Group:
    """The inputs of one group, and the regression of every output on them.

    Args:
        problem: of the layer.
        channels: input channels of the group.
    """

    def __init__(self, problem: Regression, channels: Sequence[int]) -> None:
        self.problem = problem
        self.channels = torch.as_tensor(channels).clone()
        self._build()

    def _build(self) -> None:
        inside = self.problem.rows(self.channels)
        factor = torch.linalg.cholesky(self.problem.h[inside[:, None], inside])
        self.inverse = torch.cholesky_inverse(factor)
        self.tableau = self.inverse @ self.problem.system[inside]

    def explained(self) -> Tensor:
        """``(C_out,)``: what the group's inputs explain of every output."""
        inside = self.problem.rows(self.channels)
        t = self.problem.system[inside, len(self.problem.system) :]
        by_row = (t * self.tableau[:, len(self.problem.system) :]).sum(0)
        return by_row.reshape(self.problem.out_channels, -1).sum(1)

    def exchange(self, places: Sequence[int], entering: Sequence[int]) -> None:
        """Replace the channels at some places of the group by others."""
        if len(places) > _REBUILD * len(self.channels):
            self.channels[list(places)] = torch.as_tensor(entering)
            self._build()
            return
        inverse, tableau = self.inverse, self.tableau
        out = self.problem.rows(places)
        # Take out: afterwards the rows and columns of what left are zero.
        factor = torch.linalg.cholesky(inverse[out[:, None], out])
        column = inverse[:, out]
        tableau -= column @ torch.cholesky_solve(tableau[out], factor)
        inverse -= column @ torch.cholesky_solve(column.T, factor)
        # Put in.
        self.channels[list(places)] = torch.as_tensor(entering)
        inside, new = self.problem.rows(self.channels), self.problem.rows(entering)
        cross = self.problem.h[new[:, None], inside]
        cross[:, out] = 0
        known = tableau[:, new]
        rest = torch.linalg.cholesky(self.problem.h[new[:, None], new] - cross @ known)
        row = torch.cholesky_solve(self.problem.system[new] - cross @ tableau, rest)
        tableau -= known @ row
        tableau[out] = row
        spread = torch.cholesky_solve(known.T, rest)
        inverse += known @ spread
        inverse[out] = -spread
        inverse[:, out] = -spread.T
        inverse[out[:, None], out] = torch.cholesky_inverse(rest)

    def gains(self, outputs: Tensor) -> Tensor:
        """What replacing one channel of the group by one outside adds to the explained variance.

        Args:
            outputs: the output channels of the group.

        Returns:
            ``(channels of the group, C_in)``, exact; minus infinity where the second channel is in
            the group already.
        """
        problem, taps, d = self.problem, self.problem.taps, len(self.problem.system)
        count, inside = len(self.channels), problem.rows(self.channels)
        outside = torch.ones(problem.in_channels, dtype=torch.bool)
        outside[self.channels] = False
        others = torch.arange(problem.in_channels)[outside]
        outer = problem.rows(others)
        of_output = torch.arange(problem.system.shape[1] - d).reshape(problem.out_channels, -1)
        targets = d + of_output[outputs].flatten()

        # With a the channel that leaves: L L^T = P_aa, and rows of the tableau in units of L.
        leave = _unit(_diagonal_blocks(self.inverse, taps))
        shares = self.tableau.reshape(count, taps, -1)
        out_shares = _product(leave, shares[:, :, targets])
        in_shares = _product(leave, shares[:, :, outer])
        # With b the channel that enters: what the group can't predict of it, and of the outputs
        # what is left for it to explain, both in units of the Cholesky factor of the former.
        cross = problem.h[inside[:, None], outer]
        predicted = _column_blocks(cross, taps).mT @ _column_blocks(self.tableau[:, outer], taps)
        blocks = outer.reshape(-1, taps)
        enter = _unit(problem.h[blocks[:, :, None], blocks[:, None]] - predicted)
        left = problem.system[outer[:, None], targets] - cross.T @ self.tableau[:, targets]
        left = _product(enter, left.reshape(len(others), taps, -1))
        links = in_shares.reshape(count, taps, len(others), taps).transpose(1, 2)
        links = _product(links, enter.mT)
        both = out_shares.flatten(0, 1) @ left.flatten(0, 1).T
        both = both.reshape(count, taps, len(others), taps).transpose(1, 2)
        lost = out_shares @ out_shares.mT
        found = left @ left.mT
        gains = _pair_gains(links, both, lost, found)
        result = torch.full((count, problem.in_channels), -torch.inf, dtype=torch.float64)
        result[:, others] = gains
        return result


def _pair_gains(links: Tensor, both: Tensor, lost: Tensor, found: Tensor) -> Tensor:
    """Gains of all pairs from their blocks.

    When a has left, the part of b that is not predicted is I + F^T F, and what b has to explain is
    r = r_b + F^T z_a, in the units of :meth:`Group.gains`; the gain is tr(r^T (I + F^T F)^-1 r)
    less tr(z_a^T z_a).

    Args:
        links: ``(A, B, k, k)``, F.
        both: ``(A, B, k, k)``, z_a r_b^T.
        lost, found: ``(A, k, k)`` and ``(B, k, k)``, z_a z_a^T and r_b r_b^T.

    Returns:
        ``(A, B)``.
    """
    a, b, taps, _ = links.shape
    cost = lost.diagonal(dim1=1, dim2=2).sum(1)
    if taps == 1:
        f, x = links[:, :, 0, 0], both[:, :, 0, 0]
        explained = found[:, 0, 0] + 2 * f * x + f.square() * lost[:, :, 0]
        return explained / (1 + f.square()) - cost[:, None]
    gains = torch.empty(a, b, dtype=links.dtype)
    step = max(1, _CHUNK // b)
    identity = torch.eye(taps, dtype=links.dtype)
    for i in range(0, a, step):
        f = links[i : i + step]
        x = f.mT @ both[i : i + step]
        explained = x + x.mT + found + f.mT @ (lost[i : i + step, None] @ f)
        rest = identity + f.mT @ f
        solved = torch.linalg.solve(rest, explained)
        gains[i : i + step] = solved.diagonal(dim1=2, dim2=3).sum(2)
    return gains - cost[:, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, which for many matrices of one column is slow."""
    return a * b if a.shape[-1] == 1 else a @ b


def _unit(blocks: Tensor) -> Tensor:
    """``(n, k, k)``: for each positive matrix the inverse of its Cholesky factor."""
    return torch.linalg.inv(torch.linalg.cholesky(blocks))


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """``(n, size, size)`` of a square matrix of n * size rows."""
    blocks = matrix.reshape(len(matrix) // size, size, -1, size)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _column_blocks(matrix: Tensor, size: int) -> Tensor:
    """``(n, rows, size)`` of a matrix of n * size columns."""
    return matrix.reshape(len(matrix), -1, size).transpose(0, 1)
