"""Weight files: names → tensors, strictly, with a load report."""
