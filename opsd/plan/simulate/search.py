"""The best split of GPUs over the roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from opsd.plan.simulate.parts import Layout, Outcome, Rates, Split, Work
from opsd.plan.simulate.pipeline import simulate

FEW = 32  # splits: eight GPUs have 21
SEARCHED_STEPS = 4  # of the work, so many times as batches overlap: the best split is simulated with all of it


@dataclass(frozen=True, kw_only=True)
class Room:
    """The GPUs that a split may use, and what a worker of each role takes of them."""

    num_gpus: int
    rollout_gpus: int  # of an engine
    teacher_gpus: int  # of an engine; 0: a server elsewhere
    teachers: int  # of servers, whose number is given
    fewest_ranks: int  # of the learner, whose memory decides

    @property
    def fewest_gpus(self) -> int:
        return self.rollout_gpus + self.teacher_gpus + self.fewest_ranks

    def splits(self) -> Iterator[Split]:
        """All that leave no GPU without work: what the engines leave is the learner's."""
        for rollout in range(1, self.num_gpus // self.rollout_gpus + 1):
            left = self.num_gpus - rollout * self.rollout_gpus
            most = left // self.teacher_gpus if self.teacher_gpus else 1
            for teacher in range(1, most + 1):
                ranks = left - teacher * self.teacher_gpus
                if ranks >= self.fewest_ranks:
                    yield Split(rollout=rollout, teacher=teacher if self.teacher_gpus else self.teachers, learner=ranks)


def best_split(work: Work, rates: Rates, layout: Layout, room: Room) -> tuple[Split, Outcome]:
    """The fastest of the room's splits that is found, everything else as in `layout`; `room` must hold a split.

    Of few splits each is simulated. Of many the search begins where ideal work is fastest and goes to a better split
    some engines away, then fewer, until none beside it is better; what ideal work rules out is not simulated.
    """
    splits = {(split.rollout, split.teacher): split for split in room.splits()}
    first_steps = replace(work, lengths=work.lengths[: SEARCHED_STEPS * (layout.max_staleness + 1)])

    @cache
    def ideal(place: tuple[int, int]) -> float:
        return ideal_seconds(first_steps, rates, replace(layout, split=splits[place]))

    @cache
    def seconds(place: tuple[int, int]) -> float:
        return simulate(first_steps, rates, replace(layout, split=splits[place])).seconds_per_step

    if len(splits) <= FEW:
        best = min(splits, key=seconds)
    else:
        best, stride = min(splits, key=ideal), max(1, room.num_gpus // 4)
        while stride:
            moves = [(more, other) for more in (-stride, 0, stride) for other in (-stride, 0, stride)]
            near = [place for more, other in moves if (place := (best[0] + more, best[1] + other)) in splits]
            better = min((place for place in near if ideal(place) < seconds(best)), key=seconds, default=best)
            if seconds(better) < seconds(best):
                best = better
            else:
                stride //= 2
    return splits[best], simulate(work, rates, replace(layout, split=splits[best]))


def ideal_seconds(work: Work, rates: Rates, layout: Layout) -> float:
    """A step takes no less, however well its work is shared, on GPUs that no two workers share."""
    split, ahead = layout.split, layout.max_staleness
    running = min(layout.max_num_seqs, -(-work.num_answers // split.rollout))  # the more at once, the faster each token
    token_s = rates.decode_step_s / running + rates.decode_sequence_s
    prefill_s = work.num_answers * work.prompt_tokens / rates.prefill_tokens_per_s
    rollout_s = (work.response_tokens * token_s + prefill_s) / split.rollout
    longest_s = float(work.lengths.max(1).mean()) * (rates.decode_step_s + rates.decode_sequence_s)
    score_s = work.sequence_tokens / rates.score_tokens_per_s / split.teacher
    learn_s = rates.select_s + rates.learn_s(work.sequence_tokens, work.kept_ratio, split.learner) + rates.sync_s
    through_s = (max(rollout_s, longest_s) + learn_s) / (ahead + 1)  # a batch's way, of which so many overlap
    return max(rollout_s, score_s, learn_s, through_s)
