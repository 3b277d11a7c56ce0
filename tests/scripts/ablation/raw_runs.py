"""Made-up raw lines of an ablation."""

import numpy as np

NUM_PROBLEMS = 30


def evaluation(generator, step, share, tokens, *, last):
    counts = generator.binomial(8, share, NUM_PROBLEMS)
    made = {
        "step": step,
        "accuracy": float((counts > 4).mean()),
        "mean_at_8": float(counts.mean() / 8),
        "reverse_kl": 1.0 - share,
        "greedy": "".join(str(int(count > 4)) for count in counts),
        "samples": "".join(map(str, counts)),
        "trained_tokens": tokens,
    }
    return {**made, "kl": [round(float(1.0 - count / 8), 4) for count in counts]} if last else made


def made_up_run(arm, seed, *, final_share, tokens_per_step=1000, settings=("selector=all",)):
    """Steps 0, 20 and 40; those of one seed start alike."""
    first = evaluation(np.random.default_rng(seed), 0, 0.2, 0, last=False)
    generator = np.random.default_rng([seed, len(arm), int(1000 * final_share)])
    middle = evaluation(generator, 20, (0.2 + final_share) / 2, 20 * tokens_per_step, last=False)
    last = evaluation(generator, 40, final_share, 40 * tokens_per_step, last=True)
    names = ("q1", "q2", "q3", "q4", "entropy", "divergence", "position")
    return {
        "task": "sums",
        "arm": arm,
        "seed": seed,
        "settings": list(settings),
        "commit": "0123456789abcdef",
        "evaluations": [first, middle, last],
        "losses": [1.0, 0.5],
        "selection": {name: 0.25 for name in names},
        "cosine": 0.5,
        "learner_s": 0.2,
        "learner_peak_mib": 30.0,
        "run_s": 60.0,
    }


def made_up_runs():
    """Three seeds: entropy@0.2 is far better than all others, the random tokens as good as all."""
    shares = {"all": (0.5, 1000), "random@0.2": (0.5, 200), "entropy@0.2": (0.9, 200)}
    return [
        made_up_run(arm, seed, final_share=share, tokens_per_step=tokens)
        for seed in range(3)
        for arm, (share, tokens) in shares.items()
    ]
