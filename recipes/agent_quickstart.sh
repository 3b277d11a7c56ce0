#!/usr/bin/env bash
# A student that learns to use a tool on a CPU: set-up, a tiny pair that looks values up and adds them, 200 steps on whole
# trajectories, a report. Arguments override any setting: bash recipes/agent_quickstart.sh selector.ratio=0.2
set -euo pipefail
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

pair=outputs/agent-pair
make_pair lookups "$pair"

start \
    output_dir=outputs/agent_quickstart overwrite=true num_steps=200 \
    tools.build=opsd.agents.lookups:build_tools tools.max_turns=6 \
    student.path="$pair/student" \
    teacher.path="$pair/teacher" teacher.top_k=8 \
    data.train_path="$pair/train.jsonl" data.eval_path="$pair/eval.jsonl" data.grader=final_hash \
    data.max_prompt_tokens=24 data.prompts_per_step=64 \
    rollout.max_response_tokens=96 rollout.num_candidates=8 \
    learner.learning_rate=1e-3 learner.warmup_steps=10 learner.micro_batch_tokens=4096 \
    "$@"
