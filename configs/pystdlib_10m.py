"""10M parameters on Python's own source, about one hour on two cores: better than gzip -9 at predicting it.

The same text as configs/quickstart.py and nothing to download; a larger model, vocabulary and row. Half an epoch.
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
        name="pystdlib_10m",
        steps=800,
        batch_size=8,
        seq_len=256,
        model=preset("tiny-10m", max_seq_len=1024),
        objective=PretrainConfig(goldfish=GoldfishConfig(strategy="hash", k=8, context=13)),
        data=DataConfig(sources=(SourceConfig(kind="pystdlib"),), tokenizer="bpe", bpe_vocab_size=4096),
        optim=OptimConfig(learning_rate=2.5e-3, warmup_steps=50),
        evals=EvalConfig(every=200, prompts=("def ", "class ", "import "), sample=SampleConfig(max_new_tokens=128)),
        checkpoint=CheckpointConfig(every=100, keep=2),
        log=LogConfig(every=10),
    )
