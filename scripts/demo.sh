#!/usr/bin/env bash
# Makes the environment if needed, serves a model with vLLM and asks it about pictures. Options: --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/demo.py" "$@"
