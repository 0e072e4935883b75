"""Core ML programs without Core ML: an evaluator of MIL, from PyTorch's functions.

Core ML runs on Apple's systems alone. Anywhere else what a package holds is checked by running its
program here, operator by operator.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groupconv.errors import ExportError
from groupconv.targets.mil_functions import FUNCTIONS
from groupconv.targets.quiet import quiet


class Program:
    """The program of a ``.mlpackage``.

    Attributes:
        operations: without constants, in their order.
        shapes: of its inputs.

    Raises:
        ExportError: there is an operator that can't be run here.
    """

    def __init__(self, path: Path) -> None:
        with quiet():
            from coremltools.converters.mil.frontend.milproto.load import load
            from coremltools.models import MLModel

            model = MLModel(str(path), skip_model_load=True)
            spec = model.get_spec()
            self._program = load(spec, spec.specificationVersion, model.weights_dir)
        function = self._program.functions["main"]
        self.operations = [op for op in function.operations if op.op_type != "const"]
        self.shapes = {name: tuple(var.shape) for name, var in function.inputs.items()}
        self._outputs = function.outputs
        unknown = sorted({op.op_type for op in self.operations} - FUNCTIONS.keys())
        if unknown:
            raise ExportError(
                f"{path.name} was written, but can't be checked on this system: there is no "
                f"{' and no '.join(unknown)} here"
            )

    def nodes(self) -> dict[str, int]:
        """Operators by type."""
        return dict(Counter(op.op_type for op in self.operations))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """What the program returns, flat."""
        for (name, shape), x in zip(self.shapes.items(), inputs, strict=True):
            # Sizes that are free are symbols.
            fixed = (n for n in zip(x.shape, shape, strict=False) if isinstance(n[1], int))
            if x.ndim != len(shape) or any(have != want for have, want in fixed):
                raise ValueError(f"input {name} has shape {tuple(x.shape)}, not {shape}")
        values: dict[str, Any] = dict(zip(self.shapes, inputs, strict=True))

        def value(argument: Any) -> Any:
            if isinstance(argument, list | tuple):
                return [value(item) for item in argument]
            return values[argument.name] if argument.name in values else _constant(argument.val)

        for op in self.operations:
            arguments = {name: value(x) for name, x in op.inputs.items() if x is not None}
            result = FUNCTIONS[op.op_type](**arguments)
            results = result if isinstance(result, list | tuple) else [result]
            for output, each in zip(op.outputs, results, strict=True):
                values[output.name] = each
        return [value(output) for output in self._outputs]


def _constant(value: Any) -> Any:
    """Tensors of more than one axis as tensors, settings as numbers and lists of them."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim:
        return torch.from_numpy(np.ascontiguousarray(value))
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
