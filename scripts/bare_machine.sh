#!/usr/bin/env bash
# Tries the README's commands on a bare Debian in a folder, as a newcomer would, and prints times and sizes.
#
#   scripts/bare_machine.sh bookworm|trixie root|user [COMMAND...]
#
# Needs root, debootstrap, git, network and 15 GB of disk. The commands (default: ./scripts/demo.sh, then ./scripts/test.sh
# tests/engine) run in a clean clone of HEAD. `user`: an ordinary user types the first one, gets one message, root installs
# what that names, and the user types it again.
#
# PIP_*, proxies and REDVTP_* of the caller are passed on, except what would add other sources of packages to PyPI. The file
# that PIP_CERT names is copied in.
# BARE_FOLDER=/path      the parent of the machine's folder (default: /var/tmp)
# BARE_PIP_CACHE=/path   pip's cache, kept between runs (default: a new one)
# BARE_KEEP=1            leaves the folder there
# DEBIAN_MIRROR=ADDRESS  (default: http://deb.debian.org/debian)
set -euo pipefail

# An own mount and process namespace: when it ends, however it ends, its mounts and processes are gone, and only then is
# the folder removed.
outside() {
    local machine status=0
    [ "$(id -u)" = 0 ] || { echo "bare_machine: must run as root" >&2; exit 2; }
    machine=$(mktemp -d "${BARE_FOLDER:-/var/tmp}/bare-$1-$2.XXXXXX")
    trap 'exit 130' INT TERM
    # An ordinary user must be able to enter it.
    chmod 755 "$machine"
    # shellcheck disable=SC2064  # the folder of now
    trap "leave '$machine'" EXIT
    BARE_INSIDE=$machine unshare --mount --propagation private --pid --fork --kill-child "$0" "$@" || status=$?
    exit $status
}

leave() {
    if [ -n "${BARE_KEEP:-}" ]; then echo "bare_machine: left in $1"; return; fi
    if grep -q -F " $1/" /proc/self/mountinfo; then
        echo "bare_machine: something is still mounted below $1, so it is not removed" >&2
        return
    fi
    rm -rf --one-file-system "$1"
}

say() { printf 'bare_machine: %s\n' "$*"; }

# timed NAME COMMAND...: a row of the table.
timed() {
    local name=$1 started=$SECONDS status=0
    shift
    say "$name"
    "$@" || status=$?
    table+="| \`$name\` | $((SECONDS - started)) s | $status |"$'\n'
    return $status
}

make_machine() {
    debootstrap --variant=minbase "$release" "$machine" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" | tail -n 1
    cp -L /etc/resolv.conf /etc/hosts "$machine/etc/"
    mount -t proc proc "$machine/proc"
    mount -t sysfs -o ro sysfs "$machine/sys"
    mount --rbind /dev "$machine/dev"
    if [ "$who" = user ]; then chroot "$machine" useradd --create-home --shell /bin/bash user; fi
    git clone --quiet --no-hardlinks "$repository" "$machine$clone"
    mkdir -p "$machine$home/.cache/pip"
    if [ -n "${BARE_PIP_CACHE:-}" ]; then
        mkdir -p "$BARE_PIP_CACHE"
        mount --bind "$BARE_PIP_CACHE" "$machine$home/.cache/pip"
    fi
    # Under a name of its own: Debian's ca-certificates writes the usual one.
    if [ -f "${PIP_CERT:-}" ]; then cp -L "$PIP_CERT" "$machine/etc/extra-ca.crt"; fi
    chroot "$machine" chown -R "$who:$who" "$home"
}

# Nothing of the caller's environment but what is named here.
inside_as() {
    local user=$1 variable variables=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb)
    variables+=("HOME=$(chroot "$machine" sh -c "echo ~$user")" "USER=$user")
    for variable in $(compgen -e); do
        case $variable in
            PIP_CERT) if [ -f "$PIP_CERT" ]; then variables+=(PIP_CERT=/etc/extra-ca.crt); fi ;;
            PIP_FIND_LINKS | PIP_EXTRA_INDEX_URL | PIP_CONSTRAINT | PIP_CONFIG_FILE | PIP_CACHE_DIR) ;;
            PIP_* | REDVTP_* | *_proxy | *_PROXY) variables+=("$variable=${!variable}") ;;
        esac
    done
    chroot --userspec="$user:$user" "$machine" /usr/bin/env -i "${variables[@]}" /bin/sh -c "cd $clone && $2" </dev/null
}

# What the message for an ordinary user says to run, without the sudo that a bare machine lacks.
do_what_the_message_says() {
    local line
    line=$(grep -o 'sudo apt-get update.*' "$1" | sed 's/sudo //g')
    [ -n "$line" ] || { say "there was no message that names packages"; return 1; }
    say "as root: $line"
    inside_as root "yes | DEBIAN_FRONTEND=noninteractive sh -c '$line'" >/dev/null
}

# MB that pip says in setup.log it has downloaded. Its cache tells less: some mirrors forbid it.
pip_fetched() {
    sed -n 's/^ *Downloading .*(\([0-9.]*\) \([kMG]\{0,1\}B\).*/\1 \2/p' "$machine$clone/setup.log" 2>/dev/null \
        | awk '{ sum += $1 * ($2 == "GB" ? 1000 : $2 == "MB" ? 1 : $2 == "kB" ? 0.001 : 0) } END { printf "%.0f", sum }'
}

apt_fetched() { du -s --block-size=MB "$machine/var/cache/apt/archives" | cut -f1 | tr -d MB; }

inside() {
    release=$1 who=$2
    shift 2
    [ $# -gt 0 ] || set -- ./scripts/demo.sh "./scripts/test.sh tests/engine"
    machine=$BARE_INSIDE home=/root table=
    [ "$who" = root ] || home=/home/user
    clone=$home/vllm-redvtp
    repository=$(cd "$(dirname "$0")/.." && pwd)
    say "$release, $who, $(nproc) processors, load $(cut -d' ' -f1-3 /proc/loadavg)"
    make_machine
    local before status=0 command message=$machine/message.txt
    before=$(apt_fetched)
    if [ "$who" = user ]; then
        timed "$1" inside_as user "$1" >"$message" 2>&1 || true
        cat "$message"
        timed "apt-get, as the message says" do_what_the_message_says "$message"
    fi
    for command in "$@"; do
        timed "$command" inside_as "$who" "$command" 2>&1 || { status=1; break; }
    done
    printf '\n| step | time | exit status |\n|---|---:|---:|\n%s\n' "$table"
    say "downloaded: $(pip_fetched) MB by pip, $(($(apt_fetched) - before)) MB by apt-get"
    say "on disk: .venv $(du -s --block-size=MB "$machine$clone/.venv" | cut -f1)," \
        "pip's cache $(du -s --block-size=MB "$machine$home/.cache/pip" | cut -f1)"
    say "load $(cut -d' ' -f1-3 /proc/loadavg)"
    return $status
}

case ${1:-} in bookworm | trixie) ;; *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
case ${2:-} in root | user) ;; *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
if [ -n "${BARE_INSIDE:-}" ]; then inside "$@"; else outside "$@"; fi
