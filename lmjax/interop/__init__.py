"""Exchange with other libraries: Hugging Face folders in and out, GGUF files in, the lm-eval harness.

    from lmjax import load                      # run folder, Hugging Face folder or GGUF file -> model, tokenizer
    from lmjax.interop.hf import read_hf, write_hf

What is read is data: safetensors, JSON and GGUF. Pickles are refused, and code that comes with a model is never run.
"""
