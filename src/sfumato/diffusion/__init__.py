"""The mathematics of diffusion: noise levels, schedules, parameterizations, spacings, samplers and guidance.

Knows no network, and runs on NumPy arrays and torch tensors alike without importing torch.
"""

from sfumato.diffusion.guidance import GUIDANCE, Guidance, Pair
from sfumato.diffusion.inpainting import repaint
from sfumato.diffusion.interpolation import lerp, slerp
from sfumato.diffusion.level import Denoiser, Noise, NoiseLevel, Prediction, q_sample
from sfumato.diffusion.parameterizations import PARAMETERIZATIONS, Parameterization
from sfumato.diffusion.samplers import SAMPLERS, Sampler, Step, find_sampler
from sfumato.diffusion.schedules import SCHEDULES, Schedule
from sfumato.diffusion.spacings import SPACINGS, Path, Spacing, find_spacing

__all__ = [
    "GUIDANCE",
    "PARAMETERIZATIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "Denoiser",
    "Guidance",
    "Noise",
    "NoiseLevel",
    "Pair",
    "Parameterization",
    "Path",
    "Prediction",
    "Sampler",
    "Schedule",
    "Spacing",
    "Step",
    "find_sampler",
    "find_spacing",
    "lerp",
    "q_sample",
    "repaint",
    "slerp",
]
