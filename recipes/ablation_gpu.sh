#!/usr/bin/env bash
# Which rule helps on a pair of the paper: the arms of recipes/ablation.sh, each a run of a cluster's recipe, then its
# evaluation, then the same tables. Untested on GPUs.
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=... bash recipes/ablation_gpu.sh --arms all 'random@*' 'soft_or@*'
#   bash recipes/ablation_gpu.sh --dry-run      prints the commands          PLAN_ONLY=1: what each run needs
# --recipe NAME, --seeds 0 1 2, and last of all --settings SETTING=VALUE ... for every run. The variables of the recipe
# and of recipes/eval.sh hold. What OUT (outputs/ablation_gpu) has already is not made again.
set -euo pipefail
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if ((helps)); then exec "$python" -P -m scripts.ablation.with_recipe --help; fi
exec "$python" -P -m scripts.ablation.with_recipe "${OUT:-outputs/ablation_gpu}" "$@"
