"""Models by their id on the Hugging Face hub: fetched once, of one commit, and read from the local cache ever after.

    stabilityai/sd-turbo                      a published folder: the files that are read of it, safetensors alone
    stabilityai/sd-turbo@d9c1ddf…             of this commit, branch or tag
    runwayml/sd/v1-5.safetensors              one file of a repository

``huggingface_hub`` fetches, resumes what broke off, and shows how far it is. Without a network, or with
``HF_HUB_OFFLINE=1``, the cache is all there is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sfumato.checkpoints.folder import variant_names
from sfumato.checkpoints.published import NETWORKS, TOKENIZER_FILES, TOKENIZERS
from sfumato.errors import BadCheckpoint, BadRequest, NoResources

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})(?P<file>(?:/{_NAME}){{0,4}})(?:@(?P<revision>[A-Za-z0-9._-]{{1,100}}))?"
)


@dataclass(frozen=True)
class HubId:
    """A repository, or one file of it, at a commit, branch or tag."""

    repository: str
    file: str = ""
    revision: str = "main"


def parse(text: str) -> HubId | None:
    """Read an id; None for what is none. BadRequest for an id that climbs out of its place."""
    if ".." in text and re.fullmatch(r"[\w.-]+(/[\w.-]+)+(@[\w.-/]+)?", text):
        raise BadRequest(f"no model {text[:80]!r}: neither a file here, nor may a model's id hold '..'")
    m = _ID.fullmatch(text)
    return m and HubId(m["repository"], m["file"].removeprefix("/"), m["revision"] or "main")


@cache
def fetch(model: HubId, variant: str | None = None) -> Path:
    """Return the folder or file of a model in the local cache, fetching what is missing.

    Raises BadRequest if the hub has no such model, BadCheckpoint if it has no safetensors, NoResources without a
    network or without the library.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, utils
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise NoResources(f"fetching {model.repository} needs a library: pip install 'sfumato[hub]'") from None
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    where: dict[str, Any] = {"repo_id": model.repository, "revision": model.revision}
    failure = "the network is switched off by HF_HUB_OFFLINE"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = hub.HfApi().model_info(**where, timeout=20)  # unlike a listing, not asked again and again
            names = choose(model, [s.rfilename for s in info.siblings or ()], variant)
            return Path(hub.snapshot_download(**where, allow_patterns=names)) / model.file
        except GatedRepoError:
            raise BadRequest(
                f"{model.repository}: its owners ask you to accept their terms on its page first, and to log in with "
                "`hf auth login`"
            ) from None
        except RepositoryNotFoundError:
            raise BadRequest(f"no model {model.repository!r}: neither a file here nor on the hub") from None
        except RevisionNotFoundError:
            raise BadRequest(f"{model.repository} has no commit, branch or tag {model.revision!r}") from None
        except (HfHubHTTPError, OSError) as e:
            failure = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        except Exception as e:  # the library's transport raises errors of its own kind
            if type(e).__module__.split(".")[0] not in ("httpx", "httpx2", "requests", "hf_xet", "huggingface_hub"):
                raise
            failure = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
    return _cached(model, hub, where, failure)


def _cached(model: HubId, hub: Any, where: dict[str, Any], failure: str) -> Path:
    """What the cache holds of a model; NoResources, with the failure that led here, if that is nothing."""
    wanted = model.file or "model_index.json"
    found = hub.try_to_load_from_cache(model.repository, wanted, revision=model.revision)
    if isinstance(found, str):
        return Path(found) if model.file else Path(found).parent
    raise NoResources(
        f"{model.repository} is not in the cache and cannot be fetched ({failure}): connect to a network, or "
        "name a file"
    )


def commit_of(path: Path) -> str:
    """The commit of a file or folder in the cache; empty for others."""
    m = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})(/|$)", path.as_posix())
    return m[1] if m else ""


def choose(model: HubId, names: Collection[str], variant: str | None = None) -> list[str]:
    """Of a repository's files, those that are read: of each component one form of weights, and never a pickle.

    Raises BadRequest for a file that is not there, BadCheckpoint if there is nothing to read.
    """
    if model.file:
        if model.file not in names:
            raise BadRequest(f"{model.repository} has no file {model.file!r}")
        return [_pattern(model.file)]
    if "model_index.json" not in names:
        single = sorted(n for n in names if n.endswith((".safetensors", ".gguf")) and "/" not in n)
        which = f"; name one of its files: {model.repository}/{single[0]}" if single else ""
        raise BadCheckpoint(f"{model.repository}: no published folder, which has a model_index.json{which}")
    chosen = ["model_index.json", "scheduler/scheduler_config.json"]
    chosen += [f"{t}/{name}" for t in TOKENIZERS for name in TOKENIZER_FILES]
    for component in NETWORKS:
        own = {n.removeprefix(f"{component}/") for n in names if n.startswith(f"{component}/")}
        if own:
            chosen.append(f"{component}/config.json")
            chosen += [f"{component}/{name}" for name in _weights(model, component, own, variant)]
    return [_pattern(name) for name in chosen if name in names]


def _weights(model: HubId, component: str, names: Collection[str], variant: str | None) -> Iterator[str]:
    found = {m[1] for n in names if (m := re.fullmatch(r"[a-z_]+\.([A-Za-z0-9_]+)(?:-\d+-of-\d+)?\.safetensors", n))}
    for v in [variant] if variant is not None else [None, *sorted(found)]:
        for single, index in variant_names(v):
            if single in names:
                yield single
                return
            if index in names:
                mark = f".{v}" if v else ""
                stem = index.partition(".")[0]
                shard = re.compile(rf"{stem}(?:{re.escape(mark)})?-\d+-of-\d+(?:{re.escape(mark)})?\.safetensors")
                yield index
                yield from sorted(n for n in names if shard.fullmatch(n) and mark in n)
                return
    raise BadCheckpoint(f"{model.repository}: its {component} has no safetensors{f' of {variant}' if variant else ''}")


def _pattern(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
