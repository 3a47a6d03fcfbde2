#!/usr/bin/env bash
# Makes the environment if needed, serves a small LLaDA-V checkpoint with vLLM and asks it about a photo. Options: --help.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"
