#!/usr/bin/env bash
# Qwen2.5-14B-Instruct teaches Qwen2.5-1.5B on DAPO-Math-17k with the settings of the TIP paper (arXiv 2604.14084): one
# node of 8 GPUs with 80 GB. Untested on GPUs; the same settings run on a CPU with tiny models.
#   PLAN_ONLY=1 bash recipes/qwen2_5_14b_to_1_5b.sh      what it needs; models and data need not be there
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=... ARM=entropy20 bash recipes/qwen2_5_14b_to_1_5b.sh [overrides]
# ARM: as in recipes/qwen3_8b_to_4b.sh.
set -euo pipefail
: "${MODEL_PATH:=Qwen/Qwen2.5-1.5B}" "${TEACHER_MODEL_PATH:=Qwen/Qwen2.5-14B-Instruct}" "${ARM:=soft_or50}"
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

distil learner.num_workers=2 rollout.num_workers=2 teacher.num_workers=4 "$@"
