#!/usr/bin/env bash
# ToDi (arXiv 2505.16297): forward or reverse KL for each token, by which of the two models finds it likelier.
# Qwen3-8B to Qwen3-4B by default, one node of 8 GPUs with 80 GB. Untested on GPUs.
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=... bash recipes/todi.sh [overrides]      or PLAN_ONLY=1
set -euo pipefail
: "${MODEL_PATH:=Qwen/Qwen3-4B}" "${TEACHER_MODEL_PATH:=Qwen/Qwen3-8B}" "${ENABLE_THINKING:=false}"
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

distil method=todi learner.num_workers=4 rollout.num_workers=2 teacher.num_workers=2 "$@"
