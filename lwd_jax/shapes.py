"""Array shapes as they are written in the docstrings, checked when a function is traced.

Axis letters: B batch, H W picture, h w latent, C channels, L tokens, D width, N heads.

>>> @shaped("z: B h w C, t: B -> B h w 1")
... def saliency(z, t): ...
"""

import functools
import inspect

import jax

Array = jax.Array


def _match(name: str, letters: tuple[str, ...], value, sizes: dict[str, int], where: str) -> None:
    shape = getattr(value, "shape", ())
    if len(shape) != len(letters):
        raise ValueError(f"{where}: '{name}' should have axes [{' '.join(letters)}], but its shape is {tuple(shape)}.")
    for letter, size in zip(letters, shape):
        expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        if letter != "_" and size != expected:
            raise ValueError(
                f"{where}: axis {letter} of '{name}' is {size}, but {expected} was expected (shape {tuple(shape)})."
            )


def shaped(spec: str):
    """Checks the shapes of named arguments and of the result.

    Args:
      spec: `"name: axes, name: axes -> axes"`. An axis is a letter (one size throughout the call), a number, or `_`
        (anything). Arguments that are not named, or are None, are not checked.

    Raises:
      ValueError: at trace time, with the function, the argument and both sizes.
    """
    inputs, _, output = spec.partition("->")
    wanted = {}
    for item in filter(None, (part.strip() for part in inputs.split(","))):
        name, _, axes = item.partition(":")
        wanted[name.strip()] = tuple(axes.split())
    result_axes = tuple(output.split())

    def decorate(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            sizes: dict[str, int] = {}
            for name, axes in wanted.items():
                if bound.get(name) is not None:
                    _match(name, axes, bound[name], sizes, function.__name__)
            result = function(*args, **kwargs)
            if result_axes:
                _match("result", result_axes, result, sizes, function.__name__)
            return result

        return checked

    return decorate
