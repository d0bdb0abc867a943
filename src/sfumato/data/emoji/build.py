"""Drawings of several styles → rows with captions and splits → one parquet file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from sfumato.config import from_dict
from sfumato.data.emoji.names import Emoji, Names, fold, has_skin_tone, normal_code
from sfumato.data.emoji.packages import Package, fetch, read_members
from sfumato.decode import decode
from sfumato.errors import BadData, NoResources
from sfumato.files import write_atomically

Row = dict[str, Any]
INK = "#1a1a1a"  # of drawings that take their colour from the page
TEXTS = ["caption", "name", "alt_names", "tags", "concept", "group", "subgroup", "hexcode", "kind", "style"]
COLUMNS = [
    "id",
    "image",
    *TEXTS,
    "style_phrase",
    "family",
    "core",
    "split",
    "source",
    "version",
    "licence",
    "attribution",
]
LISTS = ("alt_names", "tags")


@dataclass(frozen=True)
class StyleConfig:
    """One style: a package of drawings, and how it is joined to the emoji.

    Args:
        style, phrase: its name, and the words for it in captions.
        family: styles of one family are near-copies, and are held out together.
        package, version, integrity, licence, attribution: where it comes from.
        pictures: pattern of the package's picture files, named by code points; empty for an Iconify set.
        codes_from: style whose code points hold where this one has none.
        variants: the set has several drawings of one emoji, told apart by ``-1``, ``-2``, all of them kept.
        nameless: what becomes of a drawing that is no known emoji: ``keep`` it by its own name, or ``drop``.
        core: whether its drawings may be in the core.
        drop: subgroups that are left out.
    """

    style: str
    phrase: str
    family: str
    package: str
    version: str
    integrity: str
    licence: str
    attribution: str
    pictures: str = ""
    codes_from: str = ""
    variants: bool = False
    nameless: str = "keep"
    core: bool = True
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamesConfig:
    """The package of names, and the styles whose names for their drawings are taken as further ones."""

    package: str
    version: str
    integrity: str
    licence: str
    styles: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitConfig:
    """What is held out, among core concepts drawn by at least ``families`` families outside ``never`` groups.

    Args:
        seed: of the order in which concepts are taken.
        test_concept: concepts held out in every style.
        test_combo, val_combo: family → concepts held out in that family alone.
    """

    seed: int
    families: int
    test_concept: int
    test_combo: Mapping[str, int]
    val_combo: Mapping[str, int]
    never: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleConfig:
    """The concepts and styles of the small sample, train split only."""

    styles: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus: its sizes, sources, splits, and the hashes its rows and pixels should have."""

    name: str
    renderer: str
    names: NamesConfig
    styles: tuple[StyleConfig, ...]
    split: SplitConfig
    core_groups: tuple[str, ...]
    size: int = 64
    render_size: int = 256
    sample: SampleConfig = field(default_factory=SampleConfig)
    expect: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """One drawing: name, code points if it says, the set's own category, and an SVG or an encoded picture."""

    name: str
    code: str | None
    category: str
    content: str | bytes


