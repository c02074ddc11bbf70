#!/usr/bin/env bash
# Makes .venv, installs the package, and runs both training stages on real photographs that ship with the dependencies.
# Arguments go to `lwd quickstart`: bash launch/quickstart.sh --images ~/photos --workdir runs/mine
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup_venv.sh
setup_venv '.'
exec .venv/bin/lwd quickstart "$@"
