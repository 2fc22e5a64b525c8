"""Llama 2 7B on a v5e pod of 256 chips: the setting that docs/planning.md holds beside another stack.

Two million tokens a step, four rows a chip; 0.5T tokens in all. What it needs and how fast it could be:

    lmjax plan configs/llama2_7b_v5e256.py --topology v5e:16x16

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
        name="llama2_7b_v5e256",
        steps=250_000,
        batch_size=1024,
        seq_len=2048,
        model=preset("llama2-7b"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=256),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
