"""Models and images as they are named on the command line."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import groupconv
from groupconv.cli.console import people
from groupconv.errors import ArgumentError, DataError
from groupconv.recovery import Recovery

_FORMS = '"torchvision:resnet18", "timm:resnet18" or "path/to/file.py:function"'


def load_model(name: str, weights: Path | None) -> nn.Module:
    """Build a model, and load its weights if a file is given.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME`` or ``file.py:function``.
        weights: a state_dict as ``.safetensors``, ``.pth`` or ``.pt`` (read with weights_only).

    Raises:
        ArgumentError: the name has none of the forms, or nothing of that name exists.
        DataError: the weights can't be read or do not fit.
    """
    source, _, what = name.partition(":")
    if source == "torchvision" and what:
        model = _torchvision(what)
    elif source == "timm" and what:
        model = _timm(what)
    elif ".py:" in name:
        model = load_function(name)()
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model={name!r} returns a {type(model).__name__}, not a module")
    else:
        raise ArgumentError(f"model={name!r} must have a form such as {_FORMS}")
    if weights is not None:
        _load_weights(model, weights)
    return model.eval()


def load_trained(name: str, weights: Path | None) -> nn.Module:
    """:func:`load_model`, with a word to the user if the weights are random."""
    if weights is None and ".py:" not in name:
        people.print(f"{name} has random weights: give its trained ones with --weights")
    return load_model(name, weights)


def load_finished(name: str, weights: Path | None, optimized: Path | None) -> nn.Module:
    """:func:`load_trained`, or what ``optimize`` made of it, from the folder that it wrote."""
    net = load_trained(name, weights)
    return net if optimized is None else groupconv.load(optimized, net).eval()


def load_data(name: str) -> Any:
    """What ``file.py:function`` returns; the name of a folder or an ``.npz`` as it is."""
    return load_function(name)() if ".py:" in name else name


def load_recovery(time: str, train: str | None) -> Recovery:
    """The recovery of some time, with images of its own if any are named."""
    return Recovery(time, train=None if train is None else load_data(train))


def load_function(name: str) -> Callable[[], Any]:
    """The function named by ``path/to/file.py:function``.

    Raises:
        ArgumentError: no such file or function.
    """
    path, _, function = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"{name!r}: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # So that the file's own classes can be found by their module's name, as in any import.
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ArgumentError(f"{name!r}: {path} has no function {function!r}")
    return found


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model_builder, list_models

    if name not in list_models():
        raise ArgumentError(f"model='torchvision:{name}': torchvision has no such model")
    builder = get_model_builder(name)
    # A segmentation network would fetch the weights of its backbone.
    known = inspect.signature(builder).parameters
    return builder(**{key: None for key in ("weights", "weights_backbone") if key in known})


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ArgumentError("timm is not installed: pip install 'groupconv[timm]'") from error
    if not timm.is_model(name):
        raise ArgumentError(f"model='timm:{name}': timm has no such model")
    return timm.create_model(name)


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"weights={str(path)!r} can't be read: {error}") from error
    except Exception as error:  # unpickling errors have many types
        raise DataError(f"weights={str(path)!r} hold more than numbers: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"weights={str(path)!r} do not fit the model: {error}") from error


def sizes(text: str) -> list[int]:
    """The shape in a text such as ``1,3,224,224`` or ``1x3x224x224``.

    Raises:
        ArgumentError: it is none.
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ArgumentError(f"shape={text!r} must be positive integers such as 1,3,224,224")
    return [int(part) for part in parts]
