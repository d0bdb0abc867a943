"""Words into pictures by diffusion."""
