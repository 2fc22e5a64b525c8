"""What is learned: each objective is one file with a config and one function

    loss(config, model, batch, key) -> (sum, weight, metrics)

The sum and the weight are over tokens (or pairs, …), never a mean: the step divides once, by the weight of
the whole global batch. `metrics` maps a name to (sum, weight) as well, so that what is reported is exact
under accumulation and ragged masks.
"""
