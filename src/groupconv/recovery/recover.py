"""recover(): a network that lost accuracy learns from the one that it was made of."""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupconv import ranks
from groupconv.data import largest_map, load_images
from groupconv.errors import ArgumentError
from groupconv.files import output_folder
from groupconv.recovery.lessons import batch_size, judged, with_images
from groupconv.recovery.options import Recovery
from groupconv.store import Store, claimed, fingerprint


def recover(
    model: nn.Module,
    original: nn.Module,
    data: Any,
    recovery: str | Recovery,
    *,
    out: str | Path | None = None,
    restart: bool = False,
    seed: int = 0,
    max_images: int = 1_024,
    image_size: int = 224,
) -> list[dict[str, Any]]:
    """Teach a network what the one that it was made of knows, in place.

    For networks that were converted elsewhere or earlier, or made smaller by another tool:
    :func:`optimize` does the same at its end, and compares features within the networks, too.

    Args:
        model: the student; left in evaluation mode, on its device.
        original: the teacher, evaluated in evaluation mode; left as it was.
        data: images to learn from where the recovery has none of its own, in any form that
            calibration images take.
        recovery: the time, such as "10min", or a :class:`Recovery`. On a GPU where there is one.
        out: folder that keeps how far it has come: interrupted and called again with the same
            arguments, it goes on there. None: nothing is kept.
        restart: whether to forget another call that was interrupted there.
        seed: of every random choice.
        max_images: of data, at most.
        image_size: height and width of the images of a folder, in pixels.

    Returns:
        Of each stage its name, its loss before and after on images held out, and its seconds.

    Raises:
        ArgumentError: the recovery has no time, or no loss for what the networks return.
        DataError: images or the folder can't be used.
    """
    asked = with_images(recovery, image_size, seed)
    if asked.seconds is None:
        raise ArgumentError('recovery="none" leaves nothing to do: give "bn" or a time: "10min"')
    images = load_images(data, limit=max_images, image_size=image_size, seed=seed)
    images, asked, held_out = judged(images, asked, seed)
    # A copy, because learning moves the teacher between devices.
    teacher, student = copy.deepcopy(original).eval(), model.eval()
    inputs = {
        "original": fingerprint(teacher.state_dict().items()),
        "model": fingerprint(student.state_dict().items()),
        "data": images.fingerprint(),
        "recovery": asked.described(),
        "seed": seed,
    }
    # Here, because accelerate would add seconds to `import groupconv`.
    from groupconv.recovery.stages import School

    folder = None if out is None else output_folder(out)
    store = Store(folder, repr(inputs))
    with ExitStack() as stack:
        if folder is not None:
            ranks.on_first(lambda: stack.enter_context(claimed(folder, inputs, restart=restart)))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        with torch.inference_mode():
            one = images.images[:1].to(next(teacher.parameters()).device)
            size = batch_size(largest_map(one, teacher(one)))
        school = School.of(teacher, (), images, held_out, asked, batch=size, seed=seed, store=store)
        stages = school.teach(student)
        ranks.gathered(None)
        if ranks.first():
            store.clear()
    return stages
