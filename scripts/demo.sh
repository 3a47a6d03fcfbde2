#!/usr/bin/env bash
# Makes the environment if needed, serves a small LLaDA-V checkpoint with vLLM and asks it about a photo. Options: --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/demo.py" "$@"
