"""Folders, metadata.jsonl, parquet, tar shards and IDX files, all read as one list of records.

No picture is decoded here. What is wrong with a record is written in the record, so that nothing is lost in silence.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sfumato.console import printable
from sfumato.data.captions import MAX_CHARACTERS
from sfumato.decode import MAX_BYTES, SUFFIXES, UNSUPPORTED, PictureError
from sfumato.errors import BadData, nearest

PICTURE_COLUMNS = ("image", "picture", "img", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FASHION_LABELS = {"train": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "test": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}  # the first ten


@dataclass(frozen=True)
class Record:
    """One picture with its columns.

    Args:
        name: where it lies inside the data, for reports.
        row: its columns; ``caption`` holds the words, where there are any.
        read: returns the encoded picture; raises PictureError.
        problem: what is wrong with it already, before the picture is read.
        caption_problem: why it has no caption.
        unreadable: whether words are there that cannot be read.
    """

    name: str
    row: dict[str, Any]
    read: Callable[[], bytes]
    problem: str | None = None
    caption_problem: str | None = None
    unreadable: bool = False


@dataclass(frozen=True)
class Source:
    """All records of a data set, in an order that depends on its files' names alone.

    ``ignored`` counts the files that hold no data, by suffix; ``seekable`` says that any record can be read at once.
    """

    path: Path
    records: list[Record]
    ignored: Counter[str] = field(default_factory=Counter)
    seekable: bool = True

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of all columns that any record has."""
        return sorted({column for record in self.records for column in record.row})


def open_source(path: Path) -> Source:
    """List the records of a folder, parquet file or tar shard; raises BadData for what cannot be read at all."""
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise BadData(f"no data at {printable(str(path))}{_nearby(path)}")
        with path.open("rb") as f:
            head = f.read(512)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise BadData(f"cannot read {printable(str(path))}: {reason}") from None
    if head.startswith(b"PAR1"):
        return Source(path, list(_parquet(path, path.name)), seekable=False)
    if head[257:262] == b"ustar":
        return Source(path, list(_tar(path, path.name)))
    raise BadData(
        f"{printable(str(path))} is neither a folder, a parquet file nor a tar shard"
        + (" (a compressed tar cannot be read at random: unpack it)" if head.startswith(b"\x1f\x8b") else "")
    )


def _nearby(path: Path) -> str:
    folder = next((p for p in path.parents if p.is_dir()), None)
    if folder is None:
        return ""
    missing = path.relative_to(folder).parts[0]
    near = nearest(missing, [p.name for p in itertools.islice(folder.iterdir(), 1000)])
    return f": {printable(str(folder))} holds no {printable(missing)!r}{printable(near)}"


# ── folders ────────────────────────────────────────────────────────────────────────────────────────────


def _folder(root: Path) -> Source:
    files = sorted(_walk(root))
    kinds = {
        "IDX files": [f for f in files if _idx_split(f) is not None],
        "parquet files": [f for f in files if f.suffix.lower() == ".parquet" and not _tells_of_others(f, files)],
        "tar shards": [f for f in files if f.suffix.lower() == ".tar"],
        "pictures": [f for f in files if f.name == METADATA or f.suffix.lower() in SUFFIXES | UNSUPPORTED],
    }
    found = [kind for kind, of_kind in kinds.items() if of_kind]
    where = printable(str(root))
    if not found:
        has = f"{len(files)} files of other kinds" if files else "nothing"
        raise BadData(f"no pictures in {where}: it holds {has}; wanted: pictures, {METADATA}, .parquet or .tar files")
    if len(found) > 1:
        raise BadData(f"{where} holds {' and '.join(found)}: point at one kind, in a folder of its own")
    kind, chosen = found[0], kinds[found[0]]
    names = [f.as_posix() for f in chosen]
    ignored = Counter(f.suffix.lower() or f.name for f in files if f not in set(chosen))
    if kind == "IDX files":
        return Source(root, [r for split in _idx_splits(chosen) for r in _idx(root, split, chosen)], ignored)
    if kind == "parquet files":
        records = [r for f, n in zip(chosen, names, strict=True) for r in _parquet(root / f, n)]
        return Source(root, records, ignored, seekable=False)
    if kind == "tar shards":
        return Source(root, [r for f, n in zip(chosen, names, strict=True) for r in _tar(root / f, n)], ignored)
    return _pictures(root, files)


