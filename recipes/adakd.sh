#!/usr/bin/env bash
# AdaKD (arXiv 2510.11615): the kept share follows the loss, and each token has a temperature by its difficulty.
# Qwen3-8B to Qwen3-4B by default, one node of 8 GPUs with 80 GB. Untested on GPUs.
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=... bash recipes/adakd.sh [overrides]      or PLAN_ONLY=1
set -euo pipefail
: "${MODEL_PATH:=Qwen/Qwen3-4B}" "${TEACHER_MODEL_PATH:=Qwen/Qwen3-8B}" "${ENABLE_THINKING:=false}"
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

distil method=adakd learner.num_workers=4 rollout.num_workers=2 teacher.num_workers=2 "$@"
