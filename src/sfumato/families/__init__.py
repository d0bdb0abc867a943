"""Families of models: one file, one readable recipe. ``load`` finds the family by what a file holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sfumato.checkpoints import hub
from sfumato.errors import BadCheckpoint, BadRequest, nearest
from sfumato.families import keeping
from sfumato.families.additions import Additions
from sfumato.files import climbs, sha256

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.checkpoints.published import Published
    from sfumato.families.model import Model

DEFAULT_MODEL = "emoji-64"
NATIVE_FORMAT = "sfumato-native-1"  # the key of the metadata in files of our own family
PUBLISHED = ("sd1", "sd2", "sdxl", "sd3", "flux", "dit")  # recipes, each of which recognizes its own


def embedded_models() -> dict[str, Path]:
    """Return the models that ship with the package, by name."""
    folder = Path(str(files("sfumato"))) / "models"
    return {p.stem: p for p in sorted(folder.glob("*.safetensors"))}


def locate(name: str | Path | None, variant: str | None = None) -> Path:
    """Find a model by embedded name, path, or id on the hub; None is the default model.

    A model on the hub is fetched to the local cache. Raises BadRequest if there is no such model.
    """
    models = embedded_models()
    if name is None:
        name = DEFAULT_MODEL
    if str(name) in models:
        return models[str(name)]
    path = _path(name)
    if path.is_file() and climbs(path):
        raise BadRequest(
            f"no model {str(name)[:80]!r}: a path with '..' in it must end as files of weights do, such as .safetensors"
        )
    if path.is_file():
        return path
    if path.is_dir() and (path / "final.safetensors").is_file():  # a training run's folder
        return path / "final.safetensors"
    if (path / "model_index.json").is_file():  # a published folder
        return path
    if path.is_dir():
        raise BadRequest(f"no model {str(name)!r}: a folder without model_index.json or final.safetensors")
    if (model := hub.parse(str(name))) is not None:
        return hub.fetch(model, variant)
    hint = nearest(str(name), list(models))
    if m := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", str(name)):
        hint = f"; of a model on the hub name the id: {m[1][:80]}"
    raise BadRequest(
        f"no model {str(name)[:80]!r}: neither a file nor one of {', '.join(models) or 'none embedded'}{hint}"
    )


def _path(name: str | Path) -> Path:
    """A name as a path; BadRequest if it can be none."""
    try:
        path = Path(name).expanduser()
        path.is_file()  # a name may be too long for one
    except (OSError, ValueError, RuntimeError) as e:
        raise BadRequest(f"no model {str(name)[:80]!r}: {getattr(e, 'strerror', None) or e}") from None
    if not str(name) or "\0" in str(name):
        raise BadRequest(f"no model {str(name)[:80]!r}: that is no name")
    return path


def load(
    name: str | Path | None = None,
    additions: Additions | None = None,
    *,
    critic: str | Path | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    partial: bool = False,
    dtype: str = "fp32",
    memory: str = "auto",
) -> Model:
    """Load a model by embedded name or path.

    Args:
        additions: LoRAs, learned words and other files to add to a published model.
        critic: a CLIP of ours to choose pictures by; embedded models have the embedded one.
        variant: which files of a folder to take, such as "fp16".
        allow_pickle: whether files that can run code may be read, by a child that may not.
        partial: let missing, extra and misshaped tensors pass, and report them in the model's card.
        dtype, memory: how its weights are kept, of ``keeping.DTYPES`` and ``keeping.MEMORY``.

    Raises BadRequest if there is no such model, BadCheckpoint if its file cannot be trusted or does not fit.
    """
    keeping.check(dtype, memory)
    path = locate(name, variant)
    judge = _critic(path, critic)
    display = str(name) if name is not None else DEFAULT_MODEL
    if commit := hub.commit_of(path):  # a picture can be made again even if its model's branch has moved
        display = f"{display.partition('@')[0]}@{commit}"
    additions = additions or Additions()
    if not path.is_dir() and (metadata := _native_metadata(path)) is not None:
        from sfumato.checkpoints.tensors import read_tensors
        from sfumato.families.native import load_native

        if additions:
            raise BadRequest(f"{display}: what can be added to published models cannot be added to this one")
        if dtype != "fp32":
            raise BadRequest(f"{display}: a model of our own computes in fp32; other types are for published models")
        for flag, given in (("variant", variant), ("partial", partial), ("memory", memory != "auto")):
            if given:
                raise BadRequest(f"{display}: {flag} is for published models, not for one of our own: leave it out")
        return replace(load_native(path, display, read_tensors(path), metadata, sha256(path)), critic=judge)

    ingredients = tuple(additions.ingredients())  # a missing file is told before the model is read
    published = replace(_read(path, variant, allow_pickle=allow_pickle, partial=partial), partial=partial)
    published = additions.apply(published, allow_pickle=allow_pickle, partial=partial)
    keep, why = keeping.decide(published, dtype, memory)
    published = replace(published, keep=keep, why={**published.why, "computes in": dtype, "memory": why})
    model = replace(_build(published, display), ingredients=ingredients, critic=judge)
    for given, kind in ((additions.ip_adapter, "ip_adapter"), (additions.controlnets, "control")):
        if given:
            model = import_module(f"sfumato.families.{kind}").attach(model, published)
    return model


def _critic(model: Path, critic: str | Path | None) -> Callable[[Tensor, str], Tensor] | None:
    """The CLIP that was named or, for embedded models, the embedded one, which is read when it is first asked."""
    if critic is None and model not in embedded_models().values():
        return None
    from sfumato.families.clip import Critic

    return Critic(None if critic is None else Path(critic))


def _native_metadata(path: Path) -> str | None:
    """The configuration in a file of our own family; None if it is of another."""
    from sfumato.checkpoints.formats import form_of
    from sfumato.checkpoints.tensors import read_header

    return read_header(path).metadata.get(NATIVE_FORMAT) if form_of(path) == "safetensors" else None


def public_name(model: Model) -> str:
    """A model's name as its pictures keep it: an id on the hub whole, with its commit, of a path only the last part."""
    return model.name if hub.commit_of(model.path) else PurePath(model.name).name


