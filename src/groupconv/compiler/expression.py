"""Programs of Maps as lists of terms that can be joined, cut and simplified."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from groupconv.compiler.graph import Instruction, Map, Node, Value

# A value of the graph, a number for each channel, a number, or the result of a term.
Operand = Value | Tensor | float | int


@dataclass(frozen=True, eq=False)
class Term:
    """One instruction; an integer among its operands is the number of an earlier term."""

    function: str
    operands: tuple[Operand, ...]
    parameters: tuple[float, ...] = ()

    def moved(self, change: Callable[[Operand], Operand]) -> "Term":
        """With ``change`` of every operand."""
        return Term(self.function, tuple(change(o) for o in self.operands), self.parameters)


def read(node: Node) -> list[Term]:
    """The terms of a Map; the last is its result."""
    operator = node.operator
    assert isinstance(operator, Map)
    leaves: list[Operand] = [*node.inputs, *operator.constants]

    def operand(number: int | float) -> Operand:
        if isinstance(number, float):
            return number
        return leaves[number] if number >= 0 else -1 - number

    return [
        Term(i.function, tuple(operand(o) for o in i.operands), i.parameters)
        for i in operator.program
    ]


def write(terms: Sequence[Term], result: int) -> tuple[Map, tuple[Value, ...]]:
    """The Map whose result is that of term ``result``, and its inputs.

    Every term, value and constant comes once, and none that isn't needed.
    """
    kept, numbers = _needed(terms, result)
    inputs, constants = dict[Value, int](), dict[int, tuple[int, Tensor]]()
    for term in kept:
        for operand in term.operands:
            if isinstance(operand, Value):
                inputs.setdefault(operand, len(inputs))
            elif isinstance(operand, Tensor):
                constants.setdefault(id(operand), (len(constants), operand))

    def number(operand: Operand) -> int | float:
        if isinstance(operand, Value):
            return inputs[operand]
        if isinstance(operand, Tensor):
            return len(inputs) + constants[id(operand)][0]
        return operand if isinstance(operand, float) else -1 - operand

    program = tuple(
        Instruction(t.function, tuple(number(o) for o in t.operands), t.parameters) for t in kept
    )
    assert numbers[result] == len(kept) - 1
    return Map(program, tuple(tensor for _, tensor in constants.values())), tuple(inputs)


def drop(terms: Sequence[Term], number: int, operand: Operand) -> list[Term]:
    """Without a term, in whose place the others read ``operand``."""

    def moved(o: Operand) -> Operand:
        if not isinstance(o, int) or o < number:
            return o
        return operand if o == number else o - 1

    return [term.moved(moved) for i, term in enumerate(terms) if i != number]


def join(first: Sequence[Term], value: Value, second: Sequence[Term]) -> list[Term]:
    """The terms of both, where ``second`` reads ``value``, the result of ``first``."""

    def moved(operand: Operand) -> Operand:
        if operand is value:
            return len(first) - 1
        return operand + len(first) if isinstance(operand, int) else operand

    return [*first, *(term.moved(moved) for term in second)]


def simplify(terms: Sequence[Term]) -> list[Term]:
    """With one function in place of several that spell it out."""
    found: list[Term] = []
    for term in terms:
        found.append(_spelled_out(term, found))
    return found


def same(a: Operand, b: Operand) -> bool:
    """Whether two operands are one: the integer 1 is a term, 1.0 a number."""
    return _key(a) == _key(b)


def _needed(terms: Sequence[Term], result: int) -> tuple[list[Term], Mapping[int, int]]:
    """The terms that ``result`` needs, equal ones once, and their new numbers."""
    needed = {result}
    for i in range(result, -1, -1):
        if i in needed:
            needed.update(o for o in terms[i].operands if isinstance(o, int))
    kept, numbers, known = list[Term](), dict[int, int](), dict[tuple[object, ...], int]()
    for i in sorted(needed):
        term = terms[i].moved(lambda o: numbers[o] if isinstance(o, int) else o)
        key = (term.function, term.parameters, *(_key(o) for o in term.operands))
        if key not in known:
            known[key] = len(kept)
            kept.append(term)
        numbers[i] = known[key]
    return kept, numbers


def _key(operand: Operand) -> object:
    """Equal for operands that are one."""
    return (type(operand), operand if isinstance(operand, (int, float)) else id(operand))


def _spelled_out(term: Term, before: Sequence[Term]) -> Term:
    """``term``, or the function that it and those before it are."""
    match term.function:
        case "clamp" if term.parameters == (0.0, math.inf):
            return Term("relu", term.operands)
        case "clamp" if term.parameters == (0.0, 6.0):
            return Term("relu6", term.operands)
        case "div" if same(term.operands[1], 6.0):
            return _sixth(term.operands[0], before) or term
        case "mul":
            a, b = term.operands
            return _product(a, b, before) or _product(b, a, before) or term
    return term


def _product(x: Operand, other: Operand, before: Sequence[Term]) -> Term | None:
    """A function of x that is ``x * other``."""
    if isinstance(other, float) and math.isclose(other, 1 / 6, rel_tol=1e-6):
        return _sixth(x, before)
    if not isinstance(other, int):
        return None
    gate = before[other]
    name = {"sigmoid": "silu", "hardsigmoid": "hardswish"}.get(gate.function)
    return Term(name, (x,)) if name and same(gate.operands[0], x) else None


def _sixth(operand: Operand, before: Sequence[Term]) -> Term | None:
    """What a sixth of ``operand`` is: relu6(x + 3) / 6 and x * relu6(x + 3) / 6 have names."""
    x = _shifted(operand, before)
    if x is not None:
        return Term("hardsigmoid", (x,))
    if not isinstance(operand, int) or before[operand].function != "mul":
        return None
    a, b = before[operand].operands
    for x, gate in ((a, b), (b, a)):
        shifted = _shifted(gate, before)
        if shifted is not None and same(shifted, x):
            return Term("hardswish", (x,))
    return None


def _shifted(operand: Operand, before: Sequence[Term]) -> Operand | None:
    """x where the operand is relu6(x + 3)."""
    if not isinstance(operand, int) or before[operand].function != "relu6":
        return None
    inner = before[operand].operands[0]
    if not isinstance(inner, int) or before[inner].function != "add":
        return None
    a, b = before[inner].operands
    if same(b, 3.0):
        return a
    return b if same(a, 3.0) else None
