"""Makes fashion-mnist.tar.xz from Fashion-MNIST's idx files: ``python tools/demo_data/pack.py DIR``."""

import gzip
import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["tshirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot"]
PER_CLASS = {"train": ("train", 800), "val": ("t10k", 200)}
QUALITY = 90
ARCHIVE = Path(__file__).with_name("fashion-mnist.tar.xz")


def read_idx(file: Path) -> np.ndarray:
    """The array of an idx file of bytes (http://yann.lecun.com/exdb/mnist describes the format)."""
    content = gzip.decompress(file.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main() -> None:
    source, packed = Path(sys.argv[1]), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for split, (prefix, count) in PER_CLASS.items():
            images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
            labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
            for label, name in enumerate(CLASSES):
                for i in np.flatnonzero(labels == label)[:count]:
                    jpeg = io.BytesIO()
                    Image.fromarray(images[i]).save(jpeg, "JPEG", quality=QUALITY)
                    entry = tarfile.TarInfo(f"fashion-mnist/{split}/{name}/{prefix}-{i:05d}.jpg")
                    entry.size = jpeg.tell()
                    jpeg.seek(0)
                    tar.addfile(entry, jpeg)
    ARCHIVE.write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
