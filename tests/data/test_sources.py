"""Folders, metadata.jsonl, parquet, tar shards and IDX say the same, and nothing in them is lost in silence."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sfumato.data.config import SAMPLE
from sfumato.data.sources import FASHION, Source, open_source
from sfumato.decode import PictureError
from sfumato.errors import BadData

CAPTIONS = ["a red square", "a green square", "a blue square"]


def picture(i: int, size: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), [(255, 0, 0), (0, 128, 0), (0, 0, 255)][i]).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path) -> Path:
    (root / "deep").mkdir(parents=True)
    for i, name in enumerate(["a", "b", "deep/c"]):
        (root / f"{name}.png").write_bytes(picture(i))
        (root / f"{name}.txt").write_text(CAPTIONS[i] + "\n")
    return root


def write_jsonl(root: Path) -> Path:
    root.mkdir()
    lines = []
    for i, name in enumerate("abc"):
        (root / f"{name}.png").write_bytes(picture(i))
        lines.append(json.dumps({"file_name": f"{name}.png", "text": CAPTIONS[i]}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def write_parquet(path: Path, column: str = "image", **more: list[Any]) -> Path:
    pq.write_table(pa.table({column: [picture(i) for i in range(3)], "caption": CAPTIONS, **more}), path)
    return path


def write_hub_parquet(root: Path) -> Path:
    root.mkdir()
    cells = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)]
    pq.write_table(pa.table({"image": cells, "text": CAPTIONS}), root / "train-00000-of-00001.parquet")
    return root


def write_tar(path: Path, end: bool = True) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, key in enumerate(["x/0", "x/1.5", "2"]):
            for suffix, data in ((".seg.txt" if i == 1 else ".txt", CAPTIONS[i].encode()), (".png", picture(i))):
                if i == 1:  # the key ends at the first dot of the file name
                    suffix = suffix.replace(".seg", "")
                    key = "x/1"
                info = tarfile.TarInfo(key + suffix)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("2.json")
        body = json.dumps({"label": 7}).encode()
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    return path


WRITERS = {
    "folder": write_folder,
    "metadata.jsonl": write_jsonl,
    "parquet": write_parquet,
    "hub parquet": write_hub_parquet,
    "tar": write_tar,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    source = open_source(WRITERS[kind](tmp_path / "data"))
    assert [r.row["caption"] for r in source.records] == CAPTIONS
    assert [r.read() for r in source.records] == [picture(i) for i in range(3)]
    assert not any(r.problem or r.caption_problem for r in source.records if kind != "tar")
    backwards = [r.read() for r in reversed(source.records)]
    assert backwards == [picture(i) for i in (2, 1, 0)]


def test_columns_come_along(tmp_path: Path) -> None:
    assert open_source(write_tar(tmp_path / "t.tar")).records[2].row == {"caption": CAPTIONS[2], "label": 7}
    assert open_source(write_hub_parquet(tmp_path / "hub")).records[0].row["split"] == "train"
    source = open_source(write_parquet(tmp_path / "p.parquet", style=["x", "y", "z"]))
    assert source.columns == ["caption", "style"]


def test_the_kind_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    assert len(open_source(write_parquet(tmp_path / "odd.bin")).records) == 3
    assert len(open_source(write_tar(tmp_path / "odd.data")).records) == 3


def test_a_folder_of_shards_is_their_sum(tmp_path: Path) -> None:
    for name in ("01.tar", "00.tar"):
        write_tar(tmp_path / name)
    records = open_source(tmp_path).records
    assert [r.name for r in records] == [f"{s}.tar/{k}.png" for s in ("00", "01") for k in ("x/0", "x/1", "2")]


def test_tables_beside_their_shards_are_no_data(tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        write_tar(tmp_path / f"{name}.tar")
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"{name}.parquet")
    source = open_source(tmp_path)
    assert len(source.records) == 6
    assert source.ignored == {".parquet": 2}


def test_pipes_and_dead_links_are_bad_and_do_not_hang(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe.txt")
    (root / "dead.png").symlink_to("nowhere.png")
    (root / "dead.txt").write_text("words")
    for record in open_source(root).records:
        if record.name in ("pipe.png", "dead.png"):
            with pytest.raises(PictureError, match="leads nowhere"):
                record.read()


def problems(source: Source) -> dict[str, str | None]:
    return {r.name: r.problem or (r.caption_problem if "caption" not in r.row else None) for r in source.records}


def test_what_is_wrong_in_a_folder_is_said(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    (root / "lonely.png").write_bytes(picture(0))
    (root / "orphan.txt").write_text("words")
    (root / "phone.heic").write_bytes(b"x")
    (root / "long.png").write_bytes(picture(0))
    (root / "long.txt").write_bytes(b"x" * 1_000_000)
    (root / "latin.png").write_bytes(picture(0))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "README.txt").write_text("about these pictures")
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.md").write_text("")
    source = open_source(root)
    found = {k: v for k, v in problems(source).items() if v}
    assert found.keys() == {"lonely.png", "orphan.txt", "phone.heic", "long.png", "latin.png"}
    assert "lonely.txt is missing" in str(found["lonely.png"])
    assert "1,000,000 bytes" in str(found["long.png"])
    assert "UTF-8" in str(found["latin.png"])
    assert "convert" in str(found["phone.heic"])
    assert source.ignored == {".md": 1, ".txt": 1}


def test_what_is_wrong_in_metadata_is_said(tmp_path: Path) -> None:
    root = write_jsonl(tmp_path / "data")
    (root / "unlisted.png").write_bytes(picture(0))
    with (root / "metadata.jsonl").open("a") as f:
        f.write('\nnot json\n{"text": "no file"}\n{"file_name": "gone.png", "text": "x"}\n')
        f.write('{"file_name": "../secret.png", "text": "x"}\n{"file_name": "/etc/passwd", "text": "x"}\n[1]\n')
    found = problems(open_source(root))
    assert len(found) == 10
    assert sum(v is None for v in found.values()) == 3
    assert "no line" in str(found["unlisted.png"])
    assert "no file gone.png" in str(found["gone.png"])
    assert [v for v in found.values() if v and "out of the folder" in v] != []


def test_json_in_a_tar_that_is_no_object_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("a.png", picture(0)),
            ("a.json", b"[[1, 2]]"),
            ("b.png", picture(1)),
            ("b.json", b'["ab"]'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert all("is not JSON" in str(v) for v in problems(open_source(path)).values())


def test_a_cut_tar_keeps_what_came_before(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar")
    whole = path.read_bytes()
    for cut in (700, 1600, 2700, 3300):
        path.write_bytes(whole[:cut])
        records = open_source(path).records
        assert any(r.problem for r in records), cut


def test_a_damaged_header_in_a_tar_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar")
    data = bytearray(path.read_bytes())
    data[2048:2060] = b"garbage here"
    path.write_bytes(data)
    assert any("damaged" in str(r.problem) for r in open_source(path).records)


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(0))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        tar.addfile(info)
        text = tarfile.TarInfo("a.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    (record,) = open_source(tmp_path / "t.tar").records
    assert "no picture" in str(record.problem)


def test_text_that_is_not_utf8_in_parquet_is_kept_to_be_reported(tmp_path: Path) -> None:
    captions = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 2, captions.buffers())
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "caption": captions}), tmp_path / "p.parquet")
    assert [r.row["caption"] for r in open_source(tmp_path / "p.parquet").records] == ["fine", "caf\udce9"]


def test_damage_inside_a_parquet_file_is_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells = [rng.bytes(20_000) for _ in range(200)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"caption": ["x"] * 200, "image": cells}), path, row_group_size=50, compression="zstd")
    data = bytearray(path.read_bytes())
    # the header of a page in the middle of the picture column
    middle = pq.ParquetFile(path).metadata.row_group(2).column(1)
    start = middle.dictionary_page_offset or middle.data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    bad = 0
    for record, cell in zip(open_source(path).records, cells, strict=True):
        try:
            assert record.read() == cell
        except PictureError:
            bad += 1
    assert 100 <= bad <= 164


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no data at .*holds no 'data'"),
        (lambda p: p.mkdir(), "holds nothing"),
        (lambda p: p.write_text("hello"), "neither a folder"),
        (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(600)), "compressed tar"),
        (lambda p: p.write_bytes(b"PAR1" + bytes(600)), "not a readable parquet"),
        (lambda p: pq.write_table(pa.table({"caption": ["x"]}), p), "no column of picture bytes"),
        (lambda p: (p.mkdir(), (p / "a.doc").touch()), "1 files of other kinds"),
        (lambda p: (p.mkdir(), write_tar(p / "a.tar"), write_parquet(p / "b.parquet")), "parquet files and tar shards"),
    ],
)
def test_data_that_cannot_be_read(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(BadData, match=message) as caught:
        open_source(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(BadData, match="did you mean 'pictures'"):
        open_source(tmp_path / "pictrues")


def test_a_folder_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = write_parquet(tmp_path / "p.parquet")
    path.chmod(0)
    with pytest.raises(BadData, match="Permission"):
        open_source(path)


# ── IDX ────────────────────────────────────────────────────────────────────────────────────────────────

FIRST = {"train": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "t10k": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}


def write_idx(root: Path, prefix: str, labels: list[int], end: str = ".gz") -> np.ndarray:
    root.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    header = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    pack = gzip.compress if end else bytes
    (root / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(header + images.tobytes()))
    header = bytes([0, 0, 8, 1]) + np.array([len(labels)], ">u4").tobytes()
    (root / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(header + bytes(labels)))
    return images


@pytest.mark.parametrize("end", ["", ".gz"])
def test_fashion_mnist(end: str, tmp_path: Path) -> None:
    train = write_idx(tmp_path / "fm", "train", FIRST["train"] + [1], end)
    write_idx(tmp_path / "fm", "t10k", FIRST["t10k"], end)
    source = open_source(tmp_path / "fm")
    assert [r.row["split"] for r in source.records] == ["train"] * 11 + ["test"] * 10
    assert [r.row["caption"] for r in source.records[:3]] == ["Ankle boot", "T-shirt/top", "T-shirt/top"]
    assert source.records[10].row == {"caption": FASHION[1], "label": 1, "split": "train"}
    pixels = np.asarray(Image.open(io.BytesIO(source.records[4].read())))
    assert (pixels == train[4]).all()


def test_other_labels_are_numbers_unless_named(tmp_path: Path) -> None:
    write_idx(tmp_path / "m", "train", [5, 0, 4])
    assert [r.row["caption"] for r in open_source(tmp_path / "m").records] == ["5", "0", "4"]
    (tmp_path / "m" / "classes.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    assert open_source(tmp_path / "m").records[0].row["caption"] == "digit 5"


def test_damaged_idx_files(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_idx(root, "train", [5, 0, 4])
    labels = root / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for data, message in (
        (whole[:-9], "cannot be read"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "where its header says 3"),
        (gzip.compress(b"nonsense"), "not an IDX file"),
    ):
        labels.write_bytes(data)
        with pytest.raises(BadData, match=message):
            open_source(root)
    labels.unlink()
    with pytest.raises(BadData, match="missing"):
        open_source(root)


def test_the_sample_may_be_shipped() -> None:
    records = open_source(SAMPLE).records
    assert len(records) == 324
    assert {r.row["licence"] for r in records} == {"MIT", "Apache-2.0"}
    assert all(r.row["core"] and r.row["split"] == "train" for r in records)
    assert SAMPLE.stat().st_size < 2_000_000
    text = (SAMPLE.parent / "ATTRIBUTION.md").read_text()
    assert all(f"`{r.row['source']}` {r.row['version']}" in text for r in records)
