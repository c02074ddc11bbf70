"""The state of a run: a pytree, donated to the step, saved whole, restored bit for bit. Nothing in it is random."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lwd_jax.parallel.rules import param_shardings, path_string, replicated
from lwd_jax.weights.table import flat, nested


class State(NamedTuple):
    """Attributes:
    step: int32 [], steps done, skipped ones included.
    params: the model's parameters, nested dicts; frozen ones too.
    opt_state: of the trainable parameters only.
    ema: float32 average of the trainable parameters (of schedule-free AdamW: its own average x); {} = none.
    skipped: int32 [], steps whose loss or gradient was not finite.
    streak: int32 [], how many of them stand at the end, without a finite one in between.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    streak: jax.Array


def split(params: Any, trained: frozenset[str]) -> tuple[Any, Any]:
    """(trainable, frozen): two nested trees that `merge` joins."""
    leaves = flat(params)
    return (
        nested({path: leaf for path, leaf in leaves.items() if path in trained}),
        nested({path: leaf for path, leaf in leaves.items() if path not in trained}),
    )


def merge(first: Any, second: Any) -> Any:
    """One nested tree of both; where both have a leaf, `second`'s."""
    return nested(flat(first) | flat(second))


def float32(tree: Any) -> Any:
    """Every leaf in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def new_state(params: Any, trained: frozenset[str], optimizer: optax.GradientTransformation, average: bool) -> State:
    """The state before the first step. What trains is float32, whatever the dtype of what is frozen: bfloat16 weights
    do not move at the learning rates in use.
    """
    trainable, frozen = split(params, trained)
    trainable = float32(trainable)
    zero = jnp.zeros((), jnp.int32)
    params = merge(frozen, trainable)
    return State(zero, params, optimizer.init(trainable), trainable if average else {}, zero, zero)


def eval_params(state: State) -> Any:
    """What previews and exports use: the average where there is one, in the dtype of the parameters."""
    params, average = flat(state.params), flat(state.ema)
    return nested(params | {path: leaf.astype(params[path].dtype) for path, leaf in average.items()})


def _dict_path(path) -> str:
    """The trailing dict keys of a key path: of a moment, the path of its parameter."""
    keys = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        keys.append(key)
    return path_string(reversed(keys))


def state_shardings(abstract: State, mesh: Mesh) -> State:
    """Layouts of the state: whatever belongs to a parameter and has its shape lies as the parameter does, all else is
    whole on every device (counters, Adafactor's rows and columns)."""
    shardings = param_shardings(abstract.params, mesh)
    by_path, shapes = flat(shardings), {path: leaf.shape for path, leaf in flat(abstract.params).items()}

    def of(path, leaf):
        name = _dict_path(path)
        return by_path[name] if shapes.get(name) == leaf.shape else replicated(mesh)

    whole = replicated(mesh)
    return State(
        step=whole,
        params=shardings,
        opt_state=jax.tree_util.tree_map_with_path(of, abstract.opt_state),
        ema=jax.tree_util.tree_map_with_path(of, abstract.ema),
        skipped=whole,
        streak=whole,
    )
