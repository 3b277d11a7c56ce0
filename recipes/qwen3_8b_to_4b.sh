#!/usr/bin/env bash
# Qwen3-8B teaches Qwen3-4B on DAPO-Math-17k with the settings of the TIP paper (arXiv 2604.14084): one node of 8 GPUs
# with 80 GB. Untested on GPUs; the same settings run on a CPU with tiny models.
#   PLAN_ONLY=1 bash recipes/qwen3_8b_to_4b.sh      what it needs; models and data need not be there
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=... ARM=entropy20 bash recipes/qwen3_8b_to_4b.sh [overrides]
# The paper's arms: all entropy50 entropy20 entropy10 soft_or50 soft_or20 q3_20 q3_10 divergence50 divergence10 bottom50;
# random50 is the baseline that it lacks. Its figures are means of 16 answers at temperature 1: recipes/eval.sh.
set -euo pipefail
: "${MODEL_PATH:=Qwen/Qwen3-4B}" "${TEACHER_MODEL_PATH:=Qwen/Qwen3-8B}" "${ARM:=soft_or50}" "${ENABLE_THINKING:=false}"
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

distil learner.num_workers=4 rollout.num_workers=2 teacher.num_workers=2 "$@"
