#!/usr/bin/env bash
# OPSD (arXiv 2601.18734): the teacher is the untrained student itself, shown the reference solution. Qwen3-4B by
# default, one node of 8 GPUs with 80 GB. Untested on GPUs.
#   MODEL_PATH=... DATA_DIR=... [SOLUTION_KEY=solution] bash recipes/opsd_self_distill.sh [overrides]      or PLAN_ONLY=1
# SOLUTION_KEY: the field of a row of DATA_DIR's files that holds a worked solution.
set -euo pipefail
: "${MODEL_PATH:=Qwen/Qwen3-4B}" "${ENABLE_THINKING:=false}" "${SOLUTION_KEY:=solution}"
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[[ -z ${TEACHER_MODEL_PATH:-} ]] || fail "the teacher is the student: unset TEACHER_MODEL_PATH"
TEACHER_MODEL_PATH=$MODEL_PATH

distil method=opsd "data.solution_key=$SOLUTION_KEY" \
    'data.teacher_template="{prompt} Here is a correct solution: {solution} Now solve the problem in your own words."' \
    learner.num_workers=4 rollout.num_workers=2 teacher.num_workers=2 "$@"
