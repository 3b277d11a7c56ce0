#!/usr/bin/env bash
# Is this checkout right and fast on this box's GPU? At most 8 minutes, nothing installed: torch >= 2.11 with CUDA and
# transformers are enough; vLLM and Ray are checked where they are there.
#   bash scripts/gpu_check.sh [--device cuda|cpu] [--out DIR] [--seconds S] [--only TEXT]
# DIR (recipes/results by default; outputs/gpu_check on the CPU) gets gpu.json and gpu.md. PYTHON: the interpreter, else python3 or python on the PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH=$root:$root/scripts/bench${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # models of several sizes, one after another
exec "$python" "$root/scripts/bench/gpu_check.py" "$@"
