"""Hugging Face's parquet files, where pyarrow is installed; and what is said where it is not."""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from labelled_images import open_label_table

from pipeline.config import DataConfig
from pipeline.data.dataset import open_datasets
from pipeline.data.index import DatasetIndex
from pipeline.data.reader import Reader
from pipeline.data.scan import scan_classes, scan_label_table
from pipeline.errors import LocalUserError, UserError

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
    found = scan_label_table(open_label_table(image_folders / "val", tmp_path / "several.parquet"))
    expected = [[int(k > 0), int(k == 1), int(k == 2)] for k in folders.labels.tolist()]
    assert found.classes == folders.classes and found.labels.tolist() == expected


def write_images(file: Path, labels: list, kind: str, names: list[str] | None = None, struct: bool = True) -> Path:
    """Images with these labels, of this type of pyarrow's, in one file; `struct`: in Hugging Face's structure."""
    import pyarrow as pa
    from pyarrow import parquet

    stream = io.BytesIO()
    photo(0, 30, 30).save(stream, "JPEG")
    content = stream.getvalue()
    images = [{"bytes": content, "path": f"{i}.jpg"} if struct else content for i in range(len(labels))]
    of_images = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    of_labels = pa.list_(pa.int64()) if kind == "list" else pa.type_for_alias(kind)
    feature = {"feature": {"names": names}} if kind == "list" else {"names": names}
    features = {"label": feature} if names else {}
    schema = pa.schema(
        [("image", of_images), ("label", of_labels)],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    parquet.write_table(pa.table({"image": images, "label": labels}, schema), file, compression="none")
    return file


@needs_pyarrow
@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_several_labels_an_image_are_refused_where_one_is_wanted(tmp_path, names):
    file = write_images(tmp_path / "x.parquet", [[0, 2], [1], []], "list", names)
    with pytest.raises(
        UserError, match="x.parquet has several labels an image in the column label: set data.labels multi"
    ):
        scan_classes(file)


@needs_pyarrow
@pytest.mark.parametrize(
    ("label", "kind", "names", "said"),
    [("", "string", None, "''"), (" ", "string", None, "' '"), (None, "string", None, "None")]
    + [(value, "int64", ["a", "b"], str(value)) for value in (2, -1, None)]
    + [(1.0, "double", ["a", "b"], "1.0"), ("a", "string", ["a", "b"], "'a'")],
)
def test_a_label_that_is_none_is_named(tmp_path, label, kind, names, said):
    file = write_images(tmp_path / "x.parquet", [label], kind, names)
    with pytest.raises(UserError, match=rf"0_0.jpg in .*x.parquet has no label \(label is {said}\): give a split"):
        scan_classes(file)


@needs_pyarrow
def test_an_empty_label_that_an_earlier_version_kept_is_named(tmp_path):
    file, cache = write_images(tmp_path / "x.parquet", ["a", "b"], "string"), tmp_path / "cache"
    scan_classes(file, cache)
    row = json.loads(cache.read_text())
    write_images(file, ["a", ""], "string")
    row |= {"stamp": f"{file.stat().st_mtime_ns} {file.stat().st_size} 0", "labels": ["a", ""]}
    cache.write_text(json.dumps(row, separators=(",", ":")))
    with pytest.raises(UserError, match=r"x.parquet has no label \(label is ''\): give a split with labels"):
        scan_classes(file, cache)


@needs_pyarrow
def test_other_columns_of_bytes_are_not_read(image_folders, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    folders = scan_classes(image_folders / "val")
    columns = {
        "path": list(folders.names),
        "label": [folders.classes[label] for label in folders.labels],
        "md5": [hashlib.md5(name.encode()).digest() for name in folders.names],
    }
    (tmp_path / "images").symlink_to(image_folders / "val")
    columns["path"] = [f"images/{name}" for name in columns["path"]]
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    index = scan_classes(tmp_path / "t.parquet")
    assert len(index) == len(folders) and index.classes == folders.classes


@needs_pyarrow
@pytest.mark.parametrize("labels", ["single", "multi"])
def test_bytes_of_images_are_not_taken_for_their_paths(tmp_path, labels):
    file = write_images(tmp_path / "x.parquet", ["a", "b"], "string", struct=False)
    (tmp_path / "beside.txt").write_text("")
    expected = r"x.parquet has no column of images \(bytes and path\), but image, label: give another file$"
    if labels == "multi":
        expected = "x.parquet has bytes in the column image: give a table with the paths of image files there$"
    with pytest.raises(UserError, match=expected):
        scan_classes(file) if labels == "single" else scan_label_table(open_label_table(tmp_path, file))


@needs_pyarrow
def test_damage_is_named_in_one_line(tmp_path, image_folders):
    from pyarrow import parquet

    file = write_images(tmp_path / "x.parquet", ["a", "b"], "string")
    whole, footer = file.read_bytes(), parquet.ParquetFile(file).metadata
    of_row_group = [footer.row_group(0).column(i) for i in range(3)]

    def damage(start: int, count: int) -> None:
        content = bytearray(whole)
        content[start : start + count] = bytes(byte ^ 0x5A for byte in content[start : start + count])
        file.write_bytes(content)

    index = scan_classes(file)
    for column in of_row_group:
        damage(column.dictionary_page_offset or column.data_page_offset, 8)
        with pytest.raises(
            UserError, match=r"^row group 0 of .*x.parquet cannot be read \([^\n]+\): download the file again$"
        ):
            scan_classes(file)
    damage(of_row_group[0].dictionary_page_offset, 8)
    again = pickle.loads(pickle.dumps(index))
    with pytest.raises(
        LocalUserError, match=r"0_0.jpg in .*: row group 0 of .*x.parquet cannot be read \([^\n]+\)[^\n]*$"
    ):
        Reader(again).read(0)
    damage(len(whole) - 12, 4)
    with pytest.raises(UserError, match=r"^\S*x.parquet is not a whole parquet file \([^\n]+\): download it again$"):
        scan_classes(file)

    table = image_folders / "val"
    write_paths(tmp_path / "paths.parquet", scan_classes(table))
    content = bytearray((tmp_path / "paths.parquet").read_bytes())
    content[4:12] = bytes(8)
    (tmp_path / "paths.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"paths.parquet cannot be read \([^\n]+\): download it again$"):
        scan_label_table(open_label_table(table, tmp_path / "paths.parquet"))


def write_paths(file: Path, index: DatasetIndex) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": list(index.names), "label": index.labels.tolist()}), file)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    config = DataConfig(dir=str(tmp_path), train="data/train-*.parquet", holdout=1)
    with pytest.raises(UserError, match="parquet is a parquet file, and pyarrow is not installed: pip install pyarrow"):
        open_datasets(config, tmp_path, progress=False)
