#!/usr/bin/env bash
# Makes the environment if needed, then lints, type-checks and tests everything, side by side in a process for each core
# (four at most: each may hold vLLM engines and a server). Arguments go to pytest instead, which then runs by itself:
#
#   ./scripts/test.sh
#   ./scripts/test.sh tests/engine -k compaction
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"

STAGES_OF="test"
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
# shellcheck source=scripts/stages.sh
. scripts/stages.sh

# check TEXT COMMAND...: shows what the command printed if it failed.
check() {
    : >"$LOG"
    stage "$@" || { [ "${REDVTP_VERBOSE:-0}" != 0 ] || cat "$LOG" >&2; exit 1; }
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "typos" typos
check "mypy$([ -d .mypy_cache ] || echo ' (the first run takes minutes)')" mypy
if [ $# = 0 ]; then set -- -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder; fi
say "pytest $*"
rm -f "$LOG"
exec pytest "$@"
