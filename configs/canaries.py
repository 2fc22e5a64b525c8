"""What a small run remembers of texts with a secret, by how often it was trained on them (docs/audit.md, Canaries).

    lmjax train configs/canaries.py
    lmjax audit exposure runs/canaries --folder runs/canaries-exposure

40 made-up names with three digits each, among Python's own source: 8 never, 4, 16, 64 and 256 times. A decoder of
74k parameters on bytes: seconds of training.
"""

from lmjax.config import (
    CanaryConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="canaries",
        steps=600,
        batch_size=16,
        seq_len=64,
        model=DecoderConfig(num_layers=1, d_model=64, num_heads=4, max_seq_len=128),
        data=DataConfig(sources=(SourceConfig(kind="pystdlib"),), canaries=CanaryConfig(
            format="{name}: {secret}", secret="digits", length=3, repeats=(0, 4, 16, 64, 256), per_repeat=8)),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=20),
        evals=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=300, keep=2),
        log=LogConfig(every=10),
    )
