#!/usr/bin/env bash
# Makes .venv with the frozen packages of requirements/ and this repository. Does nothing where that is done already.
#   PYTHON            the interpreter to build it with (default python3; 3.11 or 3.12)
#   OPSD_DEVICE       gpu or cpu, where it is not what nvidia-smi shows (a container that is built without a GPU)
#   DRY_RUN=1         only resolve the packages (those of gpu for Python 3.12 on Linux); nothing is installed or made
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

least_driver=580
# Before gigabytes of wheels that would not run. In the build of a container there is no nvidia-smi.
check_driver() {
    local driver
    if ! command -v nvidia-smi >/dev/null; then
        say "no nvidia-smi here: the machine that runs this needs NVIDIA driver $least_driver or newer"
        return
    fi
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
    [[ $driver =~ ^[0-9]+ ]] || fail "nvidia-smi names no driver version: is the NVIDIA driver loaded?"
    ((BASH_REMATCH[0] >= least_driver)) || fail "the NVIDIA driver is $driver, the CUDA 13 packages need $least_driver or" \
        "newer: update the driver, or set OPSD_DEVICE=cpu"
}
# What pip would install. Of a wheel its metadata is read, where the index lets pip read a part of a file.
dry_run() {
    local for_machine=() number version
    version=$("$python" -m pip --version | cut -d " " -f 2)
    ((${version%%.*} >= 25)) || fail "a dry run needs pip 25 or newer, as an older one downloads every package whole;" \
        "$python has pip $version"
    if [[ $device == gpu ]]; then
        for_machine=(--python-version 3.12 --implementation cp --target "${TMPDIR:-/tmp}/opsd-dry-run")
        # pip takes a platform's number for exact.
        for number in {5..35}; do for_machine+=(--platform "manylinux_2_${number}_x86_64"); done
        for_machine+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    fi
    "$python" -m pip install --dry-run --no-deps --ignore-installed --use-feature=fast-deps --disable-pip-version-check \
        -q "${for_machine[@]}" "${torch_index[@]}" "${lists[@]}" || fail "pip does not find all of requirements/$device.txt"
    say "every package of requirements/$device.txt and dev.txt is there"
}

check_python() {
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
        fail "Python 3.11 or 3.12 is needed, $python is $("$python" --version 2>&1); set PYTHON to another"
}

python=${PYTHON:-python3}
torch_index=(${OPSD_TORCH_INDEX:+--extra-index-url "$OPSD_TORCH_INDEX"})
if [[ ${DRY_RUN:-0} != 0 ]]; then
    check_python
    dry_run
    exit 0
fi
is_done && exit 0
check_python
if [[ $device == gpu ]]; then check_driver; fi
mkdir -p .venv
exec 9>.venv/.lock
flock 9 # a second set-up of the same checkout waits here, then finds the work done
is_done && exit 0
rm -f "$stamp"

[[ -x .venv/bin/pip ]] || "$python" -m venv .venv || fail "no virtual environment (on Debian: apt install python3-venv)"
say "$("$python" --version) in .venv; installing the $device packages, a minute or two"

pip=(.venv/bin/pip install -qq --disable-pip-version-check --no-compile)
"${pip[@]}" --no-deps "${torch_index[@]}" "${lists[@]}" || fail "pip could not install requirements/$device.txt"
if [[ $device == cpu ]]; then
    if grep -qs "^cuda.*= '" .venv/lib/python3*/site-packages/torch/version.py; then
        say "this torch is a CUDA build (large, but it works); for a small one delete .venv and set OPSD_TORCH_INDEX" \
            "to PyTorch's CPU index"
        "${pip[@]}" "$(grep '^torch==' requirements/cpu.txt)" || fail "pip could not install what the CUDA torch needs"
    fi
fi
say "packages installed"

"${pip[@]}" --no-deps --no-build-isolation -e . || fail "pip could not install this repository"
echo "$wanted" >"$stamp"
say "done"
