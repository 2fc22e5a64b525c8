"""Losses: arrays in, sums and weights out. No model, no mean: the train step divides once."""
