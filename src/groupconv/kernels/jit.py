"""LLVM IR to machine code, and machine code into this process."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm

from groupconv.kernels.machine import Machine

Function = Callable[..., Any]

# LLVM's objects are not to be used by two threads at once, nor in the middle of their work by a
# child that is forked.
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _target(machine: Machine) -> llvm.TargetMachine:
    _initialize()
    return llvm.Target.from_triple(machine.triple).create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=2, reloc="pic", codemodel="small"
    )


def _parse(text: str) -> llvm.ModuleRef:
    module = llvm.parse_assembly(text)
    module.verify()
    return module


def compile_object(text: str, machine: Machine) -> bytes:
    """The object file of a module.

    LLVM's optimisation passes are left out: what they would do, the generator has done, and they
    take as long as the rest together.
    """
    with _lock:
        return _target(machine).emit_object(_parse(text))


def assembly(text: str, machine: Machine) -> str:
    """The same as text in the machine's assembly language; any machine that LLVM knows."""
    with _lock:
        if not llvm.get_process_triple().startswith(machine.triple.partition("-")[0]):
            llvm.initialize_all_targets()
            llvm.initialize_all_asmprinters()
        return _target(machine).emit_assembly(_parse(text))


@functools.cache
def _engine() -> llvm.ExecutionEngine:
    """The one engine that owns all code of this process."""
    _initialize()
    target = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
    # llvmlite's own memory manager keeps the sections of an object together: code reaches its
    # constants by 32-bit distances.
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), target, use_lmm=True)


def load(code: bytes, name: str, prototype: Callable[[int], Function]) -> Function:
    """The function at :func:`address`, as ``prototype`` (a ctypes function type) has it."""
    return prototype(address(code, name))


def known(name: str) -> int | None:
    """Where the function ``name`` lies, if :func:`address` or :func:`load` brought it here."""
    with _lock:
        return _engine().get_function_address(name) or None


def address(code: bytes, name: str) -> int:
    """Where the function ``name`` of an object file lies in this process.

    The name stands for the code: where it is there already, that function is meant.
    """
    with _lock:
        engine = _engine()
        found = engine.get_function_address(name)
        if not found:
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
            engine.finalize_object()
            found = engine.get_function_address(name)
        assert found
        return found
