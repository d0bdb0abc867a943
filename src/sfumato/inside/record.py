"""How findings are told to a page: JSON with pictures as data URLs."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.diffusion.level import NoiseLevel

Json = dict[str, Any]


def data_url(pixels: NDArray[np.uint8]) -> str:
    """Pixels (H, W, 3), or grey (H, W), as a PNG inside a URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def number(value: float) -> float | None:
    """A float as JSON can say it: infinite ones are None."""
    return float(value) if math.isfinite(value) else None


def level_dict(level: NoiseLevel) -> Json:
    """A noise level with its log signal-to-noise ratio, None where that is infinite."""
    return {
        "t": float(level.t),
        "alpha": float(level.alpha),
        "sigma": float(level.sigma),
        "log_snr": number(level.log_snr),
    }
