"""Convert a network for LiteRT: ``python -m benchmarks.litert_network NAME BATCH PATH``."""

import sys

import litert_torch

from benchmarks import zoo


def main(name: str, batch: int, path: str) -> None:
    """Write ``path``, a .tflite file whose images are NHWC."""
    model = litert_torch.to_channel_last_io(zoo.build(name), args=[0]).eval()
    image = zoo.images(name, batch).movedim(1, -1).contiguous()
    litert_torch.convert(model, (image,)).export(path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
