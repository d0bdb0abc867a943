"""Training: one loop for every model of ours; see ``loop`` for what makes its runs exact."""
