"""A server whose model has ControlNets and a LoRA beside it: what its clients send, and what comes out."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import ControlNetModel
from PIL import Image
from published import make, shaken
from serving import Serve

import sfumato
from sfumato.errors import BadRequest
from sfumato.families.additions import Additions
from sfumato.pipeline.picture import Picture
from sfumato.server.settings import Settings


def test_a_server_follows_several_control_pictures(tmp_path: Path, serve: Serve) -> None:
    pipe = make("sd1", 1)
    widths = [8] * pipe.vae_scale_factor.bit_length()
    for name in ("first", "second"):
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths)
        shaken(net, 0.1).save_pretrained(tmp_path / name)
    pipe.save_pretrained(tmp_path / "model")
    nets = [tmp_path / "first", tmp_path / "second"]
    flags = [word for path in nets for word in ("--control", str(path))]
    server = serve("sfumato.families:load", "--batch", "1", *flags, model=tmp_path / "model")
    side = 8 * pipe.vae_scale_factor
    pictures = []
    for colour in ((250, 20, 80), (10, 90, 200)):
        file = io.BytesIO()
        Image.new("RGB", (side, side), colour).save(file, "PNG")
        pictures.append(file.getvalue())
    upload = server.http.post("/uploads", content=pictures[0], headers={"content-type": "image/png"}).json()["id"]
    settings: dict[str, Any] = {"width": side, "height": side, "steps": 4, "seed": 3, "control_scale": [0.5, 0.9]}
    settings |= {"control_range": [[0, 0.5], [0.25, 1]], "sampler": "ddim"}
    sent = [upload, base64.b64encode(pictures[1]).decode()]
    job = server.ended(server.submit("a fox", control_image=sent, **settings)["id"])
    assert job["state"] == "done", job["error"]
    assert len(job["request"]["control_image"]) == 2
    data = server.http.get(f"/pictures/{job['id']}-0.png?scale=1").content
    (tmp_path / "made.png").write_bytes(data)
    made = Picture.open(tmp_path / "made.png")
    assert [i.kind for i in made.ingredients] == ["controlnet"] * 2
    again = sfumato.load(tmp_path / "model", controlnet=nets)
    [expected] = again.generate("a fox", control_image=pictures, **settings)
    served = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert abs(served - expected.pixels).max() <= 1  # a worker may count on another number of threads
    [other] = again.generate("a fox", control_image=pictures, **settings | {"control_scale": [0.9, 0.5]})
    assert abs(served - other.pixels).max() > 1
    answer = server.http.post("/jobs", json={"prompt": "a", "control_image": sent[1]})
    assert answer.status_code == 422
    assert "control_image has 1 picture, and model 'model' follows 2: give one for each" in answer.text


def test_what_is_added_travels_to_the_worker_and_goes_with_one_model(tmp_path: Path) -> None:
    added = Additions.of(
        [("a.safetensors", 0.5), "b.safetensors"], {"<x>": "c.pt"}, "vae", ["d", "e"], "f.gguf", "ip", "tower"
    )
    assert Additions.from_dict(added.to_dict()) == added
    assert Additions.from_dict(Additions().to_dict()) == Additions()
    assert not Additions()
    assert Settings(tmp_path, ("one",), added).additions is added
    for models in ((), ("one", "two")):
        with pytest.raises(BadRequest, match="added to one model: name one"):
            Settings(tmp_path, models, added)
