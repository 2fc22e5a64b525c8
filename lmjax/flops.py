"""FLOPs of a token, peaks of chips, and the model-FLOPs utilisation (MFU) that follows.

FLOPs count matrix products only, as PaLM does (arXiv 2204.02311, appendix B): 6 per matrix weight and
token, forward and backward, plus attention's 12 N H times the keys that a query sees on average. PaLM counts
every key of the row, seen or not; so figures by its formula are a little higher.
Recomputation is not counted. A ratio is given only where the peak is known for certain.
"""

# Dense bfloat16 peak of one JAX device, FLOP/s, from the vendors' data sheets. TPU v7 has two devices a chip.
PEAK_BF16 = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12, "NVIDIA B200": 2250e12,
}


def mean_keys(seq_len: int, window: int = 0) -> float:
    """Keys that a causal query sees, averaged over a row: (T + 1) / 2 where there is no window."""
    w = min(window or seq_len, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def per_token(matrix_weights: int, num_heads: int, head_dim: int, layer_windows: list[int],
              seq_len: int) -> float:
    """Training FLOPs of one token, forward and backward. matrix_weights includes the output matrix and
    leaves out embeddings that are only looked up."""
    attention = sum(12 * num_heads * head_dim * mean_keys(seq_len, window) for window in layer_windows)
    return 6.0 * matrix_weights + attention


def used_share(name: str, num_experts: int, experts_per_token: int) -> float:
    """The share of a weight that one token meets: A / E of what belongs to experts (`up_EDF`), all of the others."""
    per_expert = name.rpartition("_")[2].startswith("E") and not name.endswith("balance_E")
    return experts_per_token / num_experts if per_expert else 1.0


def peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device, or None where it is not known: other chips, CPUs, and float32 compute."""
    return PEAK_BF16.get(device_kind) if dtype == "bfloat16" else None
