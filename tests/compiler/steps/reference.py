"""Elementwise functions as PyTorch has them, in the dtype of their operands."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from groupconv.compiler.graph import FUNCTIONS, Instruction

_PYTORCH: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "prelu": lambda x, weight: torch.where(x > 0, x, weight * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "neg": torch.neg,
    "abs": torch.abs,
    "clamp": torch.clamp,
    "softplus": F.softplus,
    "mish": F.mish,
    "erf": torch.erf,
    "power": torch.pow,
}
assert _PYTORCH.keys() == FUNCTIONS.keys()


def applied(function: str, operands: Sequence[Tensor], parameters: Sequence[float] = ()) -> Tensor:
    return _PYTORCH[function](*operands, *parameters)


def mapped(program: Sequence[Instruction], operands: Sequence[Tensor]) -> Tensor:
    """The result of an expression; operands broadcast."""
    results: list[Tensor] = []
    for instruction in program:
        values = [
            torch.tensor(operand, dtype=operands[0].dtype) if isinstance(operand, float)
            else operands[operand] if operand >= 0
            else results[-1 - operand]
            for operand in instruction.operands
        ]  # fmt: skip
        results.append(applied(instruction.function, values, instruction.parameters))
    return results[-1]
