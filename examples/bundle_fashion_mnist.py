"""Make the sample of Fashion-MNIST that the package carries.

    python examples/bundle_fashion_mnist.py --data /usr/share/datasets/fashion-mnist

The first 8,000 training images are for calibration, the first 2,000 test images for measuring.
"""

import argparse
from pathlib import Path

import numpy as np
from train_fashion_mnist import read

CALIBRATION, TEST = 8_000, 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/groupconv/data/fashion_mnist.npz"))
    args = parser.parse_args()
    arrays = {}
    for name, train, count in (("calibration", True, CALIBRATION), ("test", False, TEST)):
        images, labels = read(args.data, train)
        arrays[f"{name}_images"] = (images[:count, 0] * 255).round().byte().numpy()
        arrays[f"{name}_labels"] = labels[:count].byte().numpy()
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
