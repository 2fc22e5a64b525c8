"""10M parameters on Python's own source: three epochs, about two and a half hours on two cores.

The same text as configs/quickstart.py and nothing to download; a larger model, vocabulary and row. The mark to
beat is gzip -9 on the held-out text, which `lmjax eval` prints beside the model's bits per byte.
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
        steps=4500,
        batch_size=8,
        seq_len=256,
        model=preset("tiny-10m", max_seq_len=1024),
        objective=PretrainConfig(goldfish=GoldfishConfig(strategy="hash", k=8, context=13)),
        data=DataConfig(sources=(SourceConfig(kind="pystdlib"),), tokenizer="bpe", bpe_vocab_size=4096),
        optim=OptimConfig(learning_rate=2.5e-3, warmup_steps=50),
        evals=EvalConfig(every=500, prompts=("def ", "class ", "import "), sample=SampleConfig(max_new_tokens=128)),
        checkpoint=CheckpointConfig(every=100, keep=2),
        log=LogConfig(every=10),
    )
