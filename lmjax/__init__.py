"""lmjax: train language models in JAX, and know what they learned and what they memorised.

Import what you need from its rooms: `lmjax.models`, `lmjax.losses`, `lmjax.data`, `lmjax.decode`,
`lmjax.config`. Nothing is imported here, so that `lmjax --help` is quick.
"""
