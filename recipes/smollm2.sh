#!/usr/bin/env bash
# A real small model on a CPU: SmolLM2-135M-Instruct teaches a copy of itself that lost a third of its layers.
#   GSM8K_DIR=/path/to/gsm8k bash recipes/smollm2.sh [overrides]
#   ... bash recipes/smollm2.sh student.lora.rank=16 learner.learning_rate=2e-3     # trains an adapter alone
# GSM8K_DIR holds train.jsonl and test.jsonl with a field "question" a line; any other prompts of that form will do.
set -euo pipefail
# shellcheck source=recipes/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! only_looks; then
    : "${GSM8K_DIR:?set it to a folder with train.jsonl and test.jsonl that have a field \"question\" a line}"
    for split in train test; do [[ -f $GSM8K_DIR/$split.jsonl ]] || fail "$GSM8K_DIR has no $split.jsonl"; done
fi
GSM8K_DIR=${GSM8K_DIR:-GSM8K_DIR}

dtype=float32 # a processor that multiplies no bfloat16, as many with AVX-512, takes four to seven times as long in it
if grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi # the others, half as long

pair=outputs/smollm2-pair
make_pair smollm2 "$pair"

start \
    output_dir=outputs/smollm2 overwrite=true num_steps=24 \
    student.path="$pair/student" learner.learning_rate=2e-4 learner.micro_batch_tokens=512 learner.cpu_threads=2 \
    teacher.path="$pair/teacher" teacher.top_k=64 teacher.dtype="$dtype" teacher.cpu_threads=2 \
    data.train_path="$GSM8K_DIR/train.jsonl" data.eval_path="$GSM8K_DIR/test.jsonl" \
    data.prompt_key=question data.chat_template=true data.max_prompt_tokens=512 data.prompts_per_step=16 \
    rollout.max_response_tokens=48 rollout.dtype="$dtype" rollout.cpu_threads=2 \
    eval.every=8 eval.num_kl_prompts=64 log.token_view_every=8 \
    "$@"
