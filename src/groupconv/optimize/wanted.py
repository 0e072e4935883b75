"""What layers should write so that a converted network does what the original does.

That is the original's output, and where another tensor is added to it, what makes up for the drift
of that one too: an error in a residual stream has no other layer that could take it back. Channel
pruning does the same at the end of residual branches (He, Zhang and Sun, 2017, section 3.3).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from groupconv.optimize.sampling import Sampling, outputs_at
from groupconv.optimize.trace import TracedConv
from groupconv.optimize.visit import visit

# Outputs of the original kept in memory at once.
_TARGETS_BYTES = 1 << 29
# A batch norm that scales a channel by less does not pass anything on.
_LEAST_SCALE = 1e-6


class Added:
    """What is added to the outputs of some layers, at the sampled positions of one batch.

    Args:
        convs: the layers.
        sampling: of the images.
        number: of the batch.
    """

    def __init__(self, convs: Sequence[TracedConv], sampling: Sampling, number: int) -> None:
        self.sampling, self.number = sampling, number
        self._waiting: dict[str, list[TracedConv]] = defaultdict(list)
        for conv in convs:
            if conv.added is not None:
                self._waiting[conv.added.module].append(conv)
        self._found: dict[str, Tensor] = {}

    @property
    def modules(self) -> list[str]:
        """Names of the modules to :meth:`see`."""
        return list(self._waiting)

    def see(self, module: str, read: Tensor, written: Tensor) -> None:
        """Take what a module reads or writes, if it is added to something."""
        for conv in self._waiting.get(module, ()):
            assert conv.added is not None
            tensor = written if conv.added.output else read
            place = self.sampling.places(self.number, tensor.shape)
            self._found[conv.name] = outputs_at(tensor, place)

    def to(self, conv: TracedConv) -> Tensor:
        """``(P, C)``: what is added to a layer that :meth:`see` was called before."""
        return self._found[conv.name]


class Targets:
    """What layers of a converted network should write at the sampled positions.

    The original is read for several layers at once.

    Args:
        original: in evaluation mode.
        convs: its layers, in the order in which they will be asked for.
        sampling: of the calibration images.
        written: layer name to the original channel at each position of what is added to its output
            in the converted network; where it has none they are in the original's order.
    """

    def __init__(
        self,
        original: nn.Module,
        convs: Sequence[TracedConv],
        sampling: Sampling,
        written: Mapping[str, Sequence[int]],
    ) -> None:
        self.original, self.convs, self.sampling = original, list(convs), sampling
        self.written = written
        self._known: dict[str, dict[int, Tensor]] = {}

    def of(self, conv: TracedConv) -> dict[int, Tensor]:
        """``(P, C_out)`` of each batch of this process, by its number: what a layer writes in the
        original and what is added to it, channels in the original's order.

        Those of layers asked for before are forgotten.
        """
        if conv.name not in self._known:
            self._known.clear()
            self._read([conv.name for conv in self.convs].index(conv.name))
        return self._known[conv.name]

    def less(self, conv: TracedConv, total: Tensor, added: Added) -> Tensor:
        """``(P, C_out)``: what is left for the layer to write.

        Args:
            conv: the layer.
            total: of :meth:`of`.
            added: what is added in the converted network.
        """
        if conv.added is None:
            return total
        rows = torch.as_tensor(
            self.written.get(conv.name, range(total.shape[1])), device=total.device
        )
        left = total.clone()
        left[:, rows] -= added.to(conv) * _shrinks(self.original, conv)[rows]
        return left

    @torch.no_grad()
    def _read(self, first: int) -> None:
        convs: list[TracedConv] = []
        size = 0
        for conv in self.convs[first:]:
            size += 4 * self.sampling.max_positions * conv.spec.out_channels
            if convs and size > _TARGETS_BYTES:
                break
            convs.append(conv)
        self._known = {conv.name: {} for conv in convs}
        by_name = {conv.name: conv for conv in convs}
        for number, _, batch in self.sampling.share():
            added = Added(convs, self.sampling, number)

            def keep(
                name: str, x: Tensor, y: Tensor, number: int = number, added: Added = added
            ) -> None:
                added.see(name, x, y)
                if name not in by_name:
                    return
                conv = by_name[name]
                total = outputs_at(y, self.sampling.places(number, y.shape))
                if conv.added is not None:
                    total = total + added.to(conv) * _shrinks(self.original, conv)
                self._known[name][number] = total

            visit(self.original, [*by_name, *added.modules], batch, keep)


def _shrinks(original: nn.Module, conv: TracedConv) -> Tensor:
    """``(C_out,)``: what a layer must write more for one more behind its batch norm."""
    layer = original.get_submodule(conv.name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if conv.batch_norm is None:
        return torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
    norm = original.get_submodule(conv.batch_norm)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    return torch.where(scale.abs() > _LEAST_SCALE, scale.reciprocal(), 0.0)
