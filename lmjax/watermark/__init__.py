"""Watermarks found again (`detect`, without JAX), measured under edits (`roc`) and learned (`whistle`)."""
