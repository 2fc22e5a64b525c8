"""Llama 3.2's 1B shape from nothing, on a v5e slice of 16 chips.

A quarter of a million tokens a step, four rows a chip; 26B tokens in all. What it needs and how fast it could be:

    lmjax plan configs/llama32_1b_v5e16.py --topology v5e:4x4

The data is yours to name: make shards with `lmjax data prepare`, and set `path` and `tokenizer` below to their folder.
"""

from lmjax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    preset,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="llama32_1b_v5e16",
        steps=100_000,
        batch_size=64,
        seq_len=4096,
        model=preset("llama3.2-1b", max_seq_len=8192),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=16),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
