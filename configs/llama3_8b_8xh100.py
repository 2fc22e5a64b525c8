"""Llama 3 8B on one host of eight H100s.

A million tokens a step in eight micro-batches of two rows a GPU; 21B tokens in all, as one continues a model
(set init_from). What it needs and how fast it could be:

    lmjax plan configs/llama3_8b_8xh100.py --topology h100:8

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
        name="llama3_8b_8xh100",
        steps=20_000,
        batch_size=128,
        seq_len=8192,
        accumulate=8,
        model=preset("llama3-8b"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=1000),
        mesh=MeshConfig(fsdp=8),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
