"""A mixture of experts on Python's own source: two of eight experts a token, and the FLOPs of configs/quickstart.py.

The same text, tokenizer, loss and steps as the quickstart, and nothing to download; the comparison is in docs/moe.md.
"""

from lmjax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GoldfishConfig,
    LogConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SampleConfig,
    SourceConfig,
    preset,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="pystdlib_moe",
        steps=1200,
        batch_size=8,
        seq_len=128,
        model=preset("tiny-moe-1m", max_seq_len=512),
        objective=PretrainConfig(goldfish=GoldfishConfig(strategy="hash", k=4, context=13), router_balance=1e-2,
                                 router_z=1e-3),
        data=DataConfig(sources=(SourceConfig(kind="pystdlib"),), tokenizer="bpe", bpe_vocab_size=2048),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=60),
        evals=EvalConfig(every=150, batches=25, prompts=("def ", "class ", "import "),
                         sample=SampleConfig(max_new_tokens=96)),
        checkpoint=CheckpointConfig(every=300, keep=2),
        log=LogConfig(every=10),
    )
