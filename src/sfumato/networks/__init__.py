"""Networks on plain tensors. They know no diffusion: what their output means is the parameterization's affair."""
