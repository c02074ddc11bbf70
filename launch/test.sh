#!/usr/bin/env bash
# Makes .venv, installs the package with its test extra, and runs the tests.
# Arguments go to pytest: bash launch/test.sh -k saliency
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
setup_venv "$PWD" test
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
unset PYTHONDONTWRITEBYTECODE # the tests start a hundred processes: each would compile the sources again
# One worker per core: most of a test is compiling, which is single-threaded.
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
