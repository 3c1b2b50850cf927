"""Differentiable augmentation of batches of images. Plain torch."""