def load_config(path: Path) -> CorpusConfig:
    """Read a corpus recipe; raises BadData for what is unreadable, unknown or of the wrong type."""
    try:
        return from_dict(CorpusConfig, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        reason = getattr(e, "strerror", None) or (str(e).splitlines() or [type(e).__name__])[0]
        raise BadData(f"{path}: not a readable recipe ({reason})") from None


def prepare(
    config: CorpusConfig, out: Path, note: Callable[[str], None], pool: Executor | None = None
) -> dict[str, Any]:
    """Fetch, render, join, split and write a corpus, its sample and its manifest; returns the manifest.

    Raises NoResources where npm, the renderer or disk space is missing, BadData where a package is not as pinned.
    """
    _check_renderer(config.renderer)
    out.mkdir(parents=True, exist_ok=True)
    archives = out / "packages"
    emojibase = fetch(Package(config.names.package, config.names.version, config.names.integrity), archives)
    paths = {s.style: fetch(Package(s.package, s.version, s.integrity), archives) for s in config.styles}
    names = Names(emojibase, [read_icons(paths[s]) for s in config.names.styles])
    rows: list[Row] = []
    for style in config.styles:
        counts: Counter[str] = Counter()
        other = paths.get(style.codes_from)
        drawings = read_drawings(style, paths[style.style], config.render_size, other)
        rows += build_style(style, drawings, names, config, counts, pool)
        note(f"{style.style}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    finish(rows, config)
    rows.sort(key=lambda r: hashlib.md5(r["id"].encode()).hexdigest())
    manifest = {"name": config.name, "pictures": len(rows), "renderer": config.renderer, **hashes(rows)}
    manifest["file"] = write_rows(rows, out / f"{config.name}{config.size}.parquet")
    if config.sample.styles:
        chosen = [r for r in rows if _in_sample(r, config.sample)]
        manifest["sample"] = {"pictures": len(chosen), **hashes(chosen)}
        write_rows(chosen, out / "sample.parquet")
    manifest["packages"] = [
        {"name": s.package, "version": s.version, "licence": s.licence} for s in (*config.styles, config.names)
    ]
    write_atomically(out / "ATTRIBUTION.md", attribution(config, rows).encode())
    write_atomically(out / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


# ── drawings ───────────────────────────────────────────────────────────────────────────────────────────


def read_icons(archive: Path) -> dict[str, Any]:
    """Return an Iconify set, its code points under ``chars`` and its categories under ``categories``."""
    files = read_members(archive, r"(icons|chars|metadata)\.json")
    icons = json.loads(files["icons.json"])
    metadata = json.loads(files.get("metadata.json", b"{}"))
    return {**icons, "chars": json.loads(files.get("chars.json", b"{}")), "categories": metadata.get("categories", {})}


def read_drawings(style: StyleConfig, archive: Path, size: int, codes_from: Path | None) -> Iterator[Drawing]:
    """Yield a style's drawings in its package's order, hidden ones left out."""
    if style.pictures:
        for path, data in sorted(read_members(archive, style.pictures).items()):
            name = Path(path).stem
            yield Drawing(name, normal_code(name), "", data)
        return
    icons = read_icons(archive)
    codes = _codes(icons)
    if codes_from is not None:
        codes = {**_codes(read_icons(codes_from)), **codes}
    categories: dict[str, str] = {}
    for category, members in icons["categories"].items():
        for name in members:
            categories.setdefault(name, category)
    for name, icon in icons["icons"].items():
        if not icon.get("hidden"):
            yield Drawing(name, codes.get(name), categories.get(name, ""), svg(icons, icon, size))


def svg(icons: Mapping[str, Any], icon: Mapping[str, Any], size: int) -> str:
    """Return an icon of an Iconify set as an SVG of size × size."""
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" '
        f'height="{size}" viewBox="{left} {top} {width} {height}" color="{INK}">{icon["body"]}</svg>'
    )


class Drawn(NamedTuple):
    """A rendered drawing: its RGB pixels, and what is the same for two drawings that count as one."""

    pixels: bytes
    likeness: bytes


def draw(content: str | bytes, size: int) -> Drawn | None:
    """Render a drawing on white at size × size; None if nothing is to be seen."""
    if isinstance(content, str):
        import resvg_py

        content = bytes(resvg_py.svg_to_bytes(svg_string=content, skip_system_fonts=True))
    image = decode(content)
    if image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if image.getextrema() == ((255, 255),) * 3:
        return None
    pixels = image.resize((size, size), Image.Resampling.LANCZOS).tobytes()
    # Likeness is judged through the bicubic filter, as it was when the corpus was first made: two flags hang on it.
    return Drawn(pixels, hashlib.sha256(image.resize((size, size), Image.Resampling.BICUBIC).tobytes()).digest())


def _codes(icons: Mapping[str, Any]) -> dict[str, str]:
    codes: dict[str, str] = {}
    for code, name in icons["chars"].items():
        codes.setdefault(name, normal_code(code))
    return codes


def _check_renderer(wanted: str) -> None:
    name, _, version = wanted.partition("==")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise NoResources(f"{name} is needed to render the drawings: pip install 'sfumato[data]'") from None
    if found != version:
        raise NoResources(f"{name} {found} may draw other pixels than {version}: pip install {wanted}")


# ── rows ───────────────────────────────────────────────────────────────────────────────────────────────


def build_style(
    style: StyleConfig,
    drawings: Iterable[Drawing],
    names: Names,
    config: CorpusConfig,
    counts: Counter[str],
    pool: Executor | None = None,
) -> list[Row]:
    """Return a style's rows: one for each emoji, no skin tones, no blanks, no two equal pictures.

    ``counts`` tells what became of all drawings. A picture that repeats another adds its name to that one's others.
    """
    wanted: list[tuple[Drawing, Emoji | None]] = []
    for d in drawings:
        if "skin-tone" in d.name or (d.code and has_skin_tone(d.code)):
            counts["skin tones"] += 1
            continue
        emoji = _emoji(d, style, names)
        if emoji is None and style.nameless == "drop":
            counts["nameless"] += 1
        elif emoji is not None and emoji.subgroup in style.drop:
            counts["of dropped groups"] += 1
        else:
            wanted.append((d, emoji))
    rows: list[Row] = []
    taken: set[str] = set()
    known: dict[bytes, Row] = {}
    drawn = (pool.map if pool else map)(_draw_one, [d.content for d, _ in wanted], [config.size] * len(wanted))
    for (d, emoji), picture in zip(wanted, drawn, strict=True):
        row = _row(d, emoji, style)
        if row["key"] in taken and not style.variants:
            counts["repeated emoji"] += 1
        elif isinstance(picture, str) or picture is None:
            counts["blank" if picture is None else f"failed ({d.name}: {picture})"] += 1
        elif picture.likeness in known:
            counts["repeated pictures"] += 1
            first = known[picture.likeness]
            if row["name"] not in (first["name"], *first["alt_names"]):
                first["alt_names"].append(row["name"])
        else:
            counts["pictures"] += 1
            taken.add(row["key"])
            rows.append({**row, "image": _png(picture.pixels, config.size)})
            known[picture.likeness] = rows[-1]
    return rows


def _draw_one(content: str | bytes, size: int) -> Drawn | str | None:
    try:
        return draw(content, size)
    except Exception as e:  # a drawing that the renderer refuses is counted, with its reason
        return str(e)[:100] or type(e).__name__


def _emoji(d: Drawing, style: StyleConfig, names: Names) -> Emoji | None:
    if d.code in names.emoji:
        return names.emoji[d.code]
    found = names.find(d.name)
    return names.find(re.sub(r"-\d$", "", d.name)) if found is None and style.variants else found


def _row(d: Drawing, emoji: Emoji | None, style: StyleConfig) -> Row:
    if emoji is not None:
        label, tags, group, subgroup, key = emoji.label, emoji.tags, emoji.group, emoji.subgroup, emoji.code
    else:
        label = (re.sub(r"-\d+$", "", d.name) if style.variants else d.name).replace("-", " ")
        label = re.sub(r"^flag for (flag )?(.*)", lambda m: f"flag: {m[2].title()}", label)
        group, subgroup = d.category.lower().replace(" & ", "-").replace(" ", "-"), ""
        if label.startswith("flag: "):
            group, subgroup = "flags", "country-flag"
        tags, key = [], "x-" + fold(label)
    return {"id": f"{style.style}/{d.name}", "key": key, "name": label, "alt_names": [], "tags": list(tags),
            "concept": fold(label), "group": group or "other", "subgroup": subgroup,
            "hexcode": emoji.code if emoji else "", "kind": "emoji", "style": style.style,
            "style_phrase": style.phrase, "family": style.family, "source": style.package, "version": style.version,
            "licence": style.licence, "attribution": style.attribution}  # fmt: skip


def _png(pixels: bytes, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (size, size), pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ── captions, core and splits ──────────────────────────────────────────────────────────────────────────


def finish(rows: list[Row], config: CorpusConfig) -> None:
    """Tidy names, write captions, and mark core and split, in place."""
    styles = {s.style: s for s in config.styles}
    for r in rows:
        clock = re.search(r"o['’]clock|-thirty$", r["name"]) is not None
        in_core = r["group"] in config.core_groups and bool(r["hexcode"]) and not clock
        r["core"] = styles[r["style"]].core and in_core
        r["name"], r["alt_names"] = tidy(r["name"]), [tidy(n) for n in r["alt_names"]]
        r["caption"] = f"{r['name']}, {r['style_phrase']}"
    held = hold_out(rows, config.split)
    for r in rows:
        r["split"] = held.get((r["concept"], r["family"])) or held.get((r["concept"], "")) or "train"


def tidy(name: str) -> str:
    """Write a name as people would type it."""
    name = name.replace("“", "").replace("”", "").replace("’", "'").strip()
    return re.sub(r"^keycap: ", "keycap ", re.sub(r"^flag: ", "flag of ", name)).lower()


def hold_out(rows: list[Row], config: SplitConfig) -> dict[tuple[str, str], str]:
    """Return (concept, family) → split of what is held out; family '' stands for all."""
    families: dict[str, set[str]] = defaultdict(set)
    groups: dict[str, str] = {}
    for r in rows:
        if r["core"]:
            families[r["concept"]].add(r["family"])
            groups[r["concept"]] = r["group"]
    concepts = sorted(c for c, f in families.items() if len(f) >= config.families and groups[c] not in config.never)
    random.Random(config.seed).shuffle(concepts)
    held = {(c, ""): "test_concept" for c in concepts[: config.test_concept]}
    left = concepts[config.test_concept :]
    for split in ("test_combo", "val_combo"):
        for family, count in getattr(config, split).items():
            chosen = [c for c in left if family in families[c]][:count]
            held |= {(c, family): split for c in chosen}
            left = [c for c in left if c not in set(chosen)]
    return held


# ── files ──────────────────────────────────────────────────────────────────────────────────────────────


def hashes(rows: list[Row]) -> dict[str, str]:
    """SHA-256 of all columns but the picture, and of the pixels, whichever way they are packed."""
    columns, pixels = hashlib.sha256(), hashlib.sha256()
    for r in rows:
        columns.update(json.dumps([r[c] for c in COLUMNS if c != "image"]).encode() + b"\n")
        pixels.update(Image.open(io.BytesIO(r["image"])).convert("RGB").tobytes())
    return {"columns_sha256": columns.hexdigest(), "pixels_sha256": pixels.hexdigest()}


def write_rows(rows: list[Row], path: Path) -> dict[str, str]:
    """Write rows as parquet and return the file's name and SHA-256."""
    types = {"image": pa.binary(), "core": pa.bool_(), **dict.fromkeys(LISTS, pa.list_(pa.string()))}
    schema = pa.schema([(c, types.get(c, pa.string())) for c in COLUMNS])
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([{c: r[c] for c in COLUMNS} for r in rows], schema=schema)
    pq.write_table(table, buffer, compression="zstd", row_group_size=2000)
    write_atomically(path, buffer.getvalue())
    return {"name": path.name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}


def attribution(config: CorpusConfig, rows: list[Row]) -> str:
    """Say whose drawings and names these are, as their licences ask."""
    counts = Counter(r["style"] for r in rows)
    lines = [f"| {s.style} | {s.attribution} | {s.package} {s.version} | {s.licence} | {counts[s.style]} |"
             for s in config.styles]  # fmt: skip
    names = config.names
    return "\n".join([
        f"# {config.name}: {len(rows)} pictures, and whose they are", "",
        "| style | drawn by | package | licence | pictures |", "|---|---|---|---|---|", *lines, "",
        f"Names and tags: {names.package} {names.version}, {names.licence}.",
        "The drawings were rendered, put on white and scaled down.", "",
    ])  # fmt: skip


def _in_sample(row: Row, sample: SampleConfig) -> bool:
    held_in = row["core"] and row["split"] == "train"
    return held_in and row["style"] in sample.styles and row["concept"] in sample.concepts
