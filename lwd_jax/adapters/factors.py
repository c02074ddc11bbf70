"""Adapters as leaves of a parameter tree.

Beside a kernel W [.., in, out] (leading axes are those of scanned stacks) may stand

    lora_a [.., in, r], lora_b [.., r, out], lora_scale [..]   the pair that trains
    fixed_a [.., in, s], fixed_b [.., s, out]                  pairs that do not

all float32, and the layer computes with W + lora_scale lora_a lora_b + fixed_a fixed_b (nn.layers.Dense), without ever
forming that sum. W itself stays what the base's checkpoint holds, bit for bit.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lwd_jax.errors import UserError
from lwd_jax.nn.layers import FIXED, SCALE, TRAINED
from lwd_jax.weights.table import flat, nested

NAMES = (*TRAINED, SCALE, *FIXED)


def _leaf(path: str) -> str:
    return path.rpartition("/")[2]


def is_factor(path: str) -> bool:
    """Whether a leaf belongs to an adapter."""
    return _leaf(path) in NAMES


def trainable(paths: Iterable[str]) -> list[str]:
    """The paths that may train: of an adapted model its trained factors alone, of any other all."""
    paths = list(paths)
    return [path for path in paths if _leaf(path) in TRAINED] if any(map(is_factor, paths)) else paths


def saved(params: Any) -> Any:
    """What a checkpoint keeps of the parameters: of an adapted model the factors alone, of any other all."""
    factors = {path: leaf for path, leaf in flat(params).items() if is_factor(path)}
    return nested(factors) if factors else params


def product(a, b):
    """a b in full float32 precision, [.., in, r] [.., r, out] -> [.., in, out]."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def pairs_beside(leaves: Mapping[str, Any], path: str) -> list[tuple[Any, Any]]:
    """The factors beside one kernel of a flat tree, scales multiplied into the second of each pair: [(a, b), ..]."""
    pairs = []
    if f"{path}/{SCALE}" in leaves:
        a, b, scale = (leaves[f"{path}/{name}"] for name in (*TRAINED, SCALE))
        pairs.append((a, scale[..., None, None] * b))
    if f"{path}/{FIXED[0]}" in leaves:
        pairs.append(tuple(leaves[f"{path}/{name}"] for name in FIXED))
    return pairs


def joined(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """One pair (a, b) of the summed rank whose product is the sum of the products."""
    firsts, seconds = zip(*pairs)
    return jnp.concatenate(firsts, axis=-1), jnp.concatenate(seconds, axis=-2)


def _kernels(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the layers that multiply by a matrix; convolutions do not."""
    layers = [path.removesuffix("/kernel") for path in leaves if path.endswith("/kernel")]
    return [path for path in layers if "conv" not in _leaf(path)]


def targeted(leaves: Mapping[str, Any], targets: Iterable[str]) -> list[str]:
    """Paths of the layers that a target names: a regular expression for the end of the path, in whole components. "q"
    is every layer of that name, "picture/q" those of the picture stream, "joint_blocks/.*" every layer of these blocks.

    Raises:
      UserError: a malformed target, or one that names no layer; with the names that exist.
    """
    layers, found = _kernels(leaves), set()
    for target in targets:
        try:
            named = {path for path in layers if re.search(f"(^|/)({target})$", path)}
        except re.error as error:
            raise UserError(f"'{target}' of adapter.targets is not a regular expression: {error}.") from error
        if not named:
            names = ", ".join(sorted({_leaf(path) for path in layers}))
            raise UserError(
                f"'{target}' of adapter.targets names no layer of this model. The names that exist: {names}."
            )
        found |= named
    return sorted(found)


def check_rank(path: str, shape: tuple[int, ...], rank: int) -> None:
    """Raises UserError where the kernel of this shape has no such rank."""
    if not 1 <= rank <= min(shape[-2:]):
        raise UserError(
            f"adapter.rank is {rank}, but that of '{path}' ({shape[-2]} x {shape[-1]}) lies between 1 and "
            f"{min(shape[-2:])}."
        )


def _adapted(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of the layers that have factors."""
    return sorted({path.rpartition("/")[0] for path in leaves if is_factor(path)})


def frozen(params: Any) -> Any:
    """The same model with nothing left to train: of every layer that has factors, all of them in its fixed pair."""
    leaves = flat(params)
    kept = {path: leaf for path, leaf in leaves.items() if not is_factor(path)}
    for path in _adapted(leaves):
        kept |= {f"{path}/{name}": leaf for name, leaf in zip(FIXED, joined(pairs_beside(leaves, path)))}
    return nested(kept)


def merged(params: Any) -> Any:
    """The plain model: every kernel in its own dtype, with the factors beside it added to it in float32."""
    leaves = flat(params)
    kept = {path: leaf for path, leaf in leaves.items() if not is_factor(path)}
    for path in _adapted(leaves):
        kernel = leaves[f"{path}/kernel"]
        whole = kernel.astype(jnp.float32) + product(*joined(pairs_beside(leaves, path)))
        kept[f"{path}/kernel"] = whole.astype(kernel.dtype)
    return nested(kept)
