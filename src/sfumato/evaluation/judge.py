"""The judge: which words does a picture show? A small CLIP that has learned from real training pictures alone.

    picture → frozen features (lite0 ⊕ alex, 2,072) → two layers ┐
                                                                 ├ cosine · scale, softmax over all names known
    name    → frozen sentence encoder (MiniLM, 384) → one layer  ┘

It shares nothing with the model that it judges, and takes under a minute on a CPU. It errs, so its score on
real pictures always stands beside a model's. Source: Radford et al., CLIP (2103.00020), InfoNCE over names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sfumato.checkpoints import packaged
from sfumato.evaluation.bootstrap import Array
from sfumato.evaluation.cache import Cache, content_hash
from sfumato.families.pretrained import load_sentence_encoder
from sfumato.networks.towers import PictureHead, PictureHeadConfig

JITTER = 0.01  # of the names' vectors: too few to be learned by heart


@dataclass(frozen=True)
class JudgeConfig:
    """The judge's shape and training: AdamW, one cycle of the learning rate."""

    hidden: int = 512
    width: int = 256
    dropout: float = 0.3
    epochs: int = 25
    batch: int = 512
    rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0


class Judge(nn.Module):
    """Features of pictures (B, D) and vectors of names (C, 384) → similarities (B, C)."""

    def __init__(self, features: int, words: int, config: JudgeConfig):
        super().__init__()
        self.picture = PictureHead(PictureHeadConfig(features, config.hidden, config.dropout), config.width)
        self.words = nn.Linear(words, config.width)
        self.log_scale = nn.Parameter(torch.tensor(2.7))

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Compare every picture with every name."""
        x = F.normalize(self.picture(features), dim=1)
        return self.log_scale.exp() * x @ F.normalize(self.words(words), dim=1).T


def embed_names(names: Sequence[str], cache: Cache) -> Tensor:
    """Return the sentence encoder's unit vectors of names (C, 384); NoResources if it is not installed."""
    key = content_hash(packaged.MINILM.sha256, list(names))
    return cache.get_or_make("names", key, lambda: {"names": load_sentence_encoder().embed(list(names))})["names"]


def train_judge(
    features: NDArray[np.float32], labels: Sequence[int], words: Tensor, cache: Cache, config: JudgeConfig | None = None
) -> Judge:
    """Train a judge on pictures' features (N, D), the names they show (indices) and all names' vectors (C, 384).

    Names that no picture shows are never used as negatives: they would be learned to be wrong.
    """
    config = config or JudgeConfig()
    x, y = torch.from_numpy(features), torch.tensor(labels)
    judge = Judge(x.shape[1], words.shape[1], config)
    key = content_hash("judge-2", asdict(config), x, y, words)

    def make() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _train(Judge(x.shape[1], words.shape[1], config), x, y, words, config).state_dict()

    judge.load_state_dict(dict(cache.get_or_make("judge", key, make)))
    return judge.eval().requires_grad_(False)


def _train(judge: Judge, x: Tensor, y: Tensor, words: Tensor, config: JudgeConfig) -> Judge:
    judge.picture.standardize(x)
    known = torch.unique(y)  # names that some picture shows
    place = torch.full((len(words),), -1).scatter(0, known, torch.arange(len(known)))[y]
    batch = min(config.batch, len(x))
    steps = config.epochs * max(1, len(x) // batch)
    optimizer = torch.optim.AdamW(judge.parameters(), config.rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.rate, steps + 1)
    judge.train()
    for _ in range(steps):
        i = torch.randint(len(x), (batch,))
        vectors = words[known]
        loss = F.cross_entropy(judge(x[i], vectors + JITTER * torch.randn_like(vectors)), place[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge


def retrieval_ranks(similarity: Tensor, targets: Sequence[int]) -> NDArray[np.int64]:
    """Return how many names are at least as near as the right one, it left out: (B,) from (B, C); 0 is a hit."""
    own = similarity.gather(1, torch.tensor(targets)[:, None])
    return ((~(similarity < own)).sum(1) - 1).numpy()  # NaN is no nearer than anything


def recall_at(ranks: NDArray[np.int64], k: int) -> Array:
    """Return, for each picture, 1 if the right name is among the first k, else 0; the mean is R@k."""
    return (ranks < k).astype(np.float64)
