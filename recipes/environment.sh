# shellcheck shell=bash
# What the recipes share; sourced by each. Environment variables of the upstream repository become settings here.
#   PLAN_ONLY=1        print what the run would need and be refused for; load nothing
#   MEASURE_MEMORY=1   run, then print the plan beside each process's peak of memory
#   OPSD_PYTHON        an interpreter with everything installed; without it scripts/setup.sh makes .venv
# Of a recipe that trains on DATA_DIR:
#   MODEL_PATH TEACHER_MODEL_PATH DATA_DIR   folders; DATA_DIR holds train and test (or val_NAME), .parquet or .jsonl
#   OUTPUT_ROOT RUN_ID                       the run's folder is OUTPUT_ROOT/RUN_ID
#   TRAIN_BATCH_SIZE ROLLOUT_N               prompts per step, answers per prompt
#   MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH TEMPERATURE TOP_P ENABLE_THINKING
#   LEARNING_RATE TOTAL_EPOCHS TOTAL_TRAINING_STEPS (in place of epochs) SAVE_FREQ TEST_FREQ
#   OPD_LOSS_TYPE OPD_REWARD_BETA TP_SIZE GPU_MEMORY_UTIL
#   ARM                                      tokens to train on: all, or a score and a per cent, such as entropy20
#   NNODES N_GPUS_PER_NODE GPU_GIB           the machines that PLAN_ONLY=1 plans for
#   DEVICE                                   cuda (default) or cpu
recipe=$(basename "$0")
fail() {
    echo "$recipe: $*" >&2
    exit 1
}
is_on() { [[ ${!1:-0} != 0 ]]; }

# A recipe runs in the caller's folder: settings mean the caller's paths, and outputs/ is made there.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
for name in MODEL_PATH TEACHER_MODEL_PATH DATA_DIR GSM8K_DIR; do
    if [[ -n ${!name:-} && -d ${!name} ]]; then printf -v "$name" %s "$(cd "${!name}" && pwd)"; fi
