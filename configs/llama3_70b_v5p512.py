"""Llama 3 70B on a v5p-512: 256 chips, named after its 512 cores.

Four million tokens a step, two rows a chip; 1T tokens in all. What it needs and how fast it could be:

    lmjax plan configs/llama3_70b_v5p512.py --topology v5p:4x8x8

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
        name="llama3_70b_v5p512",
        steps=250_000,
        batch_size=512,
        seq_len=8192,
        model=preset("llama3-70b"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=1.5e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=256),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
