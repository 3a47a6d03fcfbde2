# Sourced by setup.sh and test.sh: a line on stderr for each stage, with the seconds it took.
#
# LOG names the file that gets what the commands print. REDVTP_VERBOSE=1 shows that instead, and writes no file.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$STAGES_OF" "$*" >&2; }
die() { printf "$STAGES_OF: %s\n" "$@" >&2; exit 1; }

seconds() { if [ "$1" -lt 100 ]; then echo "$1 s"; else echo "$(($1 / 60)) min $(($1 % 60)) s"; fi; }

# stage TEXT COMMAND...: runs the command, says how long it took, and returns its status. STAGE_FAILED is the word where that is
# not 0.
stage() {
    local text=$1 started=$SECONDS status=0 ticker=
    shift
    if [ "${REDVTP_VERBOSE:-0}" != 0 ]; then
        say "$text"
        "$@" </dev/null >&2 || status=$?
        printf '%s: %s: ' "$STAGES_OF" "$text" >&2
    else
        printf '%s: %s: ' "$STAGES_OF" "$text" >&2
        if [ -t 2 ]; then tick "$text" & ticker=$!; fi
        printf '\n$ %s\n' "$*" >>"$LOG"
        "$@" </dev/null >>"$LOG" 2>&1 || status=$?
        if [ -n "$ticker" ]; then
            kill "$ticker" 2>/dev/null || true
            wait "$ticker" 2>/dev/null || true
            printf '\r%s: %s: ' "$STAGES_OF" "$text" >&2
        fi
    fi
    if [ "$status" = 0 ]; then seconds $((SECONDS - started)) >&2
    else echo "${STAGE_FAILED:-failed} after $(seconds $((SECONDS - started)))" >&2
    fi
    return "$status"
}

# The counter on a terminal's line. It ends with the script, however that ends.
tick() {
    local started=$SECONDS
    while sleep 1 && kill -0 $$ 2>/dev/null; do
        printf '\r%s: %s: %s ' "$STAGES_OF" "$1" "$(seconds $((SECONDS - started)))" >&2
    done
}

# The end of the log, for a stage that failed. It was shown already where REDVTP_VERBOSE is set.
show_log() {
    [ "${REDVTP_VERBOSE:-0}" = 0 ] || return 0
    tail -n "${1:-20}" "$LOG" | sed 's/^/    /' >&2
    say "all of it is in $LOG"
}
