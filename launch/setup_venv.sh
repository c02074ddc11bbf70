# shellcheck shell=bash
# Sourced by the launchers: setup_venv ROOT [EXTRA] makes ROOT/.venv if it is missing and installs that checkout in it,
# with an extra of setup.py or without, in the versions of the file PIP_CONSTRAINT, if it is set. PYTHON names the
# interpreter to use (3.11 or newer).
setup_venv() {
  local root="$1" extra="${2:-}"
  local python="${PYTHON:-python3}" venv="$root/.venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lwd_jax needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
    exit 2
  }
  if [[ ! -x "$venv/bin/python" ]]; then
    "$python" -m venv "$venv"
  fi
  # setup.py and the constraints alone decide what is installed: skip the step while they are unchanged. Each extra has
  # a stamp of its own, so that launchers can take turns.
  local stamp file="$venv/installed${extra:+-$extra}"
  stamp="$("$venv/bin/python" --version) $(cksum <"$root/setup.py")${PIP_CONSTRAINT:+ $(cksum <"$PIP_CONSTRAINT")}"
  if [[ "$(cat "$file" 2>/dev/null)" != "$stamp" ]]; then
    echo "Installing lwd_jax${extra:+[$extra]} into $venv (once; a few minutes) ..."
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --editable ".${extra:+[$extra]}")
    echo "$stamp" >"$file"
  fi
}
