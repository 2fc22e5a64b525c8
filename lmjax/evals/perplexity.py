"""Held-out loss, perplexity and bits per byte.

Bits per byte is the code length of the text under the model divided by its UTF-8 bytes, so it compares
across tokenizers and with compressors. Every target counts, the end of each document too. No goldfish mask
is ever applied here.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lmjax.loader import local_rows, to_global
from lmjax.losses.cross_entropy import cross_entropy


def make_eval_step(graphdef: nnx.GraphDef, token_bytes_V: np.ndarray) -> Callable:
    """eval_step(params, batch) -> (sum of nats, targets, bytes of the targets), float32 scalars."""
    token_bytes_V = jnp.asarray(token_bytes_V, jnp.float32)

    @jax.jit
    def eval_step(params, batch):
        model = nnx.merge(graphdef, params)
        x_BTD = model.hidden(batch["tokens"], batch["segments"], batch["positions"])
        total, _ = cross_entropy(x_BTD, model.head_VD, batch["targets"], batch["weights"],
                                 softcap=model.config.logit_softcap)
        counted = batch["weights"] > 0
        return total, jnp.sum(counted), jnp.sum(jnp.where(counted, token_bytes_V[batch["targets"]], 0))

    return eval_step


def evaluate(eval_step: Callable, params, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh,
             batch_size: int) -> dict[str, float]:
    """{loss, perplexity, bits_per_byte, tokens, bytes} over batches of `batch_size` rows, of which each host
    gives its own (`loader.local_rows`).

    Sums are taken in float64 on the host, so that long evaluations lose nothing.
    """
    totals = np.zeros(3)  # nats, targets, bytes
    pending = None  # fetched one batch late, so that the device never waits for the host
    for batch in batches:
        placed = to_global(batch, local_rows(mesh, batch_size), mesh, batch_size)
        ready, pending = pending, eval_step(params, placed)
        if ready is not None:
            totals += [float(x) for x in jax.device_get(ready)]
    if pending is not None:
        totals += [float(x) for x in jax.device_get(pending)]
    nats, tokens, text_bytes = totals
    loss = nats / max(tokens, 1.0)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(text_bytes, 1.0),
            "tokens": int(tokens), "bytes": int(text_bytes)}
