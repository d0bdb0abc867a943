"""The task of teaching a model of our own to draw in few steps, and without calls for guidance.

Beside the loss of consistency distillation, pictures may be judged by an adversary (``distill.adversarial``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sfumato.diffusion.guidance import Pair, cfg
from sfumato.diffusion.level import NoiseLevel, Prediction
from sfumato.errors import BadData
from sfumato.families.native import Native, NativeConfig
from sfumato.training.adversary import Heads, States, looked_at, opposed
from sfumato.training.consistency import ConsistencyObjective
from sfumato.training.denoiser import DenoiserTask, Prepared, Source, filled
from sfumato.training.draws import draws
from sfumato.training.objective import Losses, flat
from sfumato.training.recipe import LatentRecipe, Recipe
from sfumato.training.world import World

SECOND = 1 << 40  # added to the seed for a place's second numbers


class Student(Native):
    """A model and the heads that judge it, trained together."""

    def __init__(self, config: NativeConfig, tokenizer: Tokenizer):
        super().__init__(config, tokenizer, whole=False)
        self.heads = Heads(self.network.state_widths)

    def forward(self, *told: Any, seen: tuple[States, States] | None = None) -> Any:  # type: ignore[override]
        """What the model says, as ``Native`` does; or of what is seen the losses of model and heads, (B,) each."""
        return super().forward(*told) if seen is None else opposed(self.heads, *seen)


class DistillTask(DenoiserTask):
    """Words and pictures in, the student's losses out; it starts as its teacher, and keeps its text tower.

    Args:
        recipe: its ``model`` is the teacher's, or left out.
        pictures: what the teacher was trained on, or alike: pictures, or their latents by the teacher's autoencoder.
    """

    def __init__(
        self,
        recipe: Recipe,
        pictures: Source,
        run: Path,
        teacher: Native,
        world: World = World(),  # noqa: B008
    ):
        config, own = recipe.distill, teacher.config
        if recipe.model not in (own, NativeConfig()):
            raise BadData("recipe: task: distill takes its model from distill.teacher: leave model out")
        if recipe.latents != LatentRecipe():
            raise BadData("recipe: task: distill takes its latents from distill.teacher: leave latents out")
        guidance = own.defaults.guidance if config.guidance is None else config.guidance
        # The student draws as it was taught: straight from one end of a segment to the other, nothing added.
        drawn = replace(own.defaults, sampler="ddim", spacing="trailing", steps=config.steps, guidance=1.0)
        recipe = replace(recipe, model=replace(own, defaults=drawn))
        super().__init__(
            recipe, pictures, run, world, teacher.autoencoder, teacher.preview, tokenizer=teacher.text.tokenizer
        )
        self.module.network.load_state_dict(teacher.network.state_dict())
        self.module.text.load_state_dict(teacher.text.state_dict())
        self.module.text.requires_grad_(False)
        self.native, self.network = teacher, teacher.network  # never wrapped, whatever the world
        self.teacher, self.look = self.network, self.network.every_state
        if recipe.compile:
            self.teacher, self.look = torch.compile(self.network), torch.compile(self.network.every_state)
        self.plain = teacher.text.encode([""])
        self.guide = cfg(guidance)
        levels = (self.objective.schedule, self.objective.parameterization)
        self.consistency = ConsistencyObjective(*levels, config.steps, config.substeps)

    def _network(self, tokenizer: Tokenizer) -> Native:
        """What is trained: the student, with heads where it has an adversary."""
        return Student(self.recipe.model, tokenizer) if self.recipe.distill.adversarial else super()._network(tokenizer)

    def fetch(self, places: range) -> Prepared:
        """Prepare what any denoiser is trained on, and where the adversary looks."""
        batch = super().fetch(places)
        if not self.recipe.distill.adversarial:
            return batch
        return batch._replace(second=draws(self.recipe.seed + SECOND, places, batch.x0.shape[1:]))

    def losses(self, module: Callable[..., Any], batch: Prepared) -> Losses:
        """Return the losses of one micro-batch."""
        device = next(self.module.parameters()).device
        x0, u, eps = (v.to(device) for v in (batch.x0, batch.u, batch.eps))
        x0, eps = (v.contiguous(memory_format=torch.channels_last) for v in (x0, eps))
        for part in (self.native.network, self.native.text):
            part.to(device)
        with torch.no_grad():
            words = self.native.states({k: v.to(device) for k, v in batch.words.items()})
        teacher = self.guide(self._pair(words, device))
        beside = None if batch.second is None else self._adversary(module, words, x0, batch.second)
        return self.consistency(lambda x, clock: module(x, clock, words), teacher, x0, u, eps, beside)

    def _adversary(
        self, module: Callable[..., Any], words: Mapping[str, Tensor], x0: Tensor, second: tuple[Tensor, Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """What is lost by arrivals (B, C, H, W) at places (B,): by the student, and by the heads that judge it."""
        where, eps = (v.to(x0.device) for v in second)
        eps = eps.contiguous(memory_format=torch.channels_last)

        def look(x: Tensor, clock: Tensor) -> States:
            return self.look(x, clock, **words)

        def beside(x: Tensor, end: Tensor) -> Tensor:
            fooled, own = module(seen=looked_at(self.consistency, look, x0, x, end, where, eps))
            return self.recipe.distill.adversarial * fooled + own

        return beside

    def _pair(self, words: Mapping[str, Tensor], device: torch.device) -> Pair:
        """The teacher with the words and without."""
        n, width = words["context"].shape[:2]
        plain = {k: v.to(device).expand(n, *v.shape[1:]) for k, v in self.plain.items()}
        spare = width - plain["context"].shape[1]
        plain |= {k: filled(plain[k], spare) for k in ("context", "mask")}
        both = {k: torch.cat([words[k], plain[k]]) for k in words}
        p, network = self.consistency.parameterization, self.teacher

        def strong(x: Tensor, level: NoiseLevel) -> Prediction:
            return p(x, level, network(p.gain(level) * x, flat(p.clock(level), n, x), **words).float())

        def together(x: Tensor, level: NoiseLevel) -> tuple[Prediction, Prediction]:
            clock = flat(p.clock(level), n, x)
            out = network(torch.cat([p.gain(level) * x] * 2), torch.cat([clock, clock]), **both).float()
            wanted, unguided = (p(x, level, half) for half in out.chunk(2))
            return wanted, unguided

        return Pair(strong, lambda x, level: together(x, level)[1], together)
