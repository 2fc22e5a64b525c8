"""Layers without a model: pure functions on arrays. Weights and their names live in `lmjax.models`."""
