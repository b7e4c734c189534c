"""Hugging Face's parquet files, where pyarrow is installed; and what is said where it is not."""

import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.dataset import open_datasets
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes, scan_label_table
from pipeline.errors import UserError

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="PARQUET FILES ARE NOT TESTED: pip install pyarrow"
)


def write_parquet(folder: Path, out: Path, split: str, files: int = 2, names: bool = True) -> None:
    """The images of class folders in their order, in row groups of 5, as Hugging Face writes them."""
    import pyarrow as pa
    from pyarrow import parquet

    index = scan_classes(folder)
    features = {"image": {"_type": "Image"}, "label": {"names": list(index.classes), "_type": "ClassLabel"}}
    kinds = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    schema = pa.schema(kinds, metadata)
    out.mkdir(exist_ok=True)
    for k, rows in enumerate(np.array_split(np.arange(len(index)), files)):
        images = [
            {"bytes": (folder / index.names[i]).read_bytes(), "path": os.path.basename(index.names[i])} for i in rows
        ]
        table = pa.table({"image": images, "label": index.labels[rows].tolist()}, schema=schema)
        parquet.write_table(table, out / f"{split}-{k:05d}-of-{files:05d}.parquet", row_group_size=5)


@needs_pyarrow
def test_parquet_files_are_indexed_and_read_as_the_folders(image_folders, tmp_path, monkeypatch):
    write_parquet(image_folders / "train", tmp_path / "data", "train")
    folders = scan_classes(image_folders / "train")
    index = scan_classes(tmp_path / "data" / "train-*.parquet", tmp_path / "cache")
    assert index.classes == folders.classes
    for field in ("labels", "sizes", "lengths"):
        np.testing.assert_array_equal(getattr(index, field), getattr(folders, field))
    again = pickle.loads(pickle.dumps(index))
    for i in np.random.default_rng(0).permutation(len(folders)).tolist():
        assert Reader(again).read(i).tobytes() == Reader(folders).read(i).tobytes()
    monkeypatch.setattr("pipeline.data.scan_group._read_header", lambda *_: pytest.fail("read a header again"))
    assert scan_classes(tmp_path / "data", tmp_path / "cache").labels.tolist() == index.labels.tolist()


@needs_pyarrow
def test_without_names_labels_are_numbers_and_none_is_refused(image_folders, tmp_path):
    write_parquet(image_folders / "val", tmp_path, "val", files=1, names=False)
    assert scan_classes(tmp_path / "val-00000-of-00001.parquet").classes == ("0", "1", "2")
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "x").mkdir()
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "x" / "x.parquet")
    with pytest.raises(UserError, match=r"has no column of images \(bytes and path\), but text"):
        scan_classes(tmp_path / "x" / "x.parquet")
    (tmp_path / "x" / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="x.parquet is not a whole parquet file"):
        scan_classes(tmp_path / "x" / "x.parquet")


@needs_pyarrow
@pytest.mark.parametrize("kind", ["text", "struct"])
def test_a_parquet_file_of_paths_is_a_table(image_folders, tmp_path, kind):
    """As text, or in Hugging Face's structure without the bytes; a class is a number that the metadata name."""
    import pyarrow as pa
    from pyarrow import parquet

    folders = scan_classes(image_folders / "val")
    names = {"names": list(folders.classes), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": names, "labels": {"feature": names}}}})}
    path = pa.string() if kind == "text" else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    files = [name if kind == "text" else {"bytes": None, "path": name} for name in folders.names]
    schema = pa.schema([("image", path), ("label", pa.int64())], metadata)
    parquet.write_table(pa.table({"image": files, "label": folders.labels.tolist()}, schema), tmp_path / "val.parquet")
    config = DataConfig(dir=str(image_folders / "val"), train=str(tmp_path / "val.parquet"), holdout=1)
    index = open_datasets(config, tmp_path, progress=False)[0]
    assert index.classes == folders.classes and len(index) == len(folders) - 1
    assert all(os.path.dirname(name) == folders.classes[k] for name, k in zip(index.names, index.labels, strict=True))

    schema = pa.schema([("image", path), ("labels", pa.list_(pa.int64()))], metadata)
    several = [[0, k] if k else [] for k in folders.labels.tolist()]
    parquet.write_table(pa.table({"image": files, "labels": several}, schema), tmp_path / "several.parquet")
    found = scan_label_table(image_folders / "val", tmp_path / "several.parquet")
    expected = [[int(k > 0), int(k == 1), int(k == 2)] for k in folders.labels.tolist()]
    assert found.classes == folders.classes and found.labels.tolist() == expected


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    config = DataConfig(dir=str(tmp_path), train="data/train-*.parquet", holdout=1)
    with pytest.raises(UserError, match="parquet is a parquet file, and pyarrow is not installed: pip install pyarrow"):
        open_datasets(config, tmp_path, progress=False)