def _tells_of_others(file: Path, files: list[Path]) -> bool:
    """img2dataset writes 00000.parquet, without pictures, beside 00000.tar or the folder 00000."""
    stem = file.with_suffix("")
    return any(f == file.with_suffix(".tar") or stem in f.parents for f in files)


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files below a folder by their relative paths, hidden ones left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__MACOSX"]
        yield from (Path(folder, n).relative_to(root) for n in names if not n.startswith("."))


def _pictures(root: Path, files: list[Path]) -> Source:
    taken: set[Path] = set()
    records: list[Record] = []
    listed = [f for f in files if f.name == METADATA]
    for metadata in listed:
        taken.add(metadata)
        records += _metadata(root, metadata, taken)
    governed = {f.parent for f in listed}
    present = set(files)
    for f in files:
        suffix = f.suffix.lower()
        if f in taken or suffix not in SUFFIXES | UNSUPPORTED:
            continue
        taken.add(f)
        name, row = f.as_posix(), {"file_name": f.as_posix()}
        if governed & set(f.parents):
            records.append(Record(name, row, _reader(root / f), f"{METADATA} has no line for it"))
            continue
        beside = [f.with_suffix(s) for s in CAPTION_SUFFIXES] + [f.with_name(f.name + s) for s in CAPTION_SUFFIXES]
        found = [b for b in beside if b in present]
        taken.update(found)
        caption, problem = _read_caption(root / found[0]) if found else (None, f"{beside[0].name} is missing beside it")
        if caption is not None:
            row["caption"] = caption
        unreadable = bool(found) and caption is None
        records.append(Record(name, row, _reader(root / f), _unsupported(suffix), problem, unreadable))
    left = [f for f in files if f not in taken]
    for f in left:
        if f.suffix.lower() in CAPTION_SUFFIXES and not governed & set(f.parents) and not _is_note(f):
            records.append(Record(f.as_posix(), {}, _nothing, "a caption without a picture beside it"))
            taken.add(f)
    records.sort(key=lambda r: r.name)
    return Source(root, records, Counter(f.suffix.lower() or f.name for f in files if f not in taken))


def _is_note(file: Path) -> bool:
    """Whether a text is about the folder, not about a picture."""
    return re.match(r"(read.?me|licen[cs]e|attribution|notice|copying|classes|labels)", file.name.lower()) is not None


def _unsupported(suffix: str) -> str | None:
    return f"{suffix} pictures cannot be read: convert it to PNG or JPEG" if suffix in UNSUPPORTED else None


