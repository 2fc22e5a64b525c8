"""Llama 3.1 8B with rows of 1,048,576 tokens on a v5p-256: 128 chips, named after its 256 cores.

Four rows a step, each split over 32 chips, whose keys go round in a ring; 4.2B tokens in all. Rotations are those of
Llama 3.1, with theta raised as "NTK-aware" scaling by 8 raises it (arXiv 2309.00071, section 3.1). To begin with
trained weights give their folder with --init_from, after setting this theta in its config.json. What it needs and how
fast it could be:

    lmjax plan configs/llama31_8b_1m_v5p256.py --topology v5p:4x4x8

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
        name="llama31_8b_1m_v5p256",
        steps=1000,
        batch_size=4,
        seq_len=1_048_576,
        model=preset("llama3.1-8b", max_seq_len=1_048_576, rope_theta=4_134_231.0),
        compute=ComputeConfig(dtype="bfloat16", remat="full", context="ring"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=50),
        mesh=MeshConfig(fsdp=4, context=32),
        evals=EvalConfig(every=100, batches=4),
        checkpoint=CheckpointConfig(every=50, keep=3),
    )
