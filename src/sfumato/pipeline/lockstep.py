"""Many pictures at once: every sampler's loop as it stands in the paper, and their network calls in one batch.

A sampler calls its network from deep inside a loop of its own. Each loop runs in a greenlet, which is parked where it
calls the network; when all are parked, one call of the network answers them all:

    loop 1   … ── x₁, t₁ ──┐                    ┌── out₁ ── …
    loop 2   … ── x₂, t₂ ──┤  network(x, t, c)  ├── out₂ ── …        one `advance`
    loop 3   … ── x₃, t₃ ──┘                    └── out₃ ── …

So steps, seeds, samplers and guidance may all differ, and a picture may join or leave between any two calls. What
remains of its company in a picture is rounding: see ``Pipeline``'s ``batch``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.nn.functional import pad

from sfumato.diffusion import Step
from sfumato.errors import BadRequest
from sfumato.families.model import Conditioning, Model
from sfumato.pipeline.picture import Picture
from sfumato.pipeline.pipeline import Pipeline
from sfumato.pipeline.request import Request

PROMPTS_KEPT = 64  # encoded prompts, the oldest forgotten first

Event: TypeAlias = Step | Picture | Exception


@dataclass(eq=False)
class _Call:
    """Rows on their way to the network: x (B, C, h, w), clock (B,), conditioning of B rows."""

    x: Tensor
    clock: Tensor
    conditioning: Conditioning

    @property
    def kind(self) -> Any:
        """What must be alike for calls to share a batch; the length of masked words need not be."""
        mask = self.conditioning.get("mask")
        shapes = tuple(
            (k, v.dtype, tuple(v.shape[2:] if _masked(v, mask) else v.shape[1:]))
            for k, v in sorted(self.conditioning.items())
        )
        return self.x.dtype, tuple(self.x.shape[1:]), shapes


@dataclass(eq=False)
class Run:
    """One picture in the making."""

    request: Request
    _loop: greenlet
    _call: _Call | None = None
    _events: list[Event] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether its last event has been handed out: a picture, or an error, or nothing after ``cancel``."""
        return self._loop.dead


class Lockstep:
    """Pictures of one model, advanced together.

    Args:
        model: the model; its network is used as it is.
        batch: how many pictures share a call of the network at most.
    """

    def __init__(self, model: Model, batch: int = 16) -> None:
        if batch < 1:
            raise BadRequest(f"batch must be at least 1, not {batch}")
        self.model, self.batch = model, batch
        self._network = model.network.eval()
        self._pipe = Pipeline(replace(model, network=_Meeting(model.network), encode=_remembering(model.encode)))
        self._runs: list[Run] = []

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def pipe(self) -> Pipeline:
        """The pipeline whose network is the meeting point; for decoding previews, not for requests."""
        return self._pipe

    def start(self, request: Request) -> Run:
        """Add a picture; it begins with the next ``advance``. Raises BadRequest for n > 1: add each picture."""
        if request.n != 1:
            raise BadRequest("in lock-step every picture is a run of its own: n must be 1")
        run = Run(request, greenlet(self._walk))
        self._runs.append(run)
        return run

    def cancel(self, run: Run) -> None:
        """Drop a picture where it stands."""
        if run in self._runs:
            self._runs.remove(run)
            with torch.inference_mode():
                run._loop.throw(GreenletExit)

    def advance(self) -> Iterator[tuple[Run, Event]]:
        """Bring every picture through one call of the network; yields what came of it, in the order of their start.

        A run's events are its steps, then its picture or the exception that ended it.
        """
        with torch.inference_mode():  # on a greenlet's every stretch, so that none sees another's mode
            for run in self._runs:
                if run._call is None:
                    self._resume(run, run)
            kinds: dict[Any, list[Run]] = {}
            for run in self._runs:
                if run._call is not None:
                    kinds.setdefault(run._call.kind, []).append(run)
            for runs in kinds.values():
                for i in range(0, len(runs), self.batch):
                    self._answer(runs[i : i + self.batch])
        for run in list(self._runs):
            events, run._events = run._events, []
            if run._loop.dead and run in self._runs:  # whoever takes the events may cancel others
                self._runs.remove(run)
            for event in events:
                yield run, event

    def _walk(self, run: Run) -> None:
        """A greenlet's body: the pipeline's own loop."""
        try:
            for event in self._pipe.run(run.request):
                run._events.append(event)
        except Exception as e:
            run._events.append(e)

    def _resume(self, run: Run, value: Any) -> None:
        """Let a loop go on until it calls the network again or ends."""
        run._call = None
        call = run._loop.throw(value) if isinstance(value, Exception) else run._loop.switch(value)
        run._call = call if isinstance(call, _Call) else None

    def _answer(self, runs: list[Run]) -> None:
        """Call the network for some runs at once, or for each alone if the batch fails, and let them go on."""
        calls = [run._call for run in runs if run._call is not None]
        try:
            outs: list[Tensor | Exception] = list(_together(self._network, calls))
        except Exception as e:
            outs = [e] if len(calls) == 1 else [_alone(self._network, call) for call in calls]
        for run, out in zip(runs, outs, strict=True):
            self._resume(run, out)


class _Meeting(nn.Module):
    """Stands where a pipeline expects the network, and parks its caller until the rows have been through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, clock: Tensor, **conditioning: Tensor) -> Tensor:
        parent = getcurrent().parent
        assert parent is not None, "called outside of a run"
        return parent.switch(_Call(x, clock, conditioning))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.network, memo)  # the pipeline's wider twin is called alone


def _together(network: nn.Module, calls: list[_Call]) -> tuple[Tensor, ...]:
    if len(calls) == 1:
        return (network(calls[0].x, calls[0].clock, **calls[0].conditioning),)
    words = {k: torch.cat(_padded(calls, k)) for k in calls[0].conditioning}
    out = network(torch.cat([c.x for c in calls]), torch.cat([c.clock for c in calls]), **words)
    return out.split([len(c.x) for c in calls])


def _alone(network: nn.Module, call: _Call) -> Tensor | Exception:
    try:
        return _together(network, [call])[0]
    except Exception as e:
        return e


def _padded(calls: list[_Call], key: str) -> list[Tensor]:
    """A conditioning of every call, its words (B, M, …) made equally many by masked ones."""
    parts = [c.conditioning[key] for c in calls]
    if not all(_masked(p, c.conditioning.get("mask")) for p, c in zip(parts, calls, strict=True)):
        return parts
    longest = max(p.shape[1] for p in parts)
    return [pad(p, [0, 0] * (p.ndim - 2) + [0, longest - p.shape[1]]) for p in parts]


def _masked(value: Tensor, mask: Tensor | None) -> bool:
    """Whether a conditioning runs along the masked words: (B, M, …) beside a mask (B, M)."""
    return mask is not None and (value is mask or (value.ndim == 3 and value.shape[1] == mask.shape[1]))


def _remembering(encode: Callable[[list[str]], Conditioning]) -> Callable[[list[str]], Conditioning]:
    """Encode the prompts of n pictures of one request once."""
    kept: OrderedDict[tuple[str, ...], Mapping[str, Tensor]] = OrderedDict()

    def remembered(prompts: list[str]) -> Conditioning:
        key = tuple(prompts)
        if key not in kept:
            kept[key] = encode(prompts)
        kept.move_to_end(key)
        while len(kept) > PROMPTS_KEPT:
            kept.popitem(last=False)
        return kept[key]

    return remembered
