#!/usr/bin/env bash
# Qwen3-14B teaches Qwen3-1.7B to plan journeys with nine look-ups (DeepPlanning, travel), with the settings of the TIP
# paper (arXiv 2604.14084): one node of 8 GPUs with 80 GB. Untested on GPUs. Data and score: docs/deepplanning.md.
#   PLAN_ONLY=1 bash recipes/deepplanning.sh      what it needs; models and data need not be there
#   python scripts/prepare_data.py data/travel --train deepplanning=FOLDER        the public folder, split 80/20
#   MODEL_PATH=... TEACHER_MODEL_PATH=... DATA_DIR=data/travel ARM=q3_20 bash recipes/deepplanning.sh [overrides]
# The paper's arms: all entropy50 q3_20 soft_or50. Its other teacher: TEACHER_MODEL_PATH=Qwen/Qwen3-32B, the same GPUs.
# MAX_RESPONSE_LENGTH is of a whole trajectory, the tools' answers included. Every TEST_FREQ steps it prints the mean score
# of one greedy plan per held-out task; docs/deepplanning.md has the command for Avg@16. Of this recipe also:
#   MAX_ASSISTANT_TURNS 50   MAX_TOOL_RESPONSE_LENGTH 4096 characters, of whole rows
#   AGENT_NUM_WORKERS 4 processes of each rollout engine, in which the look-ups run
set -euo pipefail
: "${MODEL_PATH:=Qwen/Qwen3-1.7B}" "${TEACHER_MODEL_PATH:=Qwen/Qwen3-14B}" "${ARM:=q3_20}" "${ENABLE_THINKING:=false}"
: "${MAX_PROMPT_LENGTH:=8192}" "${MAX_RESPONSE_LENGTH:=24576}" "${TOTAL_EPOCHS:=15}" "${TEST_FREQ:=20}"
tools=(
    tools.build=opsd.data.deepplanning.tools:build_tools
    "++tools.options.max_answer_chars=${MAX_TOOL_RESPONSE_LENGTH:-4096}"
    "tools.max_answer_chars=${MAX_TOOL_RESPONSE_LENGTH:-4096}" "tools.max_turns=${MAX_ASSISTANT_TURNS:-50}"
    "tools.processes=${AGENT_NUM_WORKERS:-4}"
)
unset MAX_TOOL_RESPONSE_LENGTH MAX_ASSISTANT_TURNS AGENT_NUM_WORKERS # which other recipes say that they do not follow
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

distil data.grader=deepplanning eval.teacher=false "${tools[@]}" learner.num_workers=4 learner.micro_batch_tokens=32768 \
    rollout.num_workers=2 teacher.tensor_parallel_size=2 "$@"
