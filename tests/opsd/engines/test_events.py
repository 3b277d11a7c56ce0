"""Raw engine rows to event rows, against a slow computation with one dict a row."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from opsd.engines.events import event_rows, has_foreign_ids, pad_rows
from opsd.types import Vocabulary

MODEL_IDS = 14  # ids of the model: 2 more than are shared
VOCABULARY = Vocabulary(size=12, stop_ids=(3, 7, 9))


def raw_rows(seed: int, num_rows: int, num_top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, logprobs, dense logprobs) as vLLM reports them: a random actual token, then the top ids."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(num_rows, MODEL_IDS))
    dense = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    actual = rng.integers(0, MODEL_IDS, size=(num_rows, 1))
    top = np.argsort(-dense, axis=1)[:, :num_top]
    ids = np.concatenate([actual, top], axis=1).astype(np.int32)
    return ids, np.take_along_axis(dense, ids, axis=1), dense


def slow_events(ids: np.ndarray, logprobs: np.ndarray) -> dict[int, float]:
    known = dict(zip(ids.tolist(), np.exp(logprobs.astype(np.float64)).tolist(), strict=True))
    shared = 1.0 - sum(p for token, p in known.items() if token >= VOCABULARY.size)
    events: dict[int, float] = {}
    for token, p in known.items():
        if token < VOCABULARY.size:
            event = VOCABULARY.stop_event if token in VOCABULARY.stop_ids else token
            events[event] = events.get(event, 0.0) + p / shared
    return {event: float(np.log(p)) for event, p in events.items()}


@pytest.mark.parametrize("num_top", [1, 5, MODEL_IDS])
@pytest.mark.parametrize("num_kept", [1, 4, 20])
def test_event_rows_equal_a_dict_a_row(num_top, num_kept):
    ids, logprobs, _ = raw_rows(seed=num_top, num_rows=200, num_top=num_top)
    rows = event_rows(ids, logprobs, VOCABULARY, num_kept)
    for row in range(len(ids)):
        expected = slow_events(ids[row], logprobs[row])
        best = sorted(expected, key=lambda event: -expected[event])[:num_kept]
        assert rows.top_ids_TK[row].tolist() == best + [-1] * (num_kept - len(best))
        best_logprobs = [expected[event] for event in best]
        np.testing.assert_allclose(rows.top_logprobs_TK[row, : len(best)], best_logprobs, atol=1e-5)
        assert np.all(rows.top_logprobs_TK[row, len(best) :] == -np.inf)
        actual = int(ids[row, 0])
        event = VOCABULARY.stop_event if actual in VOCABULARY.stop_ids else actual
        np.testing.assert_allclose(rows.sampled_logprobs_T[row], expected.get(event, -np.inf), atol=1e-5)
    assert rows.top_ids_TK.dtype == np.int32 and rows.top_logprobs_TK.dtype == np.float32


def test_all_mass_on_foreign_ids_stays_finite():
    ids, logprobs = np.array([[1, 13]], np.int32), np.array([[-20.0, 0.0]], np.float32)
    rows = event_rows(ids, logprobs, VOCABULARY, num_kept=2)
    assert rows.top_ids_TK.tolist() == [[1, -1]]
    assert np.isfinite(rows.sampled_logprobs_T).all()


def test_split_gives_each_rollout_its_own_rows():
    ids, logprobs, _ = raw_rows(seed=0, num_rows=7, num_top=4)
    rows = event_rows(ids, logprobs, VOCABULARY, num_kept=3)
    parts = rows.split([2, 1, 4])
    assert [len(part.sampled_logprobs_T) for part in parts] == [2, 1, 4]
    np.testing.assert_array_equal(parts[2].top_ids_TK, rows.top_ids_TK[3:])
    np.testing.assert_array_equal(parts[1].sampled_logprobs_T, rows.sampled_logprobs_T[2:3])


def flat(rows: list[dict[int, float]]) -> SimpleNamespace:
    """The layout of vLLM's FlatLogprobs."""
    ends = np.cumsum([len(row) for row in rows]).tolist()
    return SimpleNamespace(
        token_ids=[token for row in rows for token in row],
        logprobs=[logprob for row in rows for logprob in row.values()],
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
    )


def test_pad_rows_starts_each_rollout_at_its_first_row_and_pads_short_rows():
    first = flat([{}, {5: -1.0, 6: -2.0}, {7: -3.0}])
    second = flat([{}, {1: -9.0}, {2: -9.0}, {8: -0.5, 9: -1.5, 10: -2.5}])
    ids, logprobs = pad_rows([first, second], [1, 3])
    assert ids.tolist() == [[5, 6, -1], [7, -1, -1], [8, 9, 10]]
    assert logprobs.tolist() == [[-1.0, -2.0, -np.inf], [-3.0, -np.inf, -np.inf], [-0.5, -1.5, -2.5]]


def test_has_foreign_ids():
    assert has_foreign_ids(np.array([1, 12]), VOCABULARY)
    assert not has_foreign_ids(np.array([0, 11]), VOCABULARY)


def test_an_ignored_token_is_foreign_as_padding_is():
    """The mass of id 5 is taken out of the row, with that of the padded id 12; the others share what is left."""
    ignoring = replace(VOCABULARY, foreign_ids=(5,))
    probs = np.array([[0.1, 0.4, 0.3, 0.2]])
    ids = np.array([[2, 5, 0, 12]], np.int32)
    rows = event_rows(ids, np.log(probs).astype(np.float32), ignoring, num_kept=4)
    assert rows.top_ids_TK.tolist() == [[0, 2, -1, -1]]
    np.testing.assert_allclose(np.exp(rows.top_logprobs_TK[0, :2]), [0.75, 0.25], atol=1e-6)
    response = np.array([2, 5, 0], np.int32)
    assert has_foreign_ids(response, ignoring) and not has_foreign_ids(response, VOCABULARY)
