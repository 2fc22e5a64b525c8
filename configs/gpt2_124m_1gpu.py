"""GPT-2 124M on 10B tokens, on one GPU of 80 GB.

Half a million tokens a step in 16 micro-batches. The vocabulary is GPT-2's 50,257 tokens, padded to a multiple of 64.
What it needs and how fast it could be:

    lmjax plan configs/gpt2_124m_1gpu.py --topology h100:1

The data is yours to name: make shards with `lmjax data prepare`, and set `path` and `tokenizer` below to their folder.
"""

from lmjax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    preset,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="gpt2_124m_1gpu",
        steps=19_073,
        batch_size=512,
        seq_len=1024,
        accumulate=16,
        model=preset("gpt2-124m", vocab_size=50304),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        data=DataConfig(sources=(SourceConfig(kind="shards", path="path/to/shards"),), tokenizer="path/to/shards"),
        optim=OptimConfig(learning_rate=6e-4, warmup_steps=700),
        evals=EvalConfig(every=1000, batches=32),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )
