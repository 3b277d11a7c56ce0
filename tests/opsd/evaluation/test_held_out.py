"""An evaluation's figures, where something of it is missing, and by which grader."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from opsd.batch import PendingScores
from opsd.data.grading import judge_rollouts
from opsd.data.math_process import Judgement
from opsd.evaluation.held_out import Evaluation, accuracy, evaluate
from opsd.types import Prompt, Rollout, Vocabulary
from tests.opsd.builders import Answers, kept_here, scored_rollouts


class Letters:
    """A tokenizer of one character an id."""

    added_tokens_decoder = {}

    def convert_tokens_to_ids(self, token):
        return None

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


def answered(text, *, answer="7", data_source=""):
    ids = np.array([*map(ord, text)], np.int32)
    nothing = np.zeros((len(ids), 1), np.float32)
    prompt = Prompt(index=0, token_ids=ids, text="?", answer=answer, source="file", data_source=data_source)
    return Rollout(
        prompt=prompt, sample=0, response_ids=ids, sampled_logprobs=nothing[:, 0], candidate_logprobs=nothing,
        candidate_ids=nothing.astype(np.int32), stopped=True, policy_version=0,
    )  # fmt: skip


def test_without_prompts_for_it_nothing_is_sampled_and_no_figure_made_up():
    rollout_pool = SimpleNamespace(greedy=lambda problems: [answered("#7"), answered("#8")])
    nothing = {"kl_prompts": [], "tokenizer": Letters()}
    found = evaluate(rollout_pool, None, problems=["a", "b"], grader="final_hash", **nothing)
    assert found == Evaluation(accuracy=0.5, grader_timeouts=0)
    assert evaluate(None, None, problems=[], grader="final_hash", **nothing) == Evaluation()
    assert set(Evaluation().metrics().values()) == {None}


def test_answers_without_usable_scores_are_counted_by_reason_and_in_no_other_figure():
    vocabulary = Vocabulary(size=20, stop_ids=(0,))
    items = scored_rollouts([5, 3, 4], vocabulary)
    items[1] = replace(items[1], scores=replace(items[1].scores, sampled_logprobs=np.full(3, np.nan, np.float32)))

    class Teacher(Answers):
        def begin(self, groups):
            [group] = groups
            scores = [item.scores for item in items]
            return [
                PendingScores(
                    rollouts=group, scored_places=(0, 1, 2), engines=self, teacher="t",
                    parts=kept_here(list(group.values()), scores, vocabulary),
                )
            ]  # fmt: skip

    rollout_pool = SimpleNamespace(sample=lambda *_, **__: [dict(enumerate(item.rollout for item in items))])
    found = evaluate(rollout_pool, Teacher(), problems=[], kl_prompts=["a"], grader=None, tokenizer=None)
    assert found.response_length == 4.5
    assert np.isfinite(found.reverse_kl)
    metrics = found.metrics()
    assert (metrics["eval/dropped/nan_score"], metrics["eval/dropped/foreign_token"]) == (1, 0)
    assert found.figures()["dropped/nan_score"] == 1


def test_answers_that_the_grader_gave_up_are_wrong_and_counted(monkeypatch):
    judged = [Judgement(True, "7", False), Judgement(False, None, True), Judgement(False, None, True)]
    monkeypatch.setattr("opsd.evaluation.held_out.judge_rollouts", lambda *_: judged)
    assert accuracy([None] * 3, "math", None) == (1 / 3, 2)


def test_a_score_counts_as_much_as_it_is(monkeypatch):
    judged = [Judgement(True, "7", False), Judgement(False, None, False, score=0.25), Judgement(False, None, False)]
    monkeypatch.setattr("opsd.evaluation.held_out.judge_rollouts", lambda *_: judged)
    assert accuracy([None] * 3, "deepplanning", None) == (1.25 / 3, 0)


def test_auto_grades_each_row_by_its_source():
    rollouts = [
        answered("#7", data_source="openai/gsm8k"),
        answered("7", data_source="openai/gsm8k"),
        answered(r"\boxed{7}", data_source="lighteval/MATH"),
        answered("Answer: 7", data_source="lighteval/MATH"),
        answered("Answer: 7", data_source="aime2024"),
        answered(r"\boxed{7}", data_source="math_dapo"),
        answered(r"\boxed{7}", data_source="numina_olympiads"),
    ]
    right = [answer.right for answer in judge_rollouts(rollouts, "auto", Letters())]
    assert right == [True, False, True, False, True, False, True]
