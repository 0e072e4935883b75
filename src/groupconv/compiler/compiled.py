"""A network as native code: what ``groupconv.compile`` returns."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupconv.compiler import store
from groupconv.compiler.algorithms import choose
from groupconv.compiler.capture import capture
from groupconv.compiler.library import Library
from groupconv.compiler.passes import optimize
from groupconv.compiler.profile import NetworkProfile, Report, profile, report
from groupconv.compiler.program import Program
from groupconv.compiler.watch import Watch
from groupconv.errors import ArgumentError
from groupconv.kernels.machine import runnable

# Programs that are kept, one for each size of the inputs.
_MOST_PROGRAMS = 8
# Shape and layout of every input.
_Sizes = tuple[Any, ...]


class Compiled(nn.Module):
    """An inference network as native code. The weights are those of the moment it was compiled.

    Inputs of another size than the first ones get a program of their own, made on the first call
    from the model, which must be as it was then; the last eight are kept. Safe to call from several
    threads at once.
    """

    def __init__(self, model: nn.Module | None, library: Library) -> None:
        super().__init__()
        # Not among the modules: its parameters are not ours any more.
        self._source = (model,)
        self._watch = Watch(() if model is None else _tensors(model))
        self.library = library
        # For each kind of inputs its program, and the structure of what it returns.
        self.programs: OrderedDict[_Sizes, tuple[Program, pytree.TreeSpec]] = OrderedDict()
        self._lock = threading.Lock()
        self.training = False

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns.

        Args:
            inputs: float32 tensors (or of the dtypes of the example inputs) on the CPU.

        Raises:
            ArgumentError: an input is not on the CPU, or empty, or gradients are asked for; or the
                model has changed, and there is no program for inputs of this size yet.
            GroupConvError: the network can't be captured for inputs of this size.
        """
        inputs, sizes = _dense(inputs)
        program, structure = self.programs.get(sizes) or self._make(sizes, inputs)
        return pytree.tree_unflatten(program(inputs), structure)

    def train(self, mode: bool = True) -> "Compiled":
        """Inference only: raises ArgumentError unless ``mode`` is False."""
        if mode:
            raise ArgumentError("compile: train(True): compiled networks only run inference")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """The same programs: nothing in them changes."""
        twin = Compiled(None, self.library)
        twin._source, twin._watch = self._source, self._watch
        twin.programs = self.programs.copy()
        return twin

    def __reduce__(self) -> Any:
        raise ArgumentError(
            "compile: a compiled network can't be pickled; write it with save(path) and read it "
            "with groupconv.load_compiled(path)"
        )

    def program(self, *inputs: Tensor) -> Program:
        """The program for inputs of such sizes."""
        inputs, sizes = _dense(inputs)
        return (self.programs.get(sizes) or self._make(sizes, inputs))[0]

    def profile(self, *inputs: Tensor) -> NetworkProfile:
        """Time every step, for ``inputs`` or random ones of the sizes that were last compiled."""
        return profile(*self._chosen(inputs))

    def report(self, *inputs: Tensor) -> Report:
        """What runs on native code, what PyTorch runs, why, and how long it takes."""
        return report(*self._chosen(inputs))

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the network to a file that :func:`groupconv.load_compiled` reads.

        Args:
            metadata: kept in the file, in ``program.json``.

        Raises:
            DataError: a part that PyTorch runs can't be written.
        """
        store.save(self.programs.values(), self.library, path, metadata)

    def _chosen(self, inputs: tuple[Tensor, ...]) -> tuple[Program, tuple[Tensor, ...]]:
        if inputs:
            return self.program(*inputs), _dense(inputs)[0]
        program = next(reversed(self.programs.values()))[0]
        return program, program.example()

    def _make(self, sizes: _Sizes, inputs: tuple[Tensor, ...]) -> tuple[Program, pytree.TreeSpec]:
        with self._lock:
            if sizes in self.programs:
                return self.programs[sizes]
            model = self._source[0]
            if model is None:
                legal = ", ".join(str([list(shape) for shape, *_ in key]) for key in self.programs)
                raise ArgumentError(
                    f"compile: inputs of shapes {[list(x.shape) for x in inputs]}: a network from "
                    f"a file runs those it was saved with: {legal}"
                )
            if not self._watch.holds(_tensors(model)):
                raise ArgumentError(
                    f"compile: inputs of shapes {[list(x.shape) for x in inputs]} need a program "
                    "of their own, and the model has changed since it was compiled: compile it anew"
                )
            for number, x in enumerate(inputs):
                if 0 in x.shape:
                    raise ArgumentError(
                        f"compile: input {number} has shape {list(x.shape)}: it must not be empty"
                    )
            # What is kept must not be bound to the mode of the first call.
            with torch.inference_mode(False), torch.no_grad():
                graph, structure = capture(model, inputs)
                graph = choose(optimize(graph), self.library)
                self.add(Program(graph, self.library), structure)
            return self.programs[sizes]

    def add(self, program: Program, structure: pytree.TreeSpec) -> None:
        """Keep a program for the sizes of its inputs, and forget the oldest of many."""
        while len(self.programs) >= _MOST_PROGRAMS:
            self.programs.popitem(last=False)
        sizes = tuple(
            (torch.Size(value.shape), value.dtype, value.contiguous)
            for value in program.graph.inputs
        )
        self.programs[sizes] = program, structure


def compile(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Compiled:
    """Turn an inference network into native code.

    Args:
        model: in evaluation mode, on the CPU, in float32. Its weights are copied where they are
            rearranged: changes that come later don't reach the compiled network.
        example_inputs: the network's arguments. Others of other sizes can be given later.

    Returns:
        A module that takes the same tensors and returns the same.

    Raises:
        ArgumentError: the model is in training mode or not on the CPU, or no code can be generated
            for this processor.
        GroupConvError: the network can't be captured.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    check(model)
    compiled = Compiled(model, Library())
    with torch.no_grad():
        compiled.program(*inputs)
    return compiled


