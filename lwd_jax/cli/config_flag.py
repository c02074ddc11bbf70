"""`--config=FILE` and `--config.section.field=value`, shared by the commands that take a config."""

import ast
import importlib.util
import traceback

from etils.epath import Path
from ml_collections import ConfigDict

from lwd_jax.config import Config, load_config
from lwd_jax.errors import UserError, read_json
from lwd_jax.files import locate, on_disk


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _broken(file: Path, error: Exception) -> UserError:
    """What went wrong in a config file, and on which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    where = f" on line {line}" if line else ""
    return UserError(f"The config file '{file}' cannot be run: {type(error).__name__}{where}: {message}.")


def _from_python(file: Path) -> dict:
    spec = importlib.util.spec_from_file_location("lwd_run_config", on_disk(file, "A config in Python"))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"The config file '{file}' has no get_config().")
        values = module.get_config()
    except UserError:
        raise
    except Exception as error:  # the file is the user's own code: whatever it raises is theirs to mend
        raise _broken(file, error) from error
    if not isinstance(values, ConfigDict):
        kind = type(values).__name__
        raise UserError(f"get_config() of '{file}' must return an ml_collections.ConfigDict, but returned a {kind}.")
    return values.to_dict()


_READERS = {".json": read_json, ".py": _from_python}


def read_config(path: str, overrides: list[str]) -> Config:
    """The config of a `configs/*.py` file (its `get_config()`) or a resolved config.json, with overrides applied.

    Args:
      path: the file.
      overrides: `--config.a.b=value` strings; values are Python literals or plain words.

    Raises:
      UserError: a missing or broken file, another kind of file, one without get_config, a malformed or unknown
        override.
    """
    file = locate(path)
    if not file.is_file():
        raise UserError(f"There is no config file '{path}'.")
    if file.suffix not in _READERS:
        raise UserError(f"A config is a .py file with get_config(), or a .json file, but '{path}' is neither.")
    values = _READERS[file.suffix](file)
    for override in overrides:
        dotted, equals, text = override.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"Write {override} as {override}=VALUE.")
        *sections, field = dotted.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{override}: '{section}' is not a section of fields.")
        target[field] = _value(text)
    return load_config(values)
