"""Plan: what a person may read and edit, and the output folder that a network is loaded from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from groupconv.errors import DataError
from groupconv.files import replacing
from groupconv.optimize.bake import make_plain
from groupconv.optimize.convert import Converted, Edit, Settled, apply_edits, structure_of
from groupconv.optimize.fold import remove
from groupconv.optimize.kept import Kept, shrink
from groupconv.optimize.partition import Partition
from groupconv.optimize.structure import Grouped, Narrowed, from_dict, to_dict

_FORMAT = 1
WEIGHTS, PLAN, REPORT, PAGE = "model.safetensors", "plan.json", "report.json", "report.html"


@dataclass(frozen=True)
class Plan:
    """Which layers are cut into how many groups, which channels share one, and why.

    Args:
        layers: name of the layer to what stands in its place, in the order in which they claim
            the order of the channels between layers.
        reasons: name of the layer to why it is as it is, unchanged ones too.
        budget, target, seed: what the plan was made for.
        latency: predicted, as a share of the original network's, or None.
    """

    layers: Mapping[str, Settled]
    reasons: Mapping[str, str] = field(default_factory=dict)
    budget: str = ""
    target: str = ""
    seed: int = 0
    latency: float | None = None

    def to_json(self) -> str:
        """JSON with one line per list of channels."""
        layers = ",\n".join(
            f"  {json.dumps(name)}: {{\n{_lines(settled)}\n  }}"
            for name, settled in self.layers.items()
        )
        head = {
            "format": _FORMAT,
            "budget": self.budget,
            "target": self.target,
            "seed": self.seed,
            "latency": self.latency,
            "reasons": dict(self.reasons),
        }
        opening = json.dumps(head, indent=1).removesuffix("\n}")
        return opening + ',\n "layers": {\n' + layers + "\n }\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            DataError: not JSON, another format, or a list that is not a permutation.
        """
        try:
            values = json.loads(text)
            if values["format"] != _FORMAT:
                raise DataError(f"plan: format {values['format']!r} must be {_FORMAT}")
            layers = {name: _settled(name, layer) for name, layer in values["layers"].items()}
            head = (values["budget"], values["target"], int(values["seed"]))
            latency = None if values.get("latency") is None else float(values["latency"])
            return cls(layers, values.get("reasons", {}), *head, latency)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"plan: not a plan of groupconv: {error!r}") from error


def _lines(settled: Settled) -> str:
    values = to_dict(structure_of(settled))
    if isinstance(settled, Partition):
        values |= {"in_order": settled.in_order, "out_order": settled.out_order}
    if isinstance(settled, Kept):
        values |= {"kept_in": settled.inputs, "kept_out": settled.outputs}
    return ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())


def _settled(name: str, layer: Mapping[str, Any]) -> Settled:
    structure = from_dict(layer)
    if isinstance(structure, Narrowed):
        kept = Kept.from_dict(
            {"inputs": layer["kept_in"], "outputs": layer["kept_out"], "groups": structure.groups}
        )
        if kept.structure != structure:
            raise DataError(f"plan: {name}: kept_in and kept_out must be as many as it says")
        return kept
    given = [key for key in ("in_order", "out_order") if key in layer]
    if not given or not isinstance(structure, Grouped):
        return structure
    if len(given) == 1:
        raise DataError(f"plan: {name}: {given[0]} alone is given; give both orders or none")
    orders = [tuple(int(i) for i in layer[key]) for key in given]
    for key, order in zip(given, orders, strict=True):
        if sorted(order) != list(range(len(order))):
            raise DataError(f"plan: {name}: {key} must hold each of 0 .. C-1 exactly once")
    return Partition(structure.groups, *orders)


def save_weights(
    folder: Path, converted: Converted, folded: Sequence[str] = (), baked: Sequence[str] = ()
) -> None:
    """Write ``model.safetensors``; its metadata carry the edits, so that the file is enough.

    Args:
        folder: where to.
        converted: the network.
        folded: names of its permutations that are identities.
        baked: names of its layers whose norm of the weight was made plain.
    """
    changes = {
        "layers": {name: edit.to_dict() for name, edit in converted.edits.items()},
        "shapes": converted.shapes,
        "folded": list(folded),
        "baked": list(baked),
    }
    _save(folder, converted.model, json.dumps(changes))


def save_again(folder: Path, model: nn.Module, source: str | Path) -> None:
    """Write ``model.safetensors`` of a network of the structure that another one has.

    Args:
        folder: where to.
        model: as :func:`load` gave it, with other weights.
        source: where it was loaded from.
    """
    _save(folder, model, _changes(source)[1])


def _save(folder: Path, model: nn.Module, changes: str) -> None:
    with replacing(folder / WEIGHTS) as temporary:
        save_model(model, str(temporary), {"groupconv": changes})


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild an optimized network from the constructor of the original one.

    Nothing is unpickled: the file holds numbers and the list of converted layers.

    Args:
        folder: output folder of :func:`optimize`, or a ``model.safetensors`` in one.
        model: the original network, with any weights; it is converted in place.

    Returns:
        ``model``, with the optimized structure and weights, in evaluation mode.

    Raises:
        DataError: the folder has no finished result, or it belongs to another network.
    """
    path, text = _changes(folder)
    try:
        changes = json.loads(text)
        folded = [str(name) for name in changes["folded"]]
        baked = [str(name) for name in changes.get("baked", [])]
        edits = {name: Edit.from_dict(edit) for name, edit in changes["layers"].items()}
        shapes = {name: dict(tensors) for name, tensors in changes.get("shapes", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its list of converted layers is broken: {error!r}") from error
    try:
        make_plain(model, baked)
        remove(model, folded)
        apply_edits(model, edits)
        shrink(model, shapes)
        model.load_state_dict(_state(model, load_file(str(path))))
    except (AttributeError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: weights of another network: {error}") from error
    return model.eval()


def _changes(folder: str | Path) -> tuple[Path, str]:
    """The file of weights of an output folder, or itself, and what it says was changed.

    Raises:
        DataError: there is none that says so.
    """
    path = Path(folder)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.exists():
        raise DataError(f"{path} does not exist: not an output folder, or its run did not finish")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("groupconv")
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file: {error}") from error
    if text is None:
        raise DataError(f"{path}: holds weights, but was not written by groupconv")
    return path, text


def _state(model: nn.Module, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own state_dict, its version numbers included, with the saved tensors in it.

    A tensor of several names is in the file once.
    """
    state = model.state_dict()
    names = {t.data_ptr(): name for name, t in state.items() if name in saved and t.numel()}
    for name, tensor in list(state.items()):
        same = name if name in saved else names.get(tensor.data_ptr())
        if same is None:
            del state[name]
        else:
            state[name] = saved[same]
    state.update({name: tensor for name, tensor in saved.items() if name not in state})
    return state
