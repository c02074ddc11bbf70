"""`--config=FILE` and `--config.section.field=value`, shared by the commands that take a config."""

import ast
import importlib.util
import json
from pathlib import Path

from lwd_jax.config import Config, load_config
from lwd_jax.errors import UserError


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def read_config(path: str, overrides: list[str]) -> Config:
    """The config of a `configs/*.py` file (its `get_config()`) or a resolved config.json, with overrides applied.

    Args:
      path: the file.
      overrides: `--config.a.b=value` strings; values are Python literals or plain words.

    Raises:
      UserError: a missing file, a file without get_config, a malformed or unknown override.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"There is no config file '{path}'.")
    if file.suffix == ".json":
        values = json.loads(file.read_text())
    else:
        spec = importlib.util.spec_from_file_location("lwd_run_config", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"The config file '{path}' has no get_config().")
        values = module.get_config().to_dict()
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
