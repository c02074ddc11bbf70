"""What the comparisons of a backbone with diffusers' model of the same weights have in common."""

import numpy as np

from lwd_jax.weights.table import write


def tensors_of(model) -> dict:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def apart(ours, theirs, floor=0.0) -> float:
    """Relative error in the 2-norm; `floor` stands in for gradients that are 0 but for rounding."""
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), floor))


def assert_gradients_equal(rows, ours, model, bound: float = 1e-4) -> None:
    """Ours against those that torch has left on the parameters of `model`, each relative to its own length."""
    made = dict(write(rows, ours))
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    typical = float(np.median([np.linalg.norm(gradient) for gradient in theirs.values()]))
    worst = max((apart(made[name], gradient, 1e-3 * typical), name) for name, gradient in theirs.items())
    assert worst[0] <= bound, worst
