"""What comes out of a frame is what went in, bit for bit; everything else is a WireError."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest

from opsd.engines.sampling import Sampling
from opsd.teacher.remote.frames import WireError, from_frame, to_frame
from opsd.teacher.remote.wire import (
    pack_answers,
    pack_generate_request,
    pack_score_request,
    pack_scores,
    unpack_answers,
    unpack_generate_request,
    unpack_score_request,
    unpack_scores,
)
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=40, stop_ids=(0, 7))
SCORED = scored_rollouts([5, 1, 9], VOCABULARY, top_k=6)
ROLLOUTS = [item.rollout for item in SCORED]


@pytest.mark.parametrize("with_candidates", [True, False])
def test_a_score_request_arrives_as_it_was_sent(with_candidates):
    shown = replace(ROLLOUTS[1].prompt, teacher_token_ids=np.array([9, 8, 7, 6], np.int32))
    sent = [ROLLOUTS[0], replace(ROLLOUTS[1], prompt=shown), ROLLOUTS[2]]
    request = unpack_score_request(pack_score_request(sent, 6, VOCABULARY, with_candidates=with_candidates))
    assert (request.top_k, request.vocabulary, request.with_candidates) == (6, VOCABULARY, with_candidates)
    assert not request.with_hidden
    for rollout, arrived in zip(sent, request.rollouts, strict=True):
        assert arrived.prompt.scored_after.tolist() == rollout.prompt.scored_after.tolist()
        assert arrived.response_ids.tolist() == rollout.response_ids.tolist()
        if with_candidates:
            assert arrived.candidate_ids.tolist() == rollout.candidate_ids.tolist()
    assert request.num_tokens == sum(len(r.prompt.scored_after) + len(r) for r in sent)


@pytest.mark.parametrize("hidden_dtype", [None, np.float32, np.uint16])
@pytest.mark.parametrize("with_candidates", [True, False])
def test_scores_arrive_bit_for_bit(with_candidates, hidden_dtype):
    rng = np.random.default_rng(0)
    scores = [
        replace(
            item.scores,
            candidate_logprobs=item.scores.top_logprobs * 2 if with_candidates else None,
            entropy=-item.scores.sampled_logprobs,
            hidden=None if hidden_dtype is None else rng.integers(0, 9, (len(item.rollout), 7)).astype(hidden_dtype),
        )
        for item in SCORED
    ]
    arrived = unpack_scores(pack_scores(scores, with_candidates=True), [len(r) for r in ROLLOUTS])
    for one, other in zip(scores, arrived, strict=True):
        for name, array in vars(one).items():
            if array is None:
                assert getattr(other, name) is None
            else:
                assert getattr(other, name).dtype == array.dtype
                np.testing.assert_array_equal(getattr(other, name), array)


def test_a_request_for_hidden_states_says_so():
    body = pack_score_request(ROLLOUTS, 6, VOCABULARY, with_candidates=False, with_hidden=True)
    assert unpack_score_request(body).with_hidden


def test_answers_arrive_bit_for_bit():
    prompts = [r.prompt for r in ROLLOUTS]
    sampling = Sampling(temperature=0.5, top_p=0.75, top_k=3, max_tokens=9, num_candidates=1)
    request = unpack_generate_request(pack_generate_request(prompts, [4, 5, 6], sampling, VOCABULARY))
    assert (request.seeds, request.sampling, request.vocabulary) == ([4, 5, 6], sampling, VOCABULARY)
    answers = [replace(r, stopped=r.sample != 1) for r in ROLLOUTS]
    for sent, arrived in zip(answers, unpack_answers(pack_answers(answers), prompts, [0, 0, 0]), strict=True):
        assert arrived.stopped == sent.stopped and arrived.prompt is sent.prompt
        for name in ("response_ids", "sampled_logprobs", "candidate_ids", "candidate_logprobs"):
            np.testing.assert_array_equal(getattr(arrived, name), getattr(sent, name))


def test_an_array_that_is_a_view_travels_in_its_own_order():
    view = np.arange(6, dtype=np.int32).reshape(2, 3).T
    np.testing.assert_array_equal(from_frame(to_frame({"a": view}))["a"], view)


def frame_of(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


WHOLE = pack_score_request(ROLLOUTS, 6, VOCABULARY, with_candidates=True)


@pytest.mark.parametrize(
    "body",
    [b"", b"\x80\x04K\x01.", b"\xff" * 64, WHOLE[:-1], WHOLE + b"0", frame_of([1], b""),
     frame_of({"prompt_ids": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"abcd"),
     frame_of({"prompt_ids": {"dtype": "I32", "shape": [2**40], "data_offsets": [0, 4]}}, b"abcd")],
)  # fmt: skip
def test_what_is_no_frame_is_refused(body):
    with pytest.raises(WireError):
        unpack_score_request(body)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_ids": None}, "prompt_ids must be int32 with 1 dimensions, got nothing"),
        ({"response_ids": np.zeros(15, np.float32)}, "response_ids must be int32 .* got float32"),
        ({"response_lengths": np.array([5, 1, 10], np.int32)}, "response_lengths must .* sum to the 15"),
        ({"response_lengths": np.array([15, 0, 0], np.int32)}, "response_lengths must each be at least 1"),
        ({"response_lengths": np.array([20, -6, 1], np.int32)}, "response_lengths must each be at least 1"),
        ({"response_lengths": np.array([15], np.int32)}, "3 prompts, 1 responses"),
        ({"candidate_ids": np.zeros((14, 6), np.int32)}, "candidate_ids of 14 rows do not belong together"),
        ({"top_k": np.zeros(1, np.int32)}, "top_k must be int32 with 0 dimensions"),
        ({"stop_ids": np.array([7, 0], np.int32)}, "stop_ids must be ascending"),
        ({"stop_ids": np.array([40], np.int32)}, r"stop_ids must lie in 0\.\.39"),
    ],
)
def test_a_frame_that_does_not_fit_together_is_refused(change, said):
    arrays = {name: array for name, array in {**from_frame(WHOLE), **change}.items() if array is not None}
    with pytest.raises(ValueError, match=said):
        unpack_score_request(to_frame(arrays))


def test_an_answer_about_other_rollouts_is_refused():
    body = pack_scores([item.scores for item in SCORED], with_candidates=False)
    with pytest.raises(WireError, match="has 15 rows, expected 16"):
        unpack_scores(body, [5, 2, 9])
