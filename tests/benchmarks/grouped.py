"""Times of a grouped product, forward and with its gradients, by implementation: the table of docs/moe.md.

    python tests/benchmarks/grouped.py 15          # the least of 15
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.nn import grouped


def masks(x_RD, sizes_E):
    """[E, R, 1]: the rows of each group."""
    ends_E, rows_R = jnp.cumsum(sizes_E), jnp.arange(x_RD.shape[0])
    return ((rows_R >= (ends_E - sizes_E)[:, None]) & (rows_R < ends_E[:, None]))[..., None]


def loop(x_RD, w_EDF, sizes_E):
    mask = masks(x_RD, sizes_E)
    return sum(jnp.where(mask[e], x_RD, 0) @ w_EDF[e] for e in range(w_EDF.shape[0]))


def scan(x_RD, w_EDF, sizes_E):
    def one(y, expert):
        mask, w = expert
        return y + jnp.where(mask, x_RD, 0) @ w, None
    return jax.lax.scan(one, jnp.zeros((x_RD.shape[0], w_EDF.shape[2])), (masks(x_RD, sizes_E), w_EDF))[0]


FORMS = {"one plain product": lambda x, w, sizes: x @ w[0],
         "blocks": lambda *a: grouped.grouped_matmul(*a, "blocks"),
         "ragged_dot": lambda *a: grouped.grouped_matmul(*a, "ragged"), "loop": loop, "scan": scan}


def least(f, args, times: int) -> float:
    """Milliseconds of the quickest call."""
    jax.block_until_ready(f(*args))
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        taken.append(time.perf_counter() - began)
    return min(taken) * 1e3


def main(times: int) -> None:
    for R, D, F, E in ((2048, 128, 192, 8), (2048, 256, 384, 32)):
        rng = np.random.default_rng(0)
        x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((R, D), (E, D, F)))
        args = x, w, jnp.asarray(np.bincount(rng.integers(0, E, R), minlength=E), jnp.int32)
        print(f"{R} x {D} -> {F}, E = {E}")
        for name, form in FORMS.items():
            both = jax.grad(lambda x, w, sizes, form=form: jnp.sum(jnp.sin(form(x, w, sizes))), argnums=(0, 1))
            forward, backward = (least(jax.jit(f), args, times) for f in (form, both))
            print(f"  {name:18} forward {forward:8.2f} ms, with gradients {backward:8.2f} ms", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
