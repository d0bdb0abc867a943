"""CLIP and T5 against transformers, on configurations chosen by the seed."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel
from transformers import T5Config as TheirT5Config

from sfumato.families.configs import clip_config, t5_config
from sfumato.networks.clip import ACTIVATIONS
from sfumato.text.clip import CLIPText
from sfumato.text.t5 import T5Encoder


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_clip_equals_transformers(seed: int, projected: bool) -> None:
    r = random.Random(seed)
    heads = r.choice([2, 3])
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=heads * r.choice([8, 12]),
        intermediate_size=r.choice([20, 40]),
        num_hidden_layers=r.choice([2, 3]),
        num_attention_heads=heads,
        max_position_embeddings=r.choice([9, 13]),
        projection_dim=r.choice([7, 16]),
        hidden_act=[*ACTIVATIONS][2 * seed + projected],
        bos_token_id=57,
        eos_token_id=r.choice([2, 58]),
    )
    torch.manual_seed(seed)
    theirs = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ours = CLIPText(clip_config(config.to_dict(), projected)).eval()
    ours.load_state_dict({k.removeprefix("text_model."): v for k, v in theirs.state_dict().items()})
    ids = torch.randint(3, 50, (3, config.max_position_embeddings))
    ids[0, 4:], ids[1, 6:], ids[2, -1] = 58, 58, 58
    expected = theirs(ids, output_hidden_states=True)
    out = ours(ids)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(out.last, expected.last_hidden_state, **close)
    for a, b in zip(out.layers[:-1], expected.hidden_states[:-1], strict=True):  # the version decides what the last is
        torch.testing.assert_close(a, b, **close)
    torch.testing.assert_close(out.pooled, expected.text_embeds if projected else expected.pooler_output, **close)


@pytest.mark.parametrize("seed", range(5))
@torch.inference_mode()
def test_t5_equals_transformers(seed: int) -> None:
    r = random.Random(seed)
    config = TheirT5Config(
        vocab_size=50,
        d_model=r.choice([16, 24]),
        d_kv=r.choice([4, 8]),
        d_ff=r.choice([20, 40]),
        num_layers=r.choice([1, 3]),
        num_heads=r.choice([2, 3]),
        feed_forward_proj=["relu", "gated-gelu", "gelu", "gated-silu", "gated-gelu_new"][seed],
        relative_attention_num_buckets=r.choice([8, 32]),
        relative_attention_max_distance=r.choice([20, 128]),
    )
    torch.manual_seed(seed)
    theirs = T5EncoderModel(config).eval()
    for p in theirs.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ours = T5Encoder(t5_config(config.to_dict())).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "encoder.embed_tokens.weight"})
    ids = torch.randint(0, 50, (2, 150))
    mask = torch.arange(150)[None] < torch.tensor([[150], [40]])
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, **close)
    expected = theirs(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(ids, mask)[mask], expected[mask], **close)
