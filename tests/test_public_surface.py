"""The names that users import, and how little an import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sfumato
import sfumato.diffusion

TOP = {
    "BadCheckpoint", "BadData", "BadRequest", "NoResources", "Picture", "Pipeline", "Request", "SfumatoError", "load",
}  # fmt: skip
DIFFUSION = {
    "GUIDANCE", "PARAMETERIZATIONS", "SAMPLERS", "SCHEDULES", "SPACINGS", "NoiseLevel", "Prediction", "Step",
    "find_sampler", "find_spacing",
}  # fmt: skip


def test_the_names_of_the_package() -> None:
    assert set(sfumato.__all__) == TOP
    assert all(getattr(sfumato, name) is not None for name in TOP)
    assert set(dir(sfumato)) >= TOP
    assert isinstance(sfumato.__version__, str)
    with pytest.raises(AttributeError):
        sfumato.nothing  # noqa: B018


def test_the_names_of_the_mathematics() -> None:
    assert set(sfumato.diffusion.__all__) >= DIFFUSION


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sfumato", "torch numpy PIL rich scipy"),
        ("import sfumato; sfumato.Request('a', sampler='ddim')", "torch numpy PIL rich scipy"),
        ("import sfumato.diffusion", "torch PIL rich"),
        ("from sfumato.pipeline.picture import Picture", "torch rich scipy"),
        ("import sfumato.families", "torch numpy"),
        ("import sfumato.checkpoints.tensors", "torch numpy"),
        ("from sfumato.cli import main; main(['--help'])", "torch numpy PIL rich scipy"),
        ("from sfumato.cli import main; main(['generate', '--help'])", "torch numpy PIL rich scipy"),
        ("from sfumato.cli import main; assert main(['generate', 'x', '--steps', '0']) == 2", "torch numpy PIL rich"),
        ("from sfumato.cli import main; assert main(['generate', 'x', '--sampler', 'q']) == 2", "torch PIL rich"),
        ("from sfumato.cli import main; assert main(['generate', 'x', '--model', 'q']) == 2", "torch rich"),
        ("from sfumato.cli import main; main(['samplers'])", "torch PIL rich"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, absent: str, tmp_path: Path) -> None:
    check = f"import sys\n{code}\nprint('HEAVY', *[m for m in {absent.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("HEAVY\n"), done.stdout + done.stderr
