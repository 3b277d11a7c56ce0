#!/usr/bin/env bash
# Evaluates models: mean@k, pass@k, maj@k, truncation, length, latency, size. Tables on stdout, all else in the folder.
#   MODEL_PATH=/models/student DATA_DIR=data bash recipes/eval.sh [overrides]
#   RUN_DIR=outputs/run EVAL_DATA=data/val_math500.parquet bash recipes/eval.sh [overrides]
# What to evaluate, at least one of
#   MODEL_PATH  a Hugging Face folder, or a run's: then its student; MODEL_NAME (default: student) is its name in the tables
#   TEACHER_MODEL_PATH  another folder, named teacher       RUN_DIR  a run: its teacher, its student before and after
# With what
#   DATA_DIR   a folder of val_*.parquet as scripts/prepare_data.py writes them      EVAL_DATA  files, one or a,b,c
#   VAL_N 16   VAL_TEMPERATURE 1.0   VAL_TOP_P 1.0   VAL_TOP_K -1 (all)   MAX_RESPONSE_LENGTH 8192   MAX_PROMPT_LENGTH 2048
#   REWARD_FUNCTION math_reward (last \boxed{}) | math_dapo (line "Answer:"); else any way of writing the answer counts
#   ENABLE_THINKING true | false, for chat templates that know it
#   DTYPE bfloat16   TP_SIZE 1   NUM_ENGINES 1   GPU_MEMORY_UTIL 0.7   PLAN_ONLY=1: load nothing
#   OUTPUT_ROOT outputs   RUN_ID: the folder is OUTPUT_ROOT/evaluation-RUN_ID, or OUTPUT_ROOT/evaluation without it
set -euo pipefail
fail() { echo "eval.sh: $*" >&2; exit 1; }
absolute() { realpath -e -- "$1" 2>/dev/null || fail "$2=$1: there is no such file or folder"; }

models=()
[[ -z ${RUN_DIR:-} ]] || models+=("run='$(absolute "$RUN_DIR" RUN_DIR)'")
[[ -z ${TEACHER_MODEL_PATH:-} ]] || models+=("+models.teacher='$(absolute "$TEACHER_MODEL_PATH" TEACHER_MODEL_PATH)'")
[[ -z ${MODEL_PATH:-} ]] || models+=("+models.${MODEL_NAME:-student}='$(absolute "$MODEL_PATH" MODEL_PATH)'")
((${#models[@]})) || fail "set MODEL_PATH (and TEACHER_MODEL_PATH), or RUN_DIR"

files=()
if [[ -n ${EVAL_DATA:-} ]]; then
    IFS=, read -ra files <<<"$EVAL_DATA"
elif [[ -n ${DATA_DIR:-} ]]; then
    for file in "$DATA_DIR"/val_*; do [[ ! -f $file ]] || files+=("$file"); done
    ((${#files[@]})) || fail "DATA_DIR=$DATA_DIR has no val_*.parquet: make them with scripts/prepare_data.py"
else
    fail "set DATA_DIR or EVAL_DATA"
fi
for place in "${!files[@]}"; do files[place]="'$(absolute "${files[place]}" EVAL_DATA)'"; done
paths=$(IFS=,; echo "${files[*]}")

case "${REWARD_FUNCTION:-}" in
    math_reward) grader=boxed ;;
    math_dapo) grader=answer_line ;;
    "") grader=math ;;
    *) fail "REWARD_FUNCTION must be math_reward or math_dapo, got $REWARD_FUNCTION" ;;
esac
top_k=${VAL_TOP_K:--1}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

exec .venv/bin/python -m opsd.evaluate \
    output_dir="${OUTPUT_ROOT:-outputs}/evaluation${RUN_ID:+-$RUN_ID}" plan_only="${PLAN_ONLY:-0}" \
    "${models[@]}" "data.paths=[$paths]" data.grader="$grader" \
    data.chat_template=true ${ENABLE_THINKING:+"+data.template_options.enable_thinking=$ENABLE_THINKING"} \
    data.max_prompt_tokens="${MAX_PROMPT_LENGTH:-2048}" max_response_tokens="${MAX_RESPONSE_LENGTH:-8192}" \
    samples_per_problem="${VAL_N:-16}" temperature="${VAL_TEMPERATURE:-1.0}" top_p="${VAL_TOP_P:-1.0}" \
    top_k="$((top_k < 0 ? 0 : top_k))" \
    engine.dtype="${DTYPE:-bfloat16}" engine.tensor_parallel_size="${TP_SIZE:-1}" \
    engine.num_workers="${NUM_ENGINES:-1}" engine.gpu_memory_utilization="${GPU_MEMORY_UTIL:-0.7}" \
    "$@"
