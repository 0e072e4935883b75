"""Spaces: sets of channels that have one order.

Every tensor whose channel axis runs over a space, and every weight that reads or writes such
tensors, must agree on the order of the channels. In a *fixed* space the order can't be changed.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Member:
    """A parameter whose axis runs over a space: ``module`` is the owner's qualified name."""

    module: str
    parameter: str
    axis: int


@dataclass
class Space:
    """Channels with one order; ``fixed`` says why the order can't change, or is None."""

    channels: int
    fixed: str | None
    members: list[Member] = field(default_factory=list)


class Spaces:
    """Spaces that grow and join while a graph is read (a disjoint-set forest)."""

    def __init__(self) -> None:
        self._spaces: list[Space] = []
        self._parent: list[int] = []

    def open(self, channels: int, fixed: str | None) -> int:
        """A new space; returns its handle."""
        self._parent.append(len(self._spaces))
        self._spaces.append(Space(channels, fixed))
        return len(self._spaces) - 1

    def __getitem__(self, space: int) -> Space:
        return self._spaces[self._root(space)]

    def fix(self, space: int, reason: str) -> None:
        """Forbid to change the order; the first reason is kept."""
        self[space].fixed = self[space].fixed or reason

    def add(self, space: int, member: Member) -> None:
        if member not in self[space].members:
            self[space].members.append(member)

    def join(self, a: int, b: int) -> None:
        """Make two spaces one."""
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        self._parent[b] = a
        self._spaces[a].fixed = self._spaces[a].fixed or self._spaces[b].fixed
        for member in self._spaces[b].members:
            self.add(a, member)

    def fix_shared(self) -> None:
        """Fix spaces that share a parameter: it can't follow the orders of both."""
        homes: dict[Member, set[int]] = {}
        for space in range(len(self._spaces)):
            for member in self[space].members:
                homes.setdefault(member, set()).add(self._root(space))
        for member, spaces in homes.items():
            if len(spaces) > 1:
                for space in spaces:
                    self.fix(space, f"{member.module} is used in several places")

    def numbered(self) -> tuple[list[int], tuple[Space, ...]]:
        """For each handle the number of its space, and the spaces by number."""
        roots = sorted({self._root(space) for space in range(len(self._spaces))})
        number = {root: i for i, root in enumerate(roots)}
        handles = [number[self._root(space)] for space in range(len(self._spaces))]
        return handles, tuple(self._spaces[root] for root in roots)

    def _root(self, space: int) -> int:
        while self._parent[space] != space:
            space = self._parent[space]
        return space
