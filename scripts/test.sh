#!/usr/bin/env bash
# Makes the environment if needed, then lints, type-checks and tests everything. Arguments go to pytest:
#
#   ./scripts/test.sh
#   ./scripts/test.sh tests/engine -k compaction
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
exec pytest "$@"
