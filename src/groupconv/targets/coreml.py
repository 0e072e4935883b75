"""Core ML packages; they run on Apple's systems, and are checked on all."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv.errors import ExportError
from groupconv.targets import rewrites
from groupconv.targets.base import FileTarget, Opened, opened
from groupconv.targets.mil import Program
from groupconv.targets.program import exported_for
from groupconv.targets.quiet import quiet


class CoreMl(FileTarget):
    """Core ML in float32. A package is for one batch, of images of one size or of any.

    Its program is run by Core ML on macOS, and by :class:`groupconv.targets.mil.Program` elsewhere,
    which says whether it is right but not how long it takes.
    """

    name = "coreml"
    suffix = ".mlpackage"
    any_batch = False
    extra = "coreml"
    modules = ("coremltools",)

    def why_not_timed(self) -> str | None:
        reason = self.why_not()
        if reason is None and sys.platform != "darwin":
            reason = "Core ML runs on macOS; packages can be written and checked here"
        return reason

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        any_size: bool = False,
    ) -> None:
        with quiet():
            graph = exported_for(module, inputs, any_size).module()
            # Views would have to know the sizes.
            shuffle = rewrites.shuffled_by_index if any_size else rewrites.shuffled_by_views
            rewrites.replace_shuffles(graph, shuffle)
            rewrites.replace_output_padding(graph)
            rewrites.replace_circular_padding(graph)
            program = exported_for(graph, inputs, any_size).run_decompositions({})
            import coremltools

            try:
                model = coremltools.convert(
                    program,
                    convert_to="mlprogram",
                    compute_precision=coremltools.precision.FLOAT32,
                    compute_units=coremltools.ComputeUnit.CPU_ONLY,
                    minimum_deployment_target=coremltools.target.iOS16,
                    skip_model_load=True,
                )
            except Exception as error:  # Of many types.
                raise ExportError(f"Core ML can't hold the network: {error}") from error
            model.user_defined_metadata.update(metadata or {})
            model.save(str(path))

    def open(self, path: Path, inputs: tuple[Tensor, ...]) -> Opened:
        run = _on_apple(path) if sys.platform == "darwin" else Program(path)
        return opened(run, inputs)

    def nodes(self, path: Path) -> dict[str, int]:
        return Program(path).nodes()


def _on_apple(path: Path) -> Callable[..., list[Tensor]]:
    import coremltools

    model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    description = model.get_spec().description
    names = [end.name for end in description.input]
    results = [end.name for end in description.output]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        found = model.predict(arrays)
        return [torch.from_numpy(found[name]) for name in results]

    return run
