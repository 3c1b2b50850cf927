"""Parameterisations of the synthetic set: what the learnable tensors are."""
