#!/usr/bin/env bash
# Makes .venv with the frozen packages of requirements/ and this repository. Does nothing where that is done already.
#   PYTHON            the interpreter to build it with (default python3; 3.11 or 3.12)
#   OPSD_DEVICE       gpu or cpu, where it is not what nvidia-smi shows (a container that is built without a GPU)
#   OPSD_TORCH_INDEX  an index with CPU builds of torch, for a machine whose pip finds only CUDA builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
device=${OPSD_DEVICE:-$device}
[[ $device == [cg]pu ]] || { echo "[setup] failed: OPSD_DEVICE must be gpu or cpu, got $device" >&2; exit 1; }
lists=(-r "requirements/$device.txt" -r requirements/dev.txt)
wanted="$device $PWD $(cat "requirements/$device.txt" requirements/dev.txt setup.py scripts/setup.sh | sha256sum)"
stamp=.venv/.finished
is_done() { [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; }
say() { echo "[setup] ${SECONDS} s: $*"; }
fail() { echo "[setup] failed: $*" >&2; exit 1; }

is_done && exit 0
mkdir -p .venv
exec 9>.venv/.lock
flock 9 # a second set-up of the same checkout waits here, then finds the work done
is_done && exit 0
rm -f "$stamp"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
    fail "Python 3.11 or 3.12 is needed, $python is $("$python" --version 2>&1); set PYTHON to another"
[[ -x .venv/bin/pip ]] || "$python" -m venv .venv || fail "no virtual environment (on Debian: apt install python3-venv)"
say "$("$python" --version) in .venv; installing the $device packages, a minute or two"

pip=(.venv/bin/pip install -qq --disable-pip-version-check --no-compile)
torch_index=(${OPSD_TORCH_INDEX:+--extra-index-url "$OPSD_TORCH_INDEX"})
if [[ $device == cpu ]]; then
    "${pip[@]}" --no-deps "${torch_index[@]}" "${lists[@]}" || fail "pip could not install requirements/cpu.txt"
    if grep -qs "^cuda.*= '" .venv/lib/python3*/site-packages/torch/version.py; then
        say "this torch is a CUDA build (large, but it works); for a small one delete .venv and set OPSD_TORCH_INDEX" \
            "to PyTorch's CPU index"
        "${pip[@]}" "$(grep '^torch==' requirements/cpu.txt)" || fail "pip could not install what the CUDA torch needs"
    fi
else
    "${pip[@]}" "${lists[@]}" || fail "pip could not install requirements/gpu.txt"
fi
say "packages installed"

"${pip[@]}" --no-deps --no-build-isolation -e . || fail "pip could not install this repository"
echo "$wanted" >"$stamp"
say "done"