done
if [[ -n ${OUTPUT_ROOT:-} && $OUTPUT_ROOT != /* ]]; then OUTPUT_ROOT=$PWD/$OUTPUT_ROOT; fi

# --help, --cfg job and their like only look: nothing is installed, made or started, and nothing need be there.
looks=0 helps=0
for argument in "$@"; do
    case $argument in
        --help | -h) looks=1 helps=1 ;;
        --cfg | --cfg=* | -c | --info | --info=* | -i | --hydra-help | --version) looks=1 ;;
    esac
done
only_looks() { is_on PLAN_ONLY || ((looks)); }

unset PYTHONDONTWRITEBYTECODE # a fresh .venv has nothing compiled: every process would compile all it imports
python=${OPSD_PYTHON:-$root/.venv/bin/python}
if ((helps)); then
    echo "bash recipes/$recipe [SETTING=VALUE ...]"
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$root/recipes/$recipe"
    echo
    sed -n '3,/^[^#]/s/^# \{0,1\}//p' "$root/recipes/environment.sh"
    echo
    echo "Every setting with its values and its meaning: docs/settings.md"
fi
if ((looks)) && [[ ! -x $python ]] && ! command -v "$python" >/dev/null; then
    ((helps)) || fail "the packages are not installed yet, and this command installs none: run scripts/setup.sh"
    exit 0
fi
((looks)) || [[ -n ${OPSD_PYTHON:-} ]] || "$root/scripts/setup.sh"
# -P: this checkout's code, also where the caller's folder is another checkout.
program=(-P -m tip.train)
if is_on MEASURE_MEMORY && ! ((looks)); then program=("$root/scripts/bench/measure_memory.py"); fi
if is_on PLAN_ONLY; then program=(-P -m tip.plan); fi

# start SETTING...: what the recipe is for.
start() { exec "$python" "${program[@]}" "$@"; }

# make_pair ARGUMENT...: a recipe's own models; a plan knows their sizes without them.
make_pair() { only_looks || "$python" "$root/scripts/make_pair.py" "$@"; }

# distil SETTING...: starts a recipe that trains on DATA_DIR; the settings come after those of the environment.
distil() {
    warn_unsupported
    local arm=() settings=()
    if [[ -n ${ARM:-} ]]; then read_arm "$ARM"; fi
    if ! only_looks; then
        : "${DATA_DIR:?set it to a folder with train.parquet or train.jsonl, and test.parquet or test.jsonl}"
        expect_model MODEL_PATH
        expect_model TEACHER_MODEL_PATH
    fi
    read_environment
    start "${settings[@]}" "${arm[@]}" "$@"
}

expect_model() {
    [[ -f ${!1}/config.json ]] ||
        fail "$1=${!1} is no folder with a config.json: download the model (hf download NAME --local-dir FOLDER) and set $1"
}

# data_file NAME...: the first file of DATA_DIR with such a name, parquet before JSONL; a plan can do without one.
data_file() {
    local name file
    for name in "$@"; do
        # shellcheck disable=SC2231  # val_* is a pattern
        for file in "${DATA_DIR:-}"/$name.parquet "${DATA_DIR:-}"/$name.jsonl; do
            if [[ -f $file ]]; then
                echo "$file"
                return
            fi
        done
    done
    only_looks || fail "DATA_DIR=$DATA_DIR has no $1.parquet and no $1.jsonl"
    echo "${DATA_DIR:-DATA_DIR}/$1.jsonl"
}

# read_arm NAME: sets `arm`. soft_or50 keeps half of the tokens by the score soft_or.
read_arm() {
    case $1 in
        all) arm=(selector=all) ;;
        *[0-9][0-9])
            local score=${1%[0-9][0-9]}
            arm=("selector=${score%_}" "selector.ratio=0.${1: -2}")
            ;;
        *) fail "ARM=$1 must be all or a score and two digits of per cent, such as entropy50, soft_or20 or q3_10" ;;
    esac
}

# Sets `settings`. Defaults are the paper's where it says so (arXiv 2604.14084), else upstream's.
read_environment() {
    local train test
    train=$(data_file train)
    test=$(data_file test "val_*")
    settings=(
        "output_dir='${OUTPUT_ROOT:-outputs}/${RUN_ID:-${recipe%.sh}${ARM:+-$ARM}}'" "device=${DEVICE:-cuda}"
        "student.path='$MODEL_PATH'" student.dtype=bfloat16
        "teacher.path='$TEACHER_MODEL_PATH'" teacher.dtype=bfloat16
        "data.train_path='$train'" "data.eval_path='$test'" data.chat_template=true data.grader=math
        # 256 answers per step, as upstream's 256 prompts with one answer each; the paper has 16 answers per prompt.
        "data.prompts_per_step=${TRAIN_BATCH_SIZE:-16}" "data.samples_per_prompt=${ROLLOUT_N:-16}"
        "data.max_prompt_tokens=${MAX_PROMPT_LENGTH:-2048}"
        "rollout.max_response_tokens=${MAX_RESPONSE_LENGTH:-8192}" rollout.dtype=bfloat16
        "rollout.temperature=${TEMPERATURE:-1.0}" "rollout.top_p=${TOP_P:-1.0}"
        "rollout.tensor_parallel_size=${TP_SIZE:-1}"
        "learner.learning_rate=${LEARNING_RATE:-1e-6}" learner.weight_decay=0.1 learner.activation_checkpointing=true
        "checkpoint.every=${SAVE_FREQ:-20}" "eval.every=${TEST_FREQ:-50}"
    )
    if [[ -n ${TOTAL_TRAINING_STEPS:-} ]]; then
        settings+=("num_steps=$TOTAL_TRAINING_STEPS")
    else
        settings+=("num_epochs=${TOTAL_EPOCHS:-1}")
    fi
    if [[ -n ${GPU_MEMORY_UTIL:-} ]]; then settings+=("rollout.gpu_memory_utilization=$GPU_MEMORY_UTIL"); fi
    if [[ -n ${OPD_LOSS_TYPE:-} ]]; then settings+=("loss.divergence=$OPD_LOSS_TYPE"); fi
    if [[ -n ${OPD_REWARD_BETA:-} ]]; then settings+=("++adjust.reward.beta=$OPD_REWARD_BETA"); fi
    if [[ -n ${ENABLE_THINKING:-} ]]; then settings+=("++data.template_options.enable_thinking=${ENABLE_THINKING,,}"); fi
    if is_on PLAN_ONLY; then
        settings+=("cluster.nodes=${NNODES:-1}" "cluster.gpus_per_node=${N_GPUS_PER_NODE:-8}"
            "cluster.gib_per_gpu=${GPU_GIB:-80}")
    fi
}

# Upstream's variables that nothing here can follow: said, not ignored.
warn_unsupported() {
    local name
    for name in PPO_MINI_BATCH_SIZE PPO_MICRO_BATCH_SIZE_PER_GPU OPD_CHUNK_SIZE OPD_MAX_LENGTH TOP_K VAL_BEFORE_TRAIN \
        VAL_TEMPERATURE VAL_TOP_P VAL_TOP_K VAL_N MODEL_NAME INSTRUCTION_VARIANT REWARD_FUNCTION ENABLE_TOOLS \
        MAX_ASSISTANT_TURNS MAX_TOOL_RESPONSE_LENGTH TOOL_FORMAT AGENT_NUM_WORKERS DATABASE_DIR; do
        if [[ -n ${!name:-} ]]; then echo "$recipe: $name is not followed: $(reason "$name")" >&2; fi
    done
}

reason() {
    case $1 in
        PPO_MINI_BATCH_SIZE) echo "a step is one optimiser step on all of its answers" ;;
        PPO_MICRO_BATCH_SIZE_PER_GPU | OPD_MAX_LENGTH) echo "answers are packed, set learner.micro_batch_tokens" ;;
        OPD_CHUNK_SIZE) echo "the head's chunks have a fixed size in bytes" ;;
        TOP_K) echo "answers are drawn from the whole vocabulary or its TOP_P" ;;
        VAL_BEFORE_TRAIN) echo "a run always begins with an evaluation" ;;
        VAL_*) echo "a training evaluates greedily; recipes/eval.sh samples" ;;
        MODEL_NAME) echo "set RUN_ID" ;;
        INSTRUCTION_VARIANT) echo "scripts/prepare_data.py writes it into the prompts" ;;
        REWARD_FUNCTION) echo "set data.grader" ;;
        MAX_ASSISTANT_TURNS) echo "set tools.max_turns" ;;
        MAX_TOOL_RESPONSE_LENGTH) echo "set tools.max_answer_chars" ;;
        TOOL_FORMAT) echo "set tools.parser" ;;
        AGENT_NUM_WORKERS) echo "set tools.processes" ;;
        *) echo "tools are a function that tools.build names, see docs/agents.md" ;;
    esac
}
