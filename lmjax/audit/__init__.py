"""`lmjax audit`: what a model has memorised of given texts, beside what chance and a never-trained model give.

What lives here: probes, their passes through a model, the reductions (extraction, membership, bits), canaries and the
page. What does not: the per-token numbers (`lmjax.evals.score`), decoding (`lmjax.decode`). Definitions: docs/audit.md.
"""
