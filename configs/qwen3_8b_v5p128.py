"""Qwen3's 8B shape from nothing, on a v5p-128: 64 chips, named after its 128 cores.

Two million tokens a step, eight rows a chip; 0.5T tokens in all. What it needs and how fast it could be:

    lmjax plan configs/qwen3_8b_v5p128.py --topology v5p:4x4x4

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
        name="qwen3_8b_v5p128",
        steps=250_000,
        batch_size=512,
        seq_len=4096,
        model=preset("qwen3-8b"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=64),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
