"""Weights that a norm computes on every pass, made plain parameters.

Spectral norm (Miyato et al. 2018, https://arxiv.org/abs/1802.05957) and weight norm keep the weight
under other names, so that no layer in its place could read it. In evaluation mode it is a constant.
Whoever trains the converted network wraps its layers again.
"""

import copy
from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

_ASKS = SpectralNormLoadStateDictPreHook
_SLOTS = ("__dict__", "__weakref__")


def bake(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Replace every computed ``weight`` by its value in evaluation mode.

    Args:
        model: in evaluation mode; left as it was.

    Returns:
        A copy, and the names of its layers that were changed; the model itself if there are none.
    """
    names = tuple(name for name, module in model.named_modules() if _computes(module))
    if not names:
        return model, ()
    net = copy.deepcopy(model)
    make_plain(net, names)
    return net, names


def make_plain(model: nn.Module, names: Iterable[str]) -> None:
    """The same in place, for the named layers."""
    for name in names:
        module = model.get_submodule(name)
        if parametrize.is_parametrized(module, "weight"):
            # A copy shares its generated class with the original, and removal edits the class.
            own = {k: v for k, v in vars(type(module)).items() if k not in _SLOTS}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        else:
            remove_spectral_norm(module)
            # PyTorch leaves the hook behind that asks for the norm's own tensors.
            hooks = module._load_state_dict_pre_hooks
            for key in [k for k, h in hooks.items() if isinstance(getattr(h, "hook", h), _ASKS)]:
                del hooks[key]


def _computes(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module, "weight") or any(
        isinstance(hook, SpectralNorm) and hook.name == "weight" for hook in hooks
    )
