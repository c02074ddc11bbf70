"""What commands compile is kept for the next ones: a run that resumes and a second `lwd sample` have the same programs,
and those of a model of full size take minutes. JAX reads the variables that say so when it is imported.
"""

from collections.abc import MutableMapping

from lwd_jax.files import cache_folder

FOLDER, LIMIT, ENABLED = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_ENABLE_COMPILATION_CACHE"
_BYTES = 4 << 30  # what was not read for longest goes first


def keep_compiled(command: str, environment: MutableMapping[str, str]) -> None:
    """Names a folder of the user's cache for compiled programs, unless the user named one.

    Args:
      command: of `lwd`. What `plan` compiles is for machines that are not here: JAX could keep it, but not read it.
      environment: that of a process that has not imported jax.
    """
    if command == "plan":
        environment[ENABLED] = "false"
    elif FOLDER not in environment:
        environment[FOLDER] = str(cache_folder() / "compiled")
        environment.setdefault(LIMIT, str(_BYTES))
