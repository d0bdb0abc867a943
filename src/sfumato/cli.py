"""The ``sfumato`` command. Heavy modules are imported where they are used, so that help is quick.

Exit codes: 0 done, 1 replayed pixels differ, 2 bad request, 3 bad checkpoint, 4 bad data, 5 no resources,
130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sfumato.errors import BadCheckpoint, BadRequest, NoResources, SfumatoError
from sfumato.files import cannot_write, write_atomically
from sfumato.pipeline.inputs import PictureFile
from sfumato.pipeline.request import MAX_PICTURES, Request

if TYPE_CHECKING:
    from sfumato.checkpoints.tensors import Header
    from sfumato.families.additions import Additions, Ingredient
    from sfumato.pipeline.picture import Picture
    from sfumato.pipeline.pipeline import Pipeline
    from sfumato.pixels import Pixels

FORWARDED = {  # command → module whose ``main(argv) -> int`` reads the command's own flags
    "train": ("sfumato.training.cli", "train a model by a recipe, or on a folder of pictures"),
    "evaluate": ("sfumato.evaluation.cli", "measure a model against real pictures"),
    "explain": (
        "sfumato.inside.cli",
        "look inside a picture: its path, its words, guidance, samplers, in one HTML file",
    ),
    "convert": ("sfumato.families.convert", "turn a published folder into a single file, or the other way"),
    "data": ("sfumato.data.cli", "check a data set, or rebuild the corpus"),
    "search": ("sfumato.search", "find pictures by words"),
    "serve": ("sfumato.server.cli", "serve pictures over HTTP"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    started = time.perf_counter()
    debug = _take_flag(argv, "--debug")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt's letters never stop a terminal that lacks them
            stream.reconfigure(errors="backslashreplace")
    with _terminable():
        try:
            code = _run(argv, started)
            sys.stdout.flush()
            return code
        except SfumatoError as e:
            if debug:
                raise
            return _fail(str(e), e.exit_code)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except _Terminated:
            return _fail("terminated", 143)
        except BrokenPipeError:  # the reader of our output has seen enough
            _close_output()
            return 0
        except Exception as e:
            if debug:
                raise
            if isinstance(e, MemoryError):
                return _fail("out of memory", NoResources.exit_code)
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                _close_output()
                return _fail(str(e.strerror), NoResources.exit_code)
            return _fail(f"unexpected {type(e).__name__}: {e} (--debug shows where)", 1)


def _run(argv: list[str], started: float) -> int:
    try:
        if argv and argv[0] in FORWARDED:
            from importlib import import_module

            return import_module(FORWARDED[argv[0]][0]).main(argv[1:])
        args = _parser().parse_args(argv)
    except SystemExit as e:  # argparse ends so after help
        return e.code if isinstance(e.code, int) else 0
    args.started = started
    return args.run(args)


def _close_output() -> None:
    """Send what is left to nowhere, lest the interpreter stumble over it on its way out."""
    with suppress(OSError, ValueError):  # it may be no real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"sfumato: {_plain(' '.join(message.split()))}\n")
    return code


def _plain(text: str) -> str:
    """Text from a file or a user without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _take_flag(argv: list[str], flag: str) -> bool:
    end = argv.index("--") if "--" in argv else len(argv)
    taken = flag in argv[:end]
    argv[:end] = [a for a in argv[:end] if a != flag]
    return taken


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that temporary files and the terminal are cleaned up."""

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ── flags ──────────────────────────────────────────────────────────────────────────────────────────────


class _Parser(argparse.ArgumentParser):
    """Wrong flags are bad requests like any other: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BadRequest(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sfumato", description="Words into pictures by diffusion.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show where an error came from (with any command)")
    parser.set_defaults(run=lambda args: _version(args, parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("generate", _generate, "make pictures from words")
    add_request_flags(sub)
    _add_model(sub)
    _add_output(sub)
    sub.add_argument("--grid", action="store_true", help="one file with all n pictures instead of n files")
    sub.add_argument("--trajectory", metavar="FILE.gif", help="also write how the pictures came out of the noise")

    sub = command("interpolate", _interpolate, "make pictures on the way from one prompt to another, of one seed")
    add_request_flags(sub)
    _add_model(sub)
    _add_output(sub)
    sub.add_argument("--frames", metavar="N", default="9", help="number of pictures, both ends included (default: 9)")
    sub.add_argument("--film", metavar="FILE.gif", help="also write them as a film")

    sub = command("replay", _replay, "make a picture again from the request inside its PNG, and compare")
    sub.add_argument("picture", metavar="PICTURE.png")
    for f in fields(Request):
        if str(f.type).startswith("PictureFile"):
            sub.add_argument(*f.metadata["flags"], metavar="PICTURE", help=f"where its {f.name} lies now")
    _add_model(sub)
    _add_output(sub)

    sub = command("info", _info, "show what a picture or a weight file says of itself")
    sub.add_argument("what", metavar="MODEL|PICTURE")
    _add_reading(sub)
    _add_json(sub)

    sub = command("samplers", _samplers, "list samplers, spacings and guidance, with other tools' names for them")
    _add_json(sub)

    for name, (_, help) in FORWARDED.items():
        commands.add_parser(name, help=help, add_help=False)
    return parser


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of ``Request``; ``request_of`` reads them."""
    for f in fields(Request):
        flags: tuple[str, ...] = f.metadata["flags"]
        if f.name == "prompt":
            parser.add_argument("prompt", metavar="PROMPT", help=f.metadata["help"])
        elif f.name == "width":
            parser.add_argument("--size", metavar="WxH", help="width and height in pixels, before --upscale")
        elif flags:
            parser.add_argument(*flags, dest=f.name, metavar=f.metadata["metavar"], help=f.metadata["help"])


def request_of(args: argparse.Namespace) -> Request:
    """Read the request from parsed flags; raises BadRequest."""
    settings: dict[str, Any] = {}
    for f in fields(Request):
        text: str | None = getattr(args, f.name, None)
        if text is not None:
            settings[f.name] = _value(f.name, str(f.type), text)
    if args.size is not None:
        width, x, height = args.size.lower().partition("x")
        if not (x and width.isdecimal() and height.isdecimal() and len(args.size) < 20):
            raise BadRequest(f"size must be WxH in pixels, such as 32x32, not {args.size!r}")
        settings |= {"width": int(width), "height": int(height)}
    return Request.from_dict(settings)


def _value(name: str, kind: str, text: str) -> Any:
    """Give a flag's text its field's type; text that cannot have it is left for the request to refuse."""
    if kind.startswith("PictureFile"):
        return PictureFile.open(name, text)
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
        if kind.startswith("tuple"):
            number = int if kind.startswith("tuple[int") else float
            return tuple(number(part) for part in text.split(","))
    except ValueError:
        pass
    return text


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="M", help="weight file, folder or name of a model (default: the one built in)")
    add(
        "--lora",
        metavar="FILE[:W]",
        action="append",
        default=[],
        help="add a LoRA, with weight W (default: 1); several",
    )
    add("--embedding", metavar="WORD=FILE", action="append", default=[], help="teach prompts a learned word; several")
    add("--vae", metavar="FILE", help="use another autoencoder, such as a tiny one, or another decoder")
    add("--denoiser", metavar="FILE", help="use another denoiser, such as a GGUF file, with the model's other parts")
    add("--control", metavar="FILE", help="add a ControlNet, which follows --control-image")
    add("--ip-adapter", metavar="FILE", help="add an IP-Adapter, which follows --image-prompt")
    add("--image-encoder", metavar="FOLDER", help="the IP-Adapter's (default: image_encoder beside it or in the model)")
    _add_reading(parser)
    add("--tile", metavar="PIXELS", help="decode in tiles so wide, 0 in none (default: 1024 above 2048x2048 pixels)")
    add("--partial", action="store_true", help="let weights pass that are missing, too many or misshaped")
    add("--dtype", metavar="fp32|bf16", help="type to compute in (default: fp32)")
    add(
        "--memory",
        default="auto",
        metavar="auto|normal|low",
        help="low leaves weights in their file, for the same pictures (default: low if they would not fit)",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--variant", metavar="NAME", help="which files of a folder to take, such as fp16")
    add(
        "--allow-pickle",
        action="store_true",
        help="read .ckpt, .pt and .bin files too, in a process that can do little",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="PATH", help="file or folder to write to (default: a new file in outputs/)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--scale", metavar="N", help="draw each pixel N times as large (default: until 256 wide)")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _version(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not args.version:
        parser.error("a command is missing")
    import sfumato

    print(f"sfumato {sfumato.__version__}")
    return 0


# ── commands ───────────────────────────────────────────────────────────────────────────────────────────


def _generate(args: argparse.Namespace) -> int:
    request = request_of(args)
    scale = _scale(args.scale)
    target = Target.plan(args.out, args.force, files=1 if args.grid else request.n)
    film = None if args.trajectory is None else Target.plan(args.trajectory, args.force, files=1, suffix=".gif")
    pipe = _load(args)
    request = request.resolve(pipe.model)
    _tell(request, pipe)
    pictures, frames = _run_with_progress(pipe, request, film is not None)
    if args.grid:
        from sfumato.pipeline.picture import grid

        pictures = [grid(pictures)]
    paths = [target.write(p, i, scale) for i, p in enumerate(pictures)]
    if film is not None:
        film.write_film(frames, scale or pictures[0].viewing_scale)
    return _report(args, pictures, paths, {} if film is None else {"trajectory": str(film.file)})


def _interpolate(args: argparse.Namespace) -> int:
    request = request_of(args)
    if not (args.frames.isdecimal() and 2 <= int(args.frames[:9]) <= MAX_PICTURES):
        raise BadRequest(f"frames must be a whole number from 2 to {MAX_PICTURES}, not {args.frames[:40]!r}")
    if request.prompt_to is None:
        raise BadRequest("interpolate needs --prompt-to, the words to go towards")
    if request.mix is not None or request.n != 1:
        raise BadRequest("interpolate goes through every mix with one seed: leave out --mix and -n")
    frames, scale = int(args.frames), _scale(args.scale)
    target = Target.plan(args.out, args.force, files=frames)
    film = None if args.film is None else Target.plan(args.film, args.force, files=1, suffix=".gif")
    pipe = _load(args)
    request = request.resolve(pipe.model)
    _tell(request, pipe)
    requests = [replace(request, mix=i / (frames - 1)) for i in range(frames)]
    pictures = [picture for one in requests for picture in _run_with_progress(pipe, one, False)[0]]
    paths = [target.write(p, i, scale) for i, p in enumerate(pictures)]
    if film is not None:
        film.write_film([p.pixels for p in pictures], scale or pictures[0].viewing_scale)
    return _report(args, pictures, paths, {} if film is None else {"trajectory": str(film.file)})


def _tell(request: Request, pipe: Pipeline) -> None:
    """Say on stderr what is done to the picture to start from."""
    from sfumato.pipeline.canvas import canvas_of

    canvas = canvas_of(request, pipe.model)
    if canvas is not None and canvas.told and request.init is not None:
        name = Path(request.init.name).name or "init"
        sys.stderr.write(_plain(f"{name}: {', '.join(canvas.told)}") + "\n")


def _replay(args: argparse.Namespace) -> int:
    import numpy as np

    from sfumato.families import recorded
    from sfumato.pipeline.picture import enlarge, grid, read

    stored = read(args.picture)
    old = stored.picture
    scale = _scale(args.scale) or stored.scale
    target = Target.plan(args.out, args.force, files=1)
    request = old.request.map_pictures(lambda name, picture: _picture_again(name, picture, args))
    args.model = args.model or recorded(old.model)
    args.dtype = args.dtype or str(old.made_with.get("dtype", "fp32"))
    args.tile = args.tile or (str(old.made_with["tile"]) if "tile" in old.made_with else None)
    pipe = _load(args, _found(old.ingredients, args), old.made_with.get("threads"))
    if pipe.model.hash != old.model_hash:
        raise BadCheckpoint(
            f"{args.picture} was made by model {old.model!r} with hash {old.model_hash[:12]}, but "
            f"{pipe.model.name!r} has {pipe.model.hash[:12]}: point at the right file with --model"
        )
    pictures, _ = _run_with_progress(pipe, request, False)
    new = pictures[0] if request.n == 1 else grid(pictures)
    same = np.array_equal(enlarge(new.pixels, stored.scale), stored.pixels)
    path = target.write(new, 0, scale)
    changes = [
        f"{what} {old.made_with[what]} is now {now}"
        for what, now in new.made_with.items()
        if old.made_with.get(what, now) != now
    ]
    verdict = "pixels equal" if same else "pixels differ" + (f" ({', '.join(changes)})" if changes else "")
    _report(args, [new], [path], {"equal": same, "changes": changes}, verdict)
    return 0 if same else 1


def _picture_again(name: str, picture: PictureFile, args: argparse.Namespace) -> PictureFile:
    """The picture that a request started from: where it was said to lie, where it lay, or beside the result."""
    given: str | None = getattr(args, name)
    if given is not None:
        return picture.with_data(name, PictureFile.open(name, given))
    known = Path(picture.name)
    inside = not known.is_absolute() and ".." not in known.parts and picture.name != ""
    places = [known, Path(args.picture).parent / known.name] if inside else []
    for place in places:
        if place.is_file():
            return picture.with_data(name, PictureFile.open(name, place))
    raise BadRequest(
        f"{args.picture} was made from a picture that is not here: {known.name or 'one without a name'}, "
        f"SHA-256 {picture.sha256[:12]}…; say where it lies with --{name.replace('_', '-')}"
    )


def _info(args: argparse.Namespace) -> int:
    from sfumato.pipeline.picture import is_png, read

    path = Path(args.what)
    if path.is_file() and is_png(path):
        stored = read(path)
        p = stored.picture
        facts: dict[str, Any] = {
            "picture": str(path),
            "size": f"{p.pixels.shape[1]}x{p.pixels.shape[0]}",
            "scale": stored.scale,
            "model": p.model,
            "model_hash": p.model_hash,
            "request": p.request.to_dict(),
            "made_with": dict(p.made_with),
            **({"ingredients": {str(i): i.hash for i in p.ingredients}} if p.ingredients else {}),
        }
    else:
        facts = _model_facts(path, args)
    if args.json:
        _print_json(facts)
    else:
        _print_facts(facts)
    return 0


def _model_facts(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the headers of weight files say; no weights are read."""
    import json

    from sfumato.checkpoints.formats import weights_header
    from sfumato.families import describe, locate

    if not path.is_file():
        path = locate(args.what, args.variant)
    how = {"variant": args.variant, "allow_pickle": args.allow_pickle}
    if path.is_dir():
        return {"model": str(path), **describe(path, **how)}
    header = weights_header(path, allow_pickle=args.allow_pickle)
    facts = {"model": str(path), **_header_facts(header)}
    if not any(key.startswith("sfumato-") for key in header.metadata):
        try:
            facts |= describe(path, **how)
        except BadCheckpoint as e:  # any file of tensors may be looked at
            facts["family"] = str(e)
    for key, text in header.metadata.items():
        if key.startswith("sfumato-"):
            facts["format"] = key
            try:
                own = json.loads(text)
                facts |= {"card": own["card"], "config": own["config"]}
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise BadCheckpoint(f"{path}: its configuration cannot be read") from e
        else:
            facts.setdefault("metadata", {})[key] = text if len(text) <= 200 else text[:200] + "..."
    return facts


def _header_facts(header: Header) -> dict[str, Any]:
    return {
        "bytes": header.size,
        "tensors": len(header.tensors),
        "parameters": header.parameters,
        "dtypes": ", ".join(sorted({t.dtype for t in header.tensors.values()})),
    }


def _samplers(args: argparse.Namespace) -> int:
    from sfumato.pipeline.menu import menu

    choices = menu()
    if args.json:
        _print_json(choices)
        return 0
    print("samplers            order  calls  noise  what it does (other names)")
    for s in choices["samplers"]:
        noise = "yes" if s["stochastic"] else ""
        print(f"  {s['name']:<18} {s['order'] or '-':>3} {s['calls']:>6}    {noise:<4} {_described(s)}")
    print("\nspacings")
    for s in choices["spacings"]:
        print(f"  {s['name']:<18} {_described(s)}")
    print("\nguidance")
    for g in choices["guidance"]:
        print(f"  {g['name']:<18} {g['summary']}")
    return 0


def _described(thing: dict[str, Any]) -> str:
    return thing["summary"] + (f" ({', '.join(thing['aliases'])})" if thing["aliases"] else "")


# ── output ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Target:
    """Where files will go; that they can be written is known before the work starts."""

    folder: Path
    name: str | None  # None: named after prompt and seed
    files: int
    overwrite: bool

    @classmethod
    def plan(cls, out: str | None, force: bool, *, files: int, suffix: str = ".png") -> Target:
        """Choose folder and name; raises BadRequest if they cannot be written or exist without ``force``."""
        if out is not None and (not out or "\0" in out):
            raise BadRequest("the output path is empty or no path")
        path = Path("outputs" if out is None else out)
        named = out is not None and not os.path.isdir(path) and (path.suffix != "" or suffix != ".png")
        if named and (path.suffix.lower() != suffix or str(out).endswith(("/", os.sep))):
            raise BadRequest(f"cannot write {path}: its name must end in {suffix}")
        target = cls(path.parent, path.stem, files, force) if named else cls(path, None, files, False)
        for file in [target._path(path.stem, i, suffix) for i in range(files if named else 0)]:
            if _exists(file) and not force:
                raise BadRequest(f"{file} exists already; --force replaces it")
        _check_writable(target.folder)
        return target

    @property
    def file(self) -> Path:
        """The trajectory's file."""
        return self.folder / f"{self.name}.gif"

    def _path(self, stem: str, i: int, suffix: str = ".png") -> Path:
        return self.folder / (f"{stem}{suffix}" if self.files == 1 else f"{stem}-{i + 1}{suffix}")

    def write(self, picture: Picture, i: int, scale: int | None) -> Path:
        """Write picture i; a name of our own choice never meets an existing file."""
        self._make_folder()
        scale = scale or picture.viewing_scale
        if self.name is not None:
            return picture.save(self._path(self.name, i), scale=scale, overwrite=self.overwrite)
        stem, again = _stem(picture.request), 1
        while True:
            path = self.folder / (f"{stem}.png" if again == 1 else f"{stem}-{again}.png")
            if not os.path.lexists(path):
                return picture.save(path, scale=scale, overwrite=False)
            again += 1

    def write_film(self, frames: Sequence[Pixels], scale: int) -> None:
        """Write frames (H, W, 3) as an animated GIF that rests on the last."""
        from PIL import Image

        from sfumato.pipeline.picture import enlarge

        self._make_folder()
        images = [Image.fromarray(enlarge(f, scale)) for f in frames]
        durations = [max(40, min(200, 4000 // len(images)))] * (len(images) - 1) + [2000]
        data = io.BytesIO()
        images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
        write_atomically(self.file, data.getvalue(), overwrite=self.overwrite)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise cannot_write(self.folder, e) from e


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as e:  # a name that is too long, a folder that is a file
        raise cannot_write(path, e) from e
    return True


def _check_writable(folder: Path) -> None:
    """Try to create a file where the folder is, or where it would be made."""
    import secrets

    place = folder
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        trial = place / f".sfumato-{secrets.token_hex(4)}.part"
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as e:
        raise cannot_write(folder, e) from e


def _stem(request: Request) -> str:
    words = "".join(c if c.isalnum() else " " for c in request.prompt.lower()).split()
    slug = "-".join(words)[:40].strip("-") or "picture"
    variation = f"-{request.variation_seed}" if request.variation_strength > 0 else ""
    return f"{slug}-{request.seed}{variation}" + (f"-grid-{request.n}" if request.n > 1 else "")


def _scale(text: str | None) -> int | None:
    if text is None:
        return None
    from sfumato.pipeline.picture import MAX_SCALE

    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_SCALE):
        raise BadRequest(f"scale must be a whole number from 1 to {MAX_SCALE}, not {text!r}")
    return int(text)


def _load(args: argparse.Namespace, additions: Additions | None = None, threads: object = None) -> Pipeline:
    """Load the model that the flags name, with the additions that they name unless others are given."""
    from sfumato import families

    additions = additions or _additions(args)
    how: dict[str, Any] = {"dtype": args.dtype or "fp32", "memory": args.memory}
    families.keeping.check(**how)
    if args.tile is not None and not (args.tile.isdecimal() and len(args.tile) < 7):
        raise BadRequest(f"--tile must be a whole number of pixels, or 0, not {args.tile[:40]!r}")
    families.locate(args.model, args.variant)  # a wrong name is told at once, torch takes seconds
    additions.check()  # as is a missing file
    with _status(f"loading {args.model or 'the model'}"):
        from sfumato.pipeline.pipeline import Pipeline

        if isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= 256:
            import torch

            torch.set_num_threads(threads)  # the order of sums, and so the last bits, may depend on it
        how |= {"variant": args.variant, "allow_pickle": args.allow_pickle, "partial": args.partial}
        tile = None if args.tile is None else int(args.tile)
        return Pipeline(families.load(args.model, additions, **how), tile=tile)


def _additions(args: argparse.Namespace) -> Additions:
    """What the flags ask to add to the model; raises BadRequest."""
    from sfumato.families.additions import Additions

    embeddings: dict[str, str] = {}
    for text in args.embedding:
        word, sign, file = text.partition("=")
        if not (word and sign and file):
            raise BadRequest(f"--embedding must be WORD=FILE, such as <cat>=cat.safetensors, not {text!r}")
        if word in embeddings:
            raise BadRequest(f"--embedding names the word {word!r} twice")
        embeddings[word] = file
    networks = (args.vae, args.control, args.denoiser, args.ip_adapter, args.image_encoder)
    return Additions.of([_lora(text) for text in args.lora], embeddings, *networks)


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon that belongs to the file's name is left alone."""
    file, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return file, float(weight)
    except ValueError:
        if os.path.exists(file):
            raise BadRequest(f"the weight in --lora {text} is no number") from None
        return text, 1.0


def _found(ingredients: Sequence[Ingredient], args: argparse.Namespace) -> Additions:
    """The files of a picture's ingredients, known by their content: those that flags name, and those of the same name
    beside the picture, beside the model, or here. Raises BadCheckpoint for those that are not there.
    """
    from sfumato.families.additions import NETWORKS, Additions, content_hash

    given = _additions(args)
    named = [path for path, _ in given.loras] + list(given.embeddings.values())
    named += [path for kind in NETWORKS if (path := getattr(given, kind)) is not None]
    beside = [Path(), Path(args.picture).parent, Path(args.model or "").parent]
    beside += [] if given.ip_adapter is None else [given.ip_adapter.parent]
    hashes = {path: content_hash(path) for path in named}
    places: dict[Ingredient, Path] = {}
    for it in ingredients:
        for folder in beside:
            if it.name == Path(it.name).name and (folder / it.name).exists() and folder / it.name not in hashes:
                hashes[folder / it.name] = content_hash(folder / it.name)
        found = next((path for path, hash in hashes.items() if hash == it.hash), None)
        if found is None:
            flag = {"lora": "--lora FILE", "embedding": f"--embedding {it.word}=FILE", "controlnet": "--control FILE"}
            usual = f"--{it.kind.replace('_', '-')} FILE"
            raise BadCheckpoint(
                f"{args.picture} was made with the {it} (sha256 {it.hash[:12]}), which is not here: "
                f"name it with {flag.get(it.kind, usual)}"
            )
        places[it] = found
    if unused := [p for p in named if p not in places.values()]:
        raise BadRequest(f"{args.picture} was not made with {unused[0]}: leave it out")
    parts = {it.kind: path for it, path in places.items()}
    return Additions.of(
        [(path, it.weight or 0.0) for it, path in places.items() if it.kind == "lora"],
        {it.word or "": path for it, path in places.items() if it.kind == "embedding"},
        **{kind: parts.get(kind) for kind in NETWORKS},
    )


def _run_with_progress(pipe: Pipeline, request: Request, film: bool) -> tuple[list[Picture], list[Pixels]]:
    """Return the pictures and, if asked for, a frame for each step."""
    from sfumato.pipeline.picture import Picture, sheet

    pictures: list[Picture] = []
    frames: list[Pixels] = []
    with _progress(pipe.steps(request)) as advance:
        for event in pipe.run(request):
            if isinstance(event, Picture):
                pictures.append(event)
                continue
            advance()
            if film:
                frames.append(sheet(pipe.pixels(event.preview)))
    if film:
        last = sheet([p.pixels for p in pictures])
        frames = [_as_large(f, last) for f in frames] + [last]
    return pictures, frames


def _as_large(frame: Pixels, other: Pixels) -> Pixels:
    """A frame of the size of another, for films of pictures that are enlarged on their way."""
    from sfumato.pipeline.canvas import cover

    if frame.shape == other.shape:
        return frame
    import numpy as np
    from PIL import Image

    return np.asarray(cover(Image.fromarray(frame), (other.shape[1], other.shape[0])))


@contextmanager
def _status(text: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=steps)
        yield lambda: bar.advance(task)


def _report(
    args: argparse.Namespace, pictures: list[Picture], paths: list[Path], more: dict[str, Any], note: str = ""
) -> int:
    seconds = time.perf_counter() - args.started
    first = pictures[0]
    if args.json:
        _print_json(
            {
                "pictures": [
                    {"path": str(path), "seed": p.request.seed} for path, p in zip(paths, pictures, strict=True)
                ],
                "model": {"name": first.model, "hash": first.model_hash},
                "request": first.request.to_dict(),
                "seconds": round(seconds, 3),
                **more,
            }
        )
        return 0
    for path, p in zip(paths, pictures, strict=True):
        variation = f", variation {p.request.variation_seed}" if p.request.variation_strength > 0 else ""
        print(_plain(f"{path}  seed {p.request.seed}{variation}"))
    if "trajectory" in more:
        print(_plain(more["trajectory"]))
    parts = [f"model {first.model} ({first.model_hash[:12]})", f"{seconds:.1f} s", note]
    print(_plain(", ".join(p for p in parts if p)))
    return 0


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value))


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            print(indent + _plain(str(key)))
            _print_facts(value, indent + "  ")
        elif value not in (None, "", {}):
            print(indent + _plain(f"{key:<{18 - len(indent)}} {value}"))