def _read_caption(path: Path) -> tuple[str | None, str | None]:
    if not path.is_file():
        return None, f"{path.name} is no file, or a link that leads nowhere"
    try:
        with path.open("rb") as f:
            data = f.read(8 * MAX_CHARACTERS)
            if f.read(1):
                return None, f"{path.name} has {path.stat().st_size:,} bytes, more than a caption may have"
        return _one_line(data.decode("utf-8-sig")), None
    except UnicodeDecodeError:
        return None, f"{path.name} is not UTF-8 text"
    except OSError as e:
        return None, f"{path.name} cannot be read: {e.strerror}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _metadata(root: Path, metadata: Path, taken: set[Path]) -> Iterator[Record]:
    """Read lines {"file_name": …, "text": …, …}; what they name is added to ``taken``."""
    folder = metadata.parent
    try:
        lines = (root / metadata).read_bytes().splitlines()
    except OSError as e:
        raise BadData(f"{printable(str(root / metadata))} cannot be read: {e.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        here = f"{metadata.as_posix()} line {number}"
        try:
            row = json.loads(line)
            name = row["file_name"]
            inside = PurePosixPath(name)
        except (ValueError, RecursionError):
            yield Record(here, {}, _nothing, "not a line of JSON")
            continue
        except (TypeError, KeyError):
            yield Record(here, {}, _nothing, "it names no file_name")
            continue
        if inside.is_absolute() or ".." in inside.parts or "\0" in name or "\\" in name:
            yield Record(here, {}, _nothing, "its file_name leads out of the folder")
            continue
        file = folder / inside
        taken.add(file)
        problem = _unsupported(file.suffix.lower())
        if not (root / file).is_file():
            problem = f"there is no file {inside}"
        yield Record(file.as_posix(), _with_caption(row), _reader(root / file), problem)


def _with_caption(row: dict[str, Any]) -> dict[str, Any]:
    """Give the column ``caption`` to a row that calls it otherwise."""
    if "caption" not in row:
        for column in CAPTION_COLUMNS:
            if column in row:
                return {**row, "caption": row[column]}
    return row


def _reader(path: Path, offset: int = 0, size: int | None = None) -> Callable[[], bytes]:
    def read() -> bytes:
        if not path.is_file():
            raise PictureError("no file, or a link that leads nowhere")
        try:
            with path.open("rb") as f:
                f.seek(offset)
                return f.read(MAX_BYTES + 1 if size is None else min(size, MAX_BYTES + 1))
        except OSError as e:
            raise PictureError(f"cannot be read: {e.strerror}") from None

    return read


def _nothing() -> bytes:
    raise PictureError("there is no picture")


# ── parquet ────────────────────────────────────────────────────────────────────────────────────────────


def _parquet(path: Path, name: str) -> Iterator[Record]:
    where = printable(str(path))
    try:
        file = pq.ParquetFile(path)
        column = _picture_column(file.schema_arrow, where)
        columns = [c for c in file.schema_arrow.names if c != column]
        table = file.read(columns=columns)
        rows = zip(*(_cells(table[c]) for c in columns), strict=True) if columns else [()] * file.metadata.num_rows
    except (pa.ArrowException, OSError) as e:
        raise BadData(f"{where}: not a readable parquet file ({_first_line(e)})") from None
    pictures = _ParquetPictures(path, column)
    split = {} if "split" in columns else _split_of(path)
    for i, cells in enumerate(rows):
        row = _with_caption(split | dict(zip(columns, cells, strict=True)))
        yield Record(f"{name} row {i}", row, functools.partial(pictures.read, i))


def _picture_column(schema: pa.Schema, where: str) -> str:
    def holds_bytes(t: pa.DataType) -> bool:
        if pa.types.is_struct(t):
            return any(f.name == "bytes" and holds_bytes(f.type) for f in t)
        return pa.types.is_binary(t) or pa.types.is_large_binary(t)

    for column in PICTURE_COLUMNS:
        if column in schema.names and holds_bytes(schema.field(column).type):
            return column
    raise BadData(
        f"{where}: no column of picture bytes named {' or '.join(PICTURE_COLUMNS[:3])}; it has {schema.names}"
    )


def _cells(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # text that is not UTF-8: keep the row, and let its caption be found bad
        return [None if v is None else v.decode("utf-8", "surrogateescape") for v in column.cast("binary").to_pylist()]


def _split_of(path: Path) -> dict[str, str]:
    """Shards named train-00000-of-00004.parquet say which split they are."""
    match = re.match(r"(train|test|validation|valid|val|dev)[-_.]", path.name)
    return {"split": match[1]} if match else {}


class _ParquetPictures:
    """The picture column of one file, read forwards a few rows at a time."""

    def __init__(self, path: Path, column: str):
        self.path, self.column = path, column
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._cells: list[Any] = []
        self._first = 0
        self._end: int | None = None  # where the file is damaged

    def read(self, i: int) -> bytes:
        if self._end is not None and i >= self._end:
            raise PictureError("the parquet file is damaged from here on")
        try:
            if i < self._first or not self._cells:
                self._batches = pq.ParquetFile(self.path).iter_batches(64, columns=[self.column])
                self._first, self._cells = 0, []
            while i >= self._first + len(self._cells):
                self._first += len(self._cells)
                self._cells = next(self._batches).column(0).to_pylist()
        except (pa.ArrowException, OSError, StopIteration) as e:
            self._end, self._cells = self._first, []
            raise PictureError(f"the parquet file is damaged from here on ({_first_line(e)})") from None
        cell = self._cells[i - self._first]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise PictureError("the row holds no picture bytes")
        return data


def _first_line(e: BaseException) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:200]


# ── tar shards (WebDataset) ────────────────────────────────────────────────────────────────────────────


def _tar(path: Path, name: str) -> Iterator[Record]:
    """Group members by their path up to the first dot of the file name: picture, .txt and .json of one sample."""
    where = printable(str(path))
    damage = None
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    key, dot, suffix = file.partition(".")
                    if member.isfile() and dot and key:
                        groups.setdefault(f"{folder}/{key}" if folder else key, {})["." + suffix.lower()] = member
            except (tarfile.TarError, OSError, ValueError) as e:
                damage = f"the shard is cut off or damaged ({_first_line(e)})"
            damage = damage or _unread_rest(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError) as e:
        raise BadData(f"{where}: not a readable tar file ({_first_line(e)})") from None
    size = path.stat().st_size
    for key, members in groups.items():
        yield _tar_record(path, f"{name}/{key}", members, size)
    if damage:
        yield Record(name, {}, _nothing, damage)


def _unread_rest(path: Path, offset: int) -> str | None:
    """tarfile stops in silence at a damaged header; a whole archive ends in zeros, or at its last byte."""
    with path.open("rb") as f:
        f.seek(offset)
        return f"the shard is damaged at byte {offset:,}: what follows is lost" if any(f.read(512)) else None


def _tar_record(path: Path, name: str, members: dict[str, tarfile.TarInfo], size: int) -> Record:
    row: dict[str, Any] = {}
    problem = caption_problem = None
    pictures = [s for s in members if s in SUFFIXES | UNSUPPORTED]
    for suffix, member in members.items():
        data_read = _reader(path, member.offset_data, member.size)
        if suffix in (".txt", ".caption", ".cls", ".json"):
            if member.size > 8 * MAX_CHARACTERS:
                caption_problem = f"its {suffix} has {member.size:,} bytes, more than a caption may have"
                continue
            try:
                text = data_read().decode("utf-8-sig")
                if suffix == ".json":
                    if not isinstance(found := json.loads(text), dict):
                        raise ValueError("no object")
                    row |= found
                else:
                    row["label" if suffix == ".cls" else "caption"] = _one_line(text)
            except (ValueError, TypeError, RecursionError):
                caption_problem = f"its {suffix} is not {'JSON' if suffix == '.json' else 'UTF-8 text'}"
    if not pictures:
        return Record(name, row, _nothing, f"no picture beside {', '.join(sorted(members))}")
    if len(pictures) > 1:
        problem = f"two pictures of one name: {', '.join(sorted(pictures))}"
    member = members[pictures[0]]
    if member.offset_data + member.size > size:
        problem = "cut off by the end of the shard"
    problem = problem or _unsupported(pictures[0])
    read = _reader(path, member.offset_data, member.size)
    missing, unreadable = caption_problem or "no .txt beside it", caption_problem is not None
    return Record(f"{name}{pictures[0]}", _with_caption(row), read, problem, missing, unreadable)


# ── IDX (MNIST and its kin) ────────────────────────────────────────────────────────────────────────────


def _idx_split(file: Path) -> str | None:
    match = re.fullmatch(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?", file.name)
    return match[1] if match and file.parent == Path() else None


def _idx_splits(files: Iterable[Path]) -> list[str]:
    return sorted({s for f in files if (s := _idx_split(f))}, reverse=True)  # train, t10k


def _idx(root: Path, prefix: str, files: list[Path]) -> Iterator[Record]:
    """Read images (N, H, W) and labels (N,); Fashion-MNIST's labels become words, others look in classes.txt."""

    def array(what: str, dimensions: int) -> np.ndarray:
        file = next((f for f in files if f.name.startswith(f"{prefix}-{what}")), None)
        if file is None:
            raise BadData(f"{printable(str(root))}: {prefix}-{what}-idx{dimensions}-ubyte.gz is missing")
        return _read_idx(root / file, dimensions)

    images, labels = array("images", 3), array("labels", 1)
    if len(images) != len(labels):
        raise BadData(f"{printable(str(root))}: {len(images)} {prefix} images and {len(labels)} labels")
    split = "train" if prefix == "train" else "test"
    names = _class_names(root, labels, split)
    header = b"P5 %d %d 255\n" % (images.shape[2], images.shape[1])  # a PGM picture is this and the pixels
    for i, label in enumerate(labels.tolist()):
        row = {"caption": names[label], "label": label, "split": split}
        yield Record(f"{prefix}-images {i}", row, lambda i=i: header + images[i].tobytes())


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    where = printable(str(path))
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise BadData(f"{where}: cannot be read ({_first_line(e)})") from None
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < 4 + 4 * dimensions:
        raise BadData(f"{where}: not an IDX file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if len(body) != np.prod(shape, dtype=object):
        raise BadData(f"{where}: {len(body):,} bytes where its header says {' × '.join(map(str, shape))}")
    return body.reshape(shape)


def _class_names(root: Path, labels: np.ndarray, split: str) -> list[str]:
    highest = int(labels.max(initial=0))
    if (root / "classes.txt").is_file():
        try:
            names = (root / "classes.txt").read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise BadData(f"{printable(str(root))}: classes.txt cannot be read as UTF-8 text ({e})") from None
        names = [n.strip() for n in names if n.strip()]
        if len(names) <= highest:
            raise BadData(f"{printable(str(root))}: classes.txt names {len(names)} classes, and labels go to {highest}")
        return names
    if labels[:10].tolist() == FASHION_LABELS[split] and highest == 9:
        return list(FASHION)
    return [str(i) for i in range(highest + 1)]
