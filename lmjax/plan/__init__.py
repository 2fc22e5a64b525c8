"""A run before it exists: what it holds (`state`), and what a named machine would make of it (`lmjax plan`).

`machine` knows chips and topologies, `aot` has the real train step compiled for one in a child process (`child`), `hlo`
reads what the compiler wrote, `roofline` makes times of it, `page` shows them, `search` tries settings, and `published`
holds the roofline against runs that others have measured.
"""

from lmjax.plan.state import Plan, describe, make_batch, make_plan, parameter_table

__all__ = ["Plan", "describe", "make_batch", "make_plan", "parameter_table"]
