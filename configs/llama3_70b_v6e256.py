"""Llama 3 70B on a v6e pod of 256 chips.

Two million tokens a step, one row a chip; 0.5T tokens in all. The inputs of the layers wait in the host's memory: with
`--compute.remat=full` it needs 30.1 of a chip's 31.2 GiB. What it needs and how fast it could be:

    lmjax plan configs/llama3_70b_v6e256.py --topology v6e:16x16

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
        name="llama3_70b_v6e256",
        steps=250_000,
        batch_size=256,
        seq_len=8192,
        model=preset("llama3-70b"),
        compute=ComputeConfig(dtype="bfloat16", remat="offload"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=1.5e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=256),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
