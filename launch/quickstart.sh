#!/usr/bin/env bash
# Makes .venv, installs the package, and runs both training stages on real photographs that ship with the dependencies.
# Arguments go to `lwd quickstart`: bash launch/quickstart.sh --images ~/photos --workdir runs/mine
# Relative paths among them are those of the folder it is called from.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/setup_venv.sh
source "$root/launch/setup_venv.sh"
setup_venv "$root"
printf 'lwd is installed in %s. To type the commands below yourself, first: source %q\n' \
  "$root/.venv" "$root/.venv/bin/activate"
exec "$root/.venv/bin/lwd" quickstart "$@"
