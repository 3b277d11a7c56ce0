"""A run's files as the model itself would have written them: rates that are known, and the phases that follow."""

import json

import numpy as np
import yaml

from opsd.plan.simulate.parts import Layout, Rates, Split, Work

CORES = 2
OVERHEAD_SHARE = 0.3  # of a batch of 5 answers with 34 + 8 tokens, and of a learner's step of 16
TRUE = Rates(
    decode_step_s=0.006, decode_sequence_s=0.0004, prefill_tokens_per_s=9e3, score_tokens_per_s=9e3,
    learn_tokens_per_s=8e3, select_s=0.02, sync_s=0.06, learn_step_s=0.0364, score_batch_s=0.01,
)  # fmt: skip
LENGTHS = np.random.default_rng(3).integers(20, 49, 400)
WORK = Work(lengths=LENGTHS.reshape(25, 16), prompt_tokens=8, kept_ratio=0.5)


def layout(rollout=1, teacher=1, learner=1):
    split = Split(rollout=rollout, teacher=teacher, learner=learner)
    return Layout(split=split, group_size=5, max_num_seqs=16, max_batch_tokens=4096, num_devices=CORES)


def write_run(folder, phase_s, split, *, steps=6, answers=LENGTHS):
    """The files of a run that took so long in each phase, its first step ten times as long."""
    folder.mkdir()
    engine = {"max_num_seqs": 16, "group_size": 5, "max_batch_tokens": 4096, "urls": [], "tensor_parallel_size": 1}
    config = {
        "data": {"prompts_per_step": 4, "samples_per_prompt": 4},
        "rollout": {**engine, "num_workers": split.rollout},
        "teacher": {**engine, "num_workers": split.teacher},
        "learner": {"num_workers": split.learner},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    tokens = int(LENGTHS.mean() * 16)
    lines = [
        {"step": step, "loss": 1.0, "num_tokens": tokens, "num_trunk_tokens": tokens + 16 * 8, "kept_ratio": 0.5}
        | {f"phase_s/{name}": value * (10 if step == 1 else 1) for name, value in phase_s.items()}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"step": 1, **dict.fromkeys(("tokens", "entropy", "reverse_kl", "quadrant", "weight"), [0] * int(length))}
        for length in answers
    ]
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
