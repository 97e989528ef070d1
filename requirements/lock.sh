#!/usr/bin/env bash
# Resolves pyproject.toml into requirements/cpu.txt and requirements/gpu.txt.
#
#     make lock                              keeps the pinned versions that still fit
#     make lock ARGS=--upgrade               takes the newest of everything
#     make lock ARGS="--upgrade-package ray" takes the newest of one package
#
# uv resolves, in a throw-away environment, from the places pip is configured to look in; the CPU
# wheel of torch also from PyTorch's index. Neither is written into the locks.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PYTORCH_CPU_INDEX=${PYTORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# pip's setting of that name: environment first, then its configuration files.
setting() {
    for scope in :env: install global; do
        "$work/uv/bin/python" -m pip config get "$scope.$1" 2>/dev/null && return
    done
    true
}

resolve() { # <cpu|gpu> [uv options]
    local kind=$1
    shift
    "$work/uv/bin/uv" pip compile pyproject.toml --extra "$kind" --extra test --extra bench \
        --extra trackers --extra docs --extra eval --override requirements/overrides.txt --python-version 3.11 \
        --index-strategy unsafe-best-match --no-header --no-annotate --quiet --output-file "$work/$kind.txt" "${places[@]}" "$@"
}

write() { # <cpu|gpu> <for which machines>
    {
        echo "# Everything bar_ray needs on $2, resolved for Python 3.11 on Linux x86-64."
        echo "# Made by \`make lock\` from pyproject.toml; do not edit. requirements/install.sh installs it, without"
        echo "# dependency resolution, because requirements/overrides.txt leaves out what vllm asks for in vain."
        # Exactly this torch: \`==\` would also take a CPU wheel (2.13.0+cpu) that pip finds first.
        if [[ $1 == gpu ]]; then sed 's/^torch==/torch===/' "$work/$1.txt"; else cat "$work/$1.txt"; fi
    } >"$work/$1.lock"
    mv "$work/$1.lock" "requirements/$1.txt"
    echo "lock: requirements/$1.txt, $(grep -c == "requirements/$1.txt") packages"
}

"$PYTHON" -m venv "$work/uv"
"$work/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv

places=()
for name in index-url extra-index-url find-links; do
    for place in $(setting "$name"); do places+=("--$name" "$place"); done
done
for kind in cpu gpu; do
    [[ -f requirements/$kind.txt ]] && cp "requirements/$kind.txt" "$work/$kind.txt"
done

resolve gpu "$@"
if ! resolve cpu "$@" 2>"$work/why"; then
    echo "lock: pip's own places did not do for the CPU build; trying $PYTORCH_CPU_INDEX as well"
    resolve cpu --extra-index-url "$PYTORCH_CPU_INDEX" "$@" || { cat "$work/why" >&2; exit 1; }
fi
write cpu "a machine without a GPU"
write gpu "a machine with NVIDIA GPUs"