def recorded(name: str) -> str:
    """The name to load by of a model that a picture names: an id on the hub with its commit, or a plain name."""
    return name if re.fullmatch(r"[\w.-]+/[^@]+@[0-9a-f]{40}", name) and hub.parse(name) else PurePath(name).name


def describe(path: Path, variant: str | None = None, *, allow_pickle: bool = False) -> dict[str, str]:
    """What a published folder or single file is, and why that is known, from its headers alone.

    Raises BadCheckpoint as ``load`` does for what the headers tell.
    """
    from sfumato.checkpoints.formats import weights_header

    published = _read(path, variant, weights=False, allow_pickle=allow_pickle)
    family, reason = recognize(published)
    from sfumato.families.common import matched
    from sfumato.families.matching import match

    headers = [weights_header(file, allow_pickle=allow_pickle) for file in published.files]
    numbers = sum(h.parameters for h in headers)
    stated = published.configs.get("scheduler", {}).get("prediction_type")
    undecided = {"sd2": "decided by one call of the network", "sd3": "flow", "flux": "flow"}
    return {
        "form": published.form,
        "family": f"{family}: {reason}",
        **{k: v for k, v in published.why.items() if k != "family"},
        "prediction": f"{stated}: stated" if stated else undecided.get(family, "epsilon: this family's usual one"),
        **matched(match(published, family)),
        "tensors": str(sum(len(h.tensors) for h in headers)),
        "parameters": f"{numbers / 1e6:.1f} M",
        "stored as": ", ".join(sorted({t.dtype for h in headers for t in h.tensors.values()})),
        "size": f"{published.size / 2**20:.0f} MiB",
        "memory": f"{4 * numbers / 2**20:.0f} MiB in fp32, {2 * numbers / 2**20:.0f} in bf16; little with --memory low",
    }


def check_variant(path: Path, variant: str | None) -> None:
    """Raise BadRequest for a variant, which names some of a folder's files, of a single one."""
    if variant and not path.is_dir():
        raise BadRequest(f"{path}: a single file, and variant is for folders: leave it out")


def _read(
    path: Path, variant: str | None = None, *, weights: bool = True, allow_pickle: bool = False, partial: bool = False
) -> Published:
    from sfumato.checkpoints.folder import read_folder
    from sfumato.checkpoints.single_file import read_single_file

    if path.is_dir():
        return read_folder(path, variant, weights=weights, allow_pickle=allow_pickle)
    check_variant(path, variant)
    return read_single_file(path, weights=weights, allow_pickle=allow_pickle, partial=partial)


def recognize(published: Published) -> tuple[str, str]:
    """The family of a published model and the reason, found by its configurations; BadCheckpoint if there is none.

    Those come from the folder's files, or from the names and shapes of a single file's tensors; never from its name.
    """
    for family in PUBLISHED:
        if (reason := import_module(f"sfumato.families.{family}").recognize(published.configs)) is not None:
            return family, reason
    parts = ", ".join(c for c in published.configs if c) or "nothing"
    raise BadCheckpoint(f"{published.path}: no known family has these parts: {parts}")


def _build(published: Published, name: str) -> Model:
    family, reason = recognize(published)
    why = {"family": f"{family}: {reason}", **published.why}
    try:
        return import_module(f"sfumato.families.{family}").load(replace(published, why=why), name)
    except BadCheckpoint as e:
        where = f"{published.path}: "
        raise BadCheckpoint(str(e) if str(e).startswith(where) else f"{where}{e}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as e:
        raise BadCheckpoint(
            f"{published.path}: its configuration cannot be followed: {type(e).__name__}: {str(e)[:200]}"
        ) from e
