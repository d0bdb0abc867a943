"""FID against torch-fidelity's own figures, under random weights of its Inception-v3."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapes import drawings
from torch import Tensor

from sfumato.errors import BadCheckpoint, NoResources
from sfumato.evaluation.cache import Cache
from sfumato.evaluation.extractors import inception
from sfumato.evaluation.measure import frechet, prepare
from sfumato.evaluation.truth import Truth, draw


@pytest.fixture(scope="module")
def fidelity() -> Any:
    """torch-fidelity, beside whose Inception torchvision is of no use, and may be built for another torch."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401  # type: ignore[import-not-found]
        except (ImportError, RuntimeError):
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                patch.delitem(sys.modules, name)
            for name in (
                "torchvision",
                "torchvision.datasets",
                "torchvision.transforms",
                "torchvision.transforms.functional",
            ):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            for name in ("CIFAR10", "CIFAR100", "STL10"):
                patch.setattr(sys.modules["torchvision.datasets"], name, torch.utils.data.Dataset, raising=False)
        yield pytest.importorskip("torch_fidelity", reason="pip install --no-deps torch-fidelity tqdm")


@pytest.fixture(scope="module")
def weights(fidelity: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights whose features are neither all zero nor all alike."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its constructor loads weights at once; without any they stay random
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch.load", lambda *args, **kwargs: {})
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    for m in network.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
    torch.save(network.state_dict(), path)
    return path


class Of(torch.utils.data.Dataset[Tensor]):
    """Pictures as torch-fidelity takes them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


@pytest.fixture(scope="module")
def truth() -> Truth:
    images, rows = drawings(copies=1, splits=False)
    return draw(images[::4], rows[::4], n=10)


def made(truth: Truth) -> Tensor:
    return drawings(copies=2, splits=False)[0][5::7][: len(truth.drawn["all"])]


def test_features_and_figure_are_torch_fidelitys(fidelity: Any, weights: Path, truth: Truth) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(weights)
    )
    pictures, real = made(truth), truth.images[list(truth.drawn["all"])]
    theirs = [get_featuresdict_from_dataset(Of(x), network, 4, False, True, False)["2048"] for x in (pictures, real)]
    ours = inception(weights)
    for x, features in zip((pictures, real), theirs, strict=True):
        assert features.std(0).median() > 1e-3 * features.abs().mean()
        np.testing.assert_allclose(ours(x, Cache(None)), features.numpy(), rtol=1e-4, atol=1e-5)

    [figure] = prepare(truth, ("fid",), Cache(None), weights).measure({"all": pictures})
    assert (figure.metric, figure.extractor, figure.n) == ("FID", "inception", len(pictures))
    # The distance stays what it is in a basis of all that the features span; theirs is slow in 2,048 dimensions.
    both = torch.cat(theirs).double()
    basis = torch.linalg.svd(both, full_matrices=False).Vh.T
    statistics = [fid_features_to_statistics(f.double() @ basis) for f in theirs]
    want = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert want > 0
    assert figure.value == pytest.approx(want, rel=1e-5)


def test_the_whole_of_torch_fidelity(fidelity: Any, weights: Path, truth: Truth, soak: bool) -> None:
    if not soak:
        pytest.skip("eigenvalues of a matrix of 2,048 rows take a minute: --soak")
    pictures, real = made(truth), truth.images[list(truth.drawn["all"])]
    found = fidelity.calculate_metrics(
        input1=Of(pictures), input2=Of(real), fid=True, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    extractor = inception(weights)
    value, interval, _ = frechet(*(extractor(x, Cache(None)).astype(np.float64) for x in (pictures, real)))
    assert value == pytest.approx(found["frechet_inception_distance"], rel=1e-4)
    assert interval.low <= value <= interval.high


def test_other_weights_are_refused(fidelity: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(BadCheckpoint, match="no weights of torch-fidelity"):
        inception(path)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), Cache(None))
    with pytest.raises(BadCheckpoint, match=r"missing\.pth"):
        inception(tmp_path / "missing.pth")


def test_a_torchvision_built_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    with pytest.raises(NoResources, match="pip install torch-fidelity torchvision"):
        inception(path)
