"""lmjax: train language models in JAX, and know what they learned and what they memorised.

    from lmjax import load
    model, tokenizer = load("runs/quickstart")       # or a Hugging Face folder, or a GGUF file

Import what else you need from its rooms: `lmjax.models`, `lmjax.losses`, `lmjax.data`, `lmjax.decode`,
`lmjax.config`. Nothing is imported before it is asked for, so that `lmjax --help` is quick.
"""

__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":
        from lmjax.interop.load import load

        return load
    raise AttributeError(f"module 'lmjax' has no attribute {name!r}")
