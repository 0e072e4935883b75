"""Random graphs of everything that the passes know, with odd numbers of channels."""

import math
from collections.abc import Sequence

from compiler.build import Builder
from hypothesis import strategies as st

from groupconv.compiler.graph import Graph, Sides, Value

_ACTIVATIONS = [
    ("relu",), ("relu6",), ("silu",), ("hardswish",), ("leaky_relu", 0.2), ("sigmoid",),
    ("hardsigmoid",), ("gelu",), ("tanh",), ("clamp", 0.0, math.inf), ("clamp", 0.0, 6.0),
    ("clamp", -1.0, 2.0),
]  # fmt: skip
_MOST = 24


class _Random:
    """A graph under construction: images of one batch, from which every step picks some."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        batch, channels = self.number(1, 2), self.number(1, 9)
        shape = (batch, channels, self.number(3, 6), self.number(3, 6))
        self.b = Builder(shape, seed=self.number(0, 1000))
        self.values: list[Value] = [self.b.inputs[0]]

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self) -> Value:
        """Most often the last one: chains are what is rewritten."""
        return self.values[-1 - self.draw(st.sampled_from([0, 0, 0, 1, 2])) % len(self.values)]

    def graph(self, kinds: Sequence[str]) -> Graph:
        every = sorted(name for name in dir(self) if name.startswith("step_"))
        steps = [f"step_{kind}" for kind in kinds] or every
        for name in self.draw(st.lists(st.sampled_from(steps), min_size=2, max_size=12)):
            made = getattr(self, name)(self.pick())
            self.values += [made] if isinstance(made, Value) else made
        outputs = self.values[-1:] + self.draw(st.lists(st.sampled_from(self.values), max_size=2))
        return self.b.graph(*dict.fromkeys(v for v in outputs if v not in self.b.inputs))

    def step_conv(self, x: Value) -> Value:
        kernel = self.draw(st.sampled_from([1, 1, 3]))
        padding = self.number(0, 1) if kernel == 3 and min(x.shape[2:]) > 2 else kernel // 2
        stride = self.number(1, 2)
        return self.b.conv(x, self.number(1, 12), kernel, padding=padding, stride=stride)

    def step_transposed(self, x: Value) -> Value:
        if x.pixels > 100:
            return self.step_grouped(x)
        groups = self.draw(st.sampled_from([g for g in (1, 2, 3) if x.channels % g == 0]))
        out = groups * self.number(1, 4)
        return self.b.conv(x, out, 3, padding=1, stride=2, groups=groups, transposed=True)

    def step_grouped(self, x: Value) -> Value:
        groups = self.draw(st.sampled_from([g for g in (1, 2, 3, 4) if x.channels % g == 0]))
        kernel = self.draw(st.sampled_from([1, 3]))
        return self.b.conv(x, groups * self.number(1, 4), kernel, groups=groups)

    def step_depthwise(self, x: Value) -> Value:
        out = x.channels * (1 if x.channels > _MOST else self.number(1, 2))
        return self.b.conv(x, out, 3, groups=x.channels, stride=self.number(1, 2))

    def step_norm(self, x: Value) -> Value:
        return self.b.norm(x)

    def step_norm_and_conv(self, x: Value) -> Value:
        kernel = 3 if min(x.shape[2:]) > 2 else 1
        return self.b.conv(self.b.norm(x), self.number(1, 9), kernel, padding=self.number(0, 1))

    def step_act(self, x: Value) -> Value:
        return self.b.act(x, *self.draw(st.sampled_from(_ACTIVATIONS)))

    def step_spelled_out(self, x: Value) -> Value:
        gate = self.b.act(x, self.draw(st.sampled_from(["sigmoid", "hardsigmoid", "tanh"])))
        return self.b.map((x, gate), ("mul", (0, 1)))

    def step_hardswish(self, x: Value) -> Value:
        shifted = self.b.map(x, ("add", (0, 3.0)))
        product = self.b.map((x, self.b.act(shifted, "relu6")), ("mul", (0, 1)))
        return self.b.map(product, ("div", (0, 6.0)))

    def step_affine(self, x: Value) -> Value:
        c = self.b.numbers(x.channels)
        function = self.draw(st.sampled_from(["sub", "mul", "add"]))
        operands = self.draw(st.sampled_from([(0, 1), (1, 0), (0, 0.5), (-2.0, 0)]))
        # The constant stays out where the operand is a number.
        constants = (c,) if 1 in operands else ()
        if any(isinstance(o, float) and o < 0 for o in operands):
            return self.b.map(x, ("abs", (0,)), (function, (-1, 0.25)), constants=constants)
        return self.b.map(x, (function, operands), constants=constants)

    def step_constant(self, x: Value) -> Value:
        shape = self.draw(st.sampled_from([x.shape, (1, x.channels, 1, 1)]))
        function = self.draw(st.sampled_from(["add", "mul"]))
        constant = self.b.constant(*shape)
        if self.number(0, 1):
            constant = self.b.act(constant, "tanh")
        return self.b.map((x, constant), (function, (0, 1)))

    def step_residual(self, x: Value) -> Value:
        y = self.b.conv(x, x.channels, 3)
        y = self.b.norm(y) if self.number(0, 1) else y
        return self.b.sum(x, y) if self.number(0, 1) else self.b.sum(y, x)

    def step_sum(self, x: Value) -> Value:
        alike = [v for v in self.values if v.shape == x.shape]
        y = self.draw(st.sampled_from(alike))
        return self.b.sum(x, y)

    def step_excite(self, x: Value) -> Value:
        return self.b.excite(x, self.draw(st.sampled_from(["sigmoid", "hardsigmoid"])))

    def step_split(self, x: Value) -> list[Value]:
        if x.channels < 2:
            return [x]
        return list(self.b.split(x, self.number(1, x.channels - 1)))

    def step_shuffle(self, x: Value) -> Value:
        groups = [g for g in range(1, x.channels + 1) if x.channels % g == 0]
        return self.b.shuffle(x, self.draw(st.sampled_from(groups)))

    def step_permute(self, x: Value) -> Value:
        return self.b.gather(x, self.draw(st.permutations(range(x.channels))))

    def step_gather(self, x: Value) -> Value:
        channels = st.integers(0, x.channels - 1)
        return self.b.gather(x, self.draw(st.lists(channels, min_size=1, max_size=_MOST)))

    def step_concat(self, x: Value) -> Value:
        alike = [v for v in self.values if v.shape[2:] == x.shape[2:] and v.channels <= _MOST]
        if not alike or x.channels > _MOST:
            return x
        return self.b.concat(x, *self.draw(st.lists(st.sampled_from(alike), max_size=2)))

    def step_unit(self, x: Value) -> Value:
        """A block of a ShuffleNet."""
        if x.channels % 4:
            return self.step_conv(x)
        half = x.channels // 2
        a, y = self.b.split(x, half)
        y = self.b.act(self.b.norm(self.b.conv(y, half)))
        y = self.b.norm(self.b.conv(y, half, 3, groups=half))
        y = self.b.act(self.b.norm(self.b.conv(y, half)))
        return self.b.shuffle(self.b.concat(a, y), 2)

    def step_pool(self, x: Value) -> Value:
        kind = self.draw(st.sampled_from(["max", "average"]))
        kernel = self.draw(st.sampled_from([1, 3]))
        return self.b.pool(x, kind, kernel, self.number(1, 2), kernel // 2)

    def step_pad(self, x: Value) -> Value:
        value = self.draw(st.sampled_from([0.0, 0.0, 1.5]))
        ends = st.integers(-1 if min(x.shape[2:]) > 3 else 0, 2)
        return self.b.pad(x, self.sides(ends), value)

    def step_pad_and_pool(self, x: Value) -> Value:
        value = self.draw(st.sampled_from([0.0, -math.inf]))
        # Less than the window: it never is padding alone.
        padded = self.b.pad(x, self.sides(st.integers(0, 1)), value)
        return self.b.pool(
            padded, "max" if value else self.draw(st.sampled_from(["max", "average"]))
        )

    def sides(self, ends: st.SearchStrategy[int]) -> Sides:
        a, b, c, d = (self.draw(ends) for _ in range(4))
        return ((a, b), (c, d))

    def step_upsample(self, x: Value) -> Value:
        return self.b.upsample(x, 2) if x.pixels < 100 else self.b.upsample(x, 1)

    def step_mean(self, x: Value) -> Value:
        return self.b.mean(x)

    def step_layer_norm(self, x: Value) -> Value:
        return self.b.layer_norm(x)

    def step_softmax(self, x: Value) -> Value:
        return self.b.softmax(x)

    def step_layouts(self, x: Value) -> Value:
        """Away from NHWC and back, or into a convolution that reads planes."""
        planes = self.b.relayout(x, 3)
        if self.number(0, 1):
            planes = self.b.act(planes)
        return self.b.relayout(planes, 1)

    def step_views(self, x: Value) -> Value:
        rows = self.b.view(x, (x.shape[0], x.channels, x.pixels // x.shape[0], 1))
        return self.b.view(rows, x.shape)


@st.composite
def graphs(draw: st.DrawFn, kinds: Sequence[str] = ()) -> Graph:
    """Legal graphs with at least one output that isn't an input.

    Args:
        kinds: the steps that they are made of, such as ``conv`` for ``step_conv``; all by default.
    """
    found = _Random(draw)
    graph = found.graph(kinds)
    if graph.outputs:
        return graph
    return found.b.graph(found.b.act(found.values[-1]))
