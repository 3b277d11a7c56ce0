#!/usr/bin/env bash
# Every check of this repository, from a clean checkout: set-up, lint, types, tests. Arguments go to pytest.
#   TEST_PROCESSES   test files at one time (default 2, of 1 core and up to 5 GB each); 0: one, in this process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

unset PYTHONDONTWRITEBYTECODE # a fresh .venv has nothing compiled: every process would compile all it imports
export OMP_NUM_THREADS=1 # tiny models run slower on more
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=offline
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind
.venv/bin/ruff check .
.venv/bin/ruff format --check opsd tip tests scripts setup.py # not the Markdown's code
# Types beside the tests, which keep no core busy while they start; what is wrong is said after them.
complaints=$(mktemp)
trap 'rm -f "$complaints"' EXIT
.venv/bin/mypy >"$complaints" 2>&1 &
types=$!
failed=0
# Whole files, as their fixtures (trained pairs, engines) are made once; in their order, as the long ones come first.
.venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@" || failed=$?
wait "$types" || failed=1
cat "$complaints"
exit "$failed"
