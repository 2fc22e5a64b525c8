"""Pytrees by name: paths, regular-expression masks, counts and norms.

Nothing here knows a model: a leaf's path is its dictionary keys joined by "/", such as
`blocks/attention/q_DNH`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: Sequence[Any]) -> str:
    """'blocks/attention/q_DNH' for a jax key path; attributes, keys and indices alike."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_with_name(f: Callable, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map`, with the leaf's path name as first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: f(path_name(path), *leaves), tree, *rest)


def named_leaves(tree: Any) -> dict[str, Any]:
    """{path name: leaf}, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def name_mask(tree: Any, patterns: Sequence[str]) -> Any:
    """A tree of bool: True where any of the regular expressions is found in the leaf's path name."""
    compiled = [re.compile(p) for p in patterns]
    return map_with_name(lambda name, _: any(p.search(name) for p in compiled), tree)


def count(tree: Any) -> int:
    """Number of array elements."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def global_norm(tree: Any) -> jax.Array:
    """sqrt of the sum of squares of every element, accumulated in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def to_dict(tree: Any) -> dict:
    """Any pytree as nested plain dictionaries, keyed by the parts of its path names."""
    nested: dict = {}
    for name, leaf in named_leaves(tree).items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def from_dict(like: Any, nested: dict) -> Any:
    """The inverse of `to_dict`: leaves of `nested` in the structure of `like`."""
    leaves = named_leaves(nested)
    return map_with_name(lambda name, _: leaves[name], like)
