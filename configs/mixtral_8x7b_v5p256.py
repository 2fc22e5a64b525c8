"""Mixtral 8x7B on a v5p-256: 128 chips, named after its 256 cores.

Two million tokens a step, four rows a chip; 0.5T tokens in all. A chip gathers all experts of a layer when it is their
turn (fsdp alone), which costs less here than to send it the tokens of other chips (docs/planning.md). What it needs and
how fast it could be:

    lmjax plan configs/mixtral_8x7b_v5p256.py --topology v5p:4x4x8

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
        name="mixtral_8x7b_v5p256",
        steps=250_000,
        batch_size=512,
        seq_len=4096,
        model=preset("mixtral-8x7b"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=128),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