def check(model: nn.Module) -> None:
    """Whether native code can run a model at all.

    Raises:
        ArgumentError: no, see :func:`compile`.
    """
    if not runnable():
        raise ArgumentError("compile: no code can be generated for this processor")
    busy = next((name or "model" for name, m in model.named_modules() if m.training), None)
    if busy is not None:
        raise ArgumentError(f"compile: {busy} is in training mode; call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ArgumentError(f"compile: {name} is on {tensor.device}; move the model to the CPU")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _dense(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], _Sizes]:
    """The inputs laid out as programs take them, and what a program depends on."""
    sizes: list[tuple[torch.Size, torch.dtype, bool]] = []
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.device.type != "cpu":
            what = f"on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ArgumentError(f"compile: input {number} is {what}, it must be a CPU tensor")
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"compile: input {number} requires gradients, and compiled networks have none; "
                "call under torch.no_grad()"
            )
        plain = x.is_contiguous()
        if not plain and not (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            inputs = (*inputs[:number], x.contiguous(), *inputs[number + 1 :])
            plain = True
        sizes.append((x.shape, x.dtype, plain))
    return inputs, tuple(sizes)


def load_compiled(path: str | Path) -> Compiled:
    """A compiled network from the file that :meth:`Compiled.save` wrote.

    It runs inputs of the sizes that it had programs for. Native code is loaded from the file: load
    only files that you trust.

    Raises:
        ArgumentError: no code can be generated for this processor.
        DataError: the file can't be read, is damaged, or of another version.
    """
    if not runnable():
        raise ArgumentError("load_compiled: no code can be generated for this processor")
    programs, library = store.load(path)
    compiled = Compiled(None, library)
    for program, structure in programs:
        compiled.add(program, structure)
    return compiled
