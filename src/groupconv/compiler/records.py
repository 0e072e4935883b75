"""Graphs as text and tensors, and back."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from groupconv.compiler import graph as records
from groupconv.compiler.graph import Graph, Node, Value
from groupconv.errors import DataError
from groupconv.kernels.spec import ConvSpec

_RECORDS: dict[str, type] = {
    record.__name__: record
    for record in (
        ConvSpec, records.Convolution, records.ToTiles, records.Products, records.FromTiles,
        records.Bands,
        records.Instruction, records.Map, records.Pool,
        records.AdaptivePool, records.Upsample, records.Pad, records.LayerNorm, records.Softmax,
        records.Gather, records.Concat, records.View, records.Relayout, records.Input,
        records.Host,
    )
}  # fmt: skip
# What PyTorch's operators take beside numbers and tensors, by its name in torch.
_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def encode(graph: Graph, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A graph as what JSON holds; its tensors join ``tensors``, by the names that stand for them.

    Raises:
        DataError: an argument of PyTorch's operators can't be written.
    """
    writer = _Writer(tensors)
    values = [*graph.inputs, *graph.constants, *(node.output for node in graph.nodes)]
    numbers = {value: number for number, value in enumerate(values)}
    return {
        "values": [[v.name, v.shape, v.axis, writer.write(v.dtype)] for v in values],
        "inputs": len(graph.inputs),
        "constants": [writer.write(tensor) for tensor in graph.constants.values()],
        "nodes": [
            [node.name, writer.write(node.operator), [numbers[v] for v in node.inputs]]
            for node in graph.nodes
        ],
        "outputs": [numbers[value] for value in graph.outputs],
    }


def decode(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Graph:
    """The graph that :func:`encode` was given.

    Raises:
        DataError: a part is unknown to this version.
    """
    values = [
        Value(name, tuple(shape), axis, _read(dtype, tensors))
        for name, shape, axis, dtype in text["values"]
    ]
    inputs = tuple(values[: text["inputs"]])
    fixed = [_read(tensor, tensors) for tensor in text["constants"]]
    first = len(inputs) + len(fixed)
    nodes = [
        Node(name, _read(operator, tensors), tuple(values[i] for i in read), values[first + number])
        for number, (name, operator, read) in enumerate(text["nodes"])
    ]
    constants = dict(zip(values[len(inputs) : first], fixed, strict=True))
    return Graph(inputs, tuple(values[i] for i in text["outputs"]), nodes, constants)


class _Writer:
    """Turns records into lists and dicts, and takes the tensors out."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def write(self, item: Any) -> Any:
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if isinstance(item, list | tuple):
            return [self.write(part) for part in item]
        if isinstance(item, Tensor):
            # By what is in it, so that graphs of the same weights have them once.
            # A copy: no two tensors of a file may share memory.
            whole = item.detach().clone(memory_format=torch.contiguous_format)
            name = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)}".encode())
            name.update(whole.reshape(-1).view(torch.uint8).numpy().data)
            self.tensors.setdefault(name.hexdigest(), whole)
            return {"tensor": name.hexdigest()}
        if isinstance(item, _NAMED):
            return {"torch": str(item).removeprefix("torch.")}
        if isinstance(item, torch.device):
            return {"device": str(item)}
        if isinstance(item, torch._ops.OpOverload):
            return {"operator": item.name(), "overload": item._overloadname}
        if isinstance(item, Mapping):
            return {"dict": {key: self.write(part) for key, part in item.items()}}
        if type(item).__name__ in _RECORDS:
            fields = {f.name: self.write(getattr(item, f.name)) for f in dataclasses.fields(item)}
            return {"record": type(item).__name__, **fields}
        raise DataError(f"save: {item!r} ({type(item).__name__}) can't be written to a file")


def _read(item: Any, tensors: Mapping[str, Tensor]) -> Any:
    match item:
        case list():
            return tuple(_read(part, tensors) for part in item)
        case {"tensor": name}:
            return tensors[name]
        case {"torch": name}:
            return getattr(torch, name)
        case {"device": name}:
            return torch.device(name)
        case {"operator": name, "overload": overload}:
            return _operator(name, overload)
        case {"dict": parts}:
            return {key: _read(part, tensors) for key, part in parts.items()}
        case {"record": str(name), **fields}:
            if name not in _RECORDS:
                raise DataError(f"load_compiled: the file holds a {name}, unknown to this version")
            return _RECORDS[name](
                **{str(key): _read(part, tensors) for key, part in fields.items()}
            )
    return item


def _operator(name: str, overload: str) -> torch._ops.OpOverload:
    """An operator by its name, such as ``aten::add.Tensor``."""
    library, _, rest = name.partition("::")
    packet = getattr(getattr(torch.ops, library), rest.removesuffix(f".{overload}"))
    return getattr(packet, overload)
