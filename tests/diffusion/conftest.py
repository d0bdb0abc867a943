"""No time limit per example: a busy machine is no reason to fail."""

from hypothesis import settings

settings.register_profile("diffusion", deadline=None)
settings.load_profile("diffusion")
