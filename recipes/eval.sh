#!/usr/bin/env bash
# Evaluates models: mean@k, pass@k, maj@k, truncation, length, latency, size. Tables on stdout, all else in the folder.
#   MODEL_PATH=/models/student DATA_DIR=data bash recipes/eval.sh [overrides]               or PLAN_ONLY=1
#   RUN_DIR=outputs/run EVAL_DATA=data/val_math500.parquet bash recipes/eval.sh [overrides]
# What to evaluate
#   MODEL_PATH  a Hugging Face folder, or a run's: then its student; MODEL_NAME (default: student) is its name in the tables
#   TEACHER_MODEL_PATH  another folder, named teacher       RUN_DIR  a run: its teacher, its student before and after
# With what
#   DATA_DIR   a folder of val_* files as scripts/prepare_data.py writes them        EVAL_DATA  files, one or a,b,c
#   VAL_N 16   VAL_TEMPERATURE 1.0   VAL_TOP_P 1.0   VAL_TOP_K -1 (all)   MAX_RESPONSE_LENGTH 8192   MAX_PROMPT_LENGTH 2048
#   REWARD_FUNCTION math_reward (last \boxed{}) | math_dapo (line "Answer:"); else any way of writing the answer counts
#   ENABLE_THINKING true | false, for chat templates that know it       DEVICE cuda (default) | cpu
#   DTYPE bfloat16   TP_SIZE 1   NUM_ENGINES 1   GPU_MEMORY_UTIL 0.9
#   OUTPUT_ROOT outputs   RUN_ID evaluation: the folder is OUTPUT_ROOT/RUN_ID
# Untested on GPUs.
set -euo pipefail
caller=$PWD
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# absolute PATH VARIABLE: the caller's file or folder; the variable is named where there is none.
absolute() { (cd "$caller" && realpath -e -- "$1" 2>/dev/null) || fail "$2=$1: there is no such file or folder"; }

models=()
if [[ -n ${RUN_DIR:-} ]]; then models+=("run='$(absolute "$RUN_DIR" RUN_DIR)'"); fi
if [[ -n ${TEACHER_MODEL_PATH:-} ]]; then models+=("+models.teacher='$TEACHER_MODEL_PATH'"); fi
if [[ -n ${MODEL_PATH:-} ]]; then models+=("+models.${MODEL_NAME:-student}='$MODEL_PATH'"); fi
if ((${#models[@]} == 0)); then
    only_looks || fail "set MODEL_PATH (and TEACHER_MODEL_PATH), or RUN_DIR"
    models=(+models.teacher=Qwen/Qwen3-8B +models.student=Qwen/Qwen3-4B)
fi

files=()
if [[ -n ${EVAL_DATA:-} ]]; then
    IFS=, read -ra files <<<"$EVAL_DATA"
elif [[ -n ${DATA_DIR:-} ]]; then
    for file in "$DATA_DIR"/val_*; do if [[ -f $file ]]; then files+=("$file"); fi; done
    ((${#files[@]})) || fail "DATA_DIR=$DATA_DIR has no val_*.parquet: make them with scripts/prepare_data.py"
else
    only_looks || fail "set DATA_DIR or EVAL_DATA"
fi
for place in "${!files[@]}"; do files[place]="'$(absolute "${files[place]}" EVAL_DATA)'"; done
paths=$(IFS=, && echo "${files[*]}")

case "${REWARD_FUNCTION:-}" in
    math_reward) grader=boxed ;;
    math_dapo) grader=answer_line ;;
    "") grader=math ;;
    *) fail "REWARD_FUNCTION must be math_reward or math_dapo, got $REWARD_FUNCTION" ;;
esac
top_k=${VAL_TOP_K:--1}

program=(-P -m opsd.evaluate)
start \
    output_dir="'${OUTPUT_ROOT:-outputs}/${RUN_ID:-evaluation}'" plan_only="${PLAN_ONLY:-0}" device="${DEVICE:-cuda}" \
    "${models[@]}" "data.paths=[$paths]" data.grader="$grader" \
    data.chat_template=true ${ENABLE_THINKING:+"+data.template_options.enable_thinking=${ENABLE_THINKING,,}"} \
    data.max_prompt_tokens="${MAX_PROMPT_LENGTH:-2048}" max_response_tokens="${MAX_RESPONSE_LENGTH:-8192}" \
    samples_per_problem="${VAL_N:-16}" temperature="${VAL_TEMPERATURE:-1.0}" top_p="${VAL_TOP_P:-1.0}" \
    top_k="$((top_k < 0 ? 0 : top_k))" \
    engine.dtype="${DTYPE:-bfloat16}" engine.tensor_parallel_size="${TP_SIZE:-1}" \
    engine.num_workers="${NUM_ENGINES:-1}" ${GPU_MEMORY_UTIL:+engine.gpu_memory_utilization="$GPU_MEMORY_UTIL"} \
    "$@"
