"""A first run: a 1M-parameter decoder with the goldfish loss, on Python's own source, on a laptop CPU.

Nothing is downloaded: the corpus is the standard library that your Python came with, the tokenizer a
byte-level BPE trained on it. About two and a half minutes on two cores.
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
        name="quickstart",
        steps=1200,
        batch_size=8,
        seq_len=128,
        model=preset("tiny-1m", max_seq_len=512),
        objective=PretrainConfig(goldfish=GoldfishConfig(strategy="hash", k=4, context=13)),
        data=DataConfig(sources=(SourceConfig(kind="pystdlib"),), tokenizer="bpe", bpe_vocab_size=2048),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=60),
        evals=EvalConfig(every=150, batches=25, prompts=("def ", "class ", "import "),
                         sample=SampleConfig(max_new_tokens=96)),
        checkpoint=CheckpointConfig(every=300, keep=2),
        log=LogConfig(every=10),
    )
