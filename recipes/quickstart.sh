#!/usr/bin/env bash
# From a clean checkout to a trained student on a CPU: set-up, a tiny pair that adds digits, 400 steps, a report.
# Arguments override any setting, for example: bash recipes/quickstart.sh selector.ratio=0.2 output_dir=outputs/fifth
set -euo pipefail
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

pair=outputs/quickstart-pair teacher=outputs/quickstart-pair/teacher options=()
# shellcheck disable=SC2016  # the settings expand ${student.path}, not the shell
case " $* " in
    *" method=opsd"*) # self-distillation: no other teacher, and a student that can use a solution that it is shown
        pair=outputs/opsd-pair teacher="\${student.path}" options=(--copies) ;;
esac
make_pair sums "$pair" "${options[@]}"

start \
    output_dir=outputs/quickstart overwrite=true num_steps=400 \
    student.path="$pair/student" \
    teacher.path="$teacher" teacher.top_k=8 \
    data.train_path="$pair/train.jsonl" data.eval_path="$pair/eval.jsonl" data.grader=final_hash \
    data.max_prompt_tokens=72 data.prompts_per_step=64 \
    rollout.max_response_tokens=48 rollout.num_candidates=8 \
    learner.learning_rate=2e-3 learner.warmup_steps=10 learner.micro_batch_tokens=4096 \
    "$@"
