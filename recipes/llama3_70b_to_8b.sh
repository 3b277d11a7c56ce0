#!/usr/bin/env bash
# Llama-3.3-70B-Instruct teaches Llama-3.1-8B-Instruct on DAPO-Math-17k with the settings of the TIP paper (arXiv
# 2604.14084): two nodes of 8 GPUs with 80 GB. Untested on GPUs; the same settings run on a CPU with tiny models.
#   PLAN_ONLY=1 bash recipes/llama3_70b_to_8b.sh      what it needs; models and data need not be there
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=... ARM=entropy20 bash recipes/llama3_70b_to_8b.sh [overrides]
# ARM: as in recipes/qwen3_8b_to_4b.sh.
set -euo pipefail
: "${MODEL_PATH:=meta-llama/Llama-3.1-8B-Instruct}" "${TEACHER_MODEL_PATH:=meta-llama/Llama-3.3-70B-Instruct}"
: "${ARM:=soft_or50}" "${LEARNING_RATE:=3e-7}" "${NNODES:=2}"
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

distil learner.num_workers=8 rollout.num_workers=4 teacher.tensor_parallel_size=4 "$@"
