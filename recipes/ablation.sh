#!/usr/bin/env bash
# Which tokens, with what weight and which loss: arms x seeds of one task on CPU cores, each run in one process.
# Go on where it was stopped: bash recipes/ablation.sh. One arm and seed: bash recipes/ablation.sh --arms soft_or@0.2
# --seeds 3. Results: OUT (outputs/ablation/results unless set), raw/TASK.jsonl, RESULTS.md and figures.
set -euo pipefail
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if ((helps)); then exec "$python" -P -m scripts.ablation --help; fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # a core per process, and no model hub
exec "$python" -P -m scripts.ablation "${OUT:-outputs/ablation/results}" "$@"
