"""How a tiny pair is trained: the labels of a text, and the accuracy of a model's answers."""

import torch

from pairs.sums import STUDENT, SUMS, Sum, draw, prompt_showing
from pairs.task import EOS, EOS_ID, distinct
from pairs.training import IGNORED, build_model, collate, worked


def test_labels_are_the_response_shifted_by_one():
    short, long = Sum((1, 2, 3)), Sum((1, 2, 3, 4))
    texts = [
        (short.prompt, short.response),
        (prompt_showing(short, short.response), short.response),
        (long.prompt, long.response),
    ]
    tokenizer = SUMS.tokenizer()
    ids_BT, labels_BT = collate([worked(*text) for text in texts], tokenizer)
    for ids, labels, (prompt, response) in zip(ids_BT, labels_BT, texts, strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == response + EOS
        first = int((labels != IGNORED).nonzero()[0])
        assert first == len(prompt) - 1 and labels[first] == ids[first + 1]


class Copier:
    """A model that repeats what stands between the first two question marks of its prompt; else it says #0."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, ids_BT, **_):
        texts = [self.tokenizer.decode(ids).split("?") for ids in ids_BT]
        answers = [parts[1][: -len(parts[0])] if len(parts) > 2 else "#0" for parts in texts]
        rows = [self.tokenizer.encode(text + EOS) for text in answers]
        longest = max(map(len, rows))
        padded = [ids + [EOS_ID] * (longest - len(ids)) for ids in rows]
        return torch.cat([ids_BT, torch.tensor(padded)], dim=1)


def test_accuracy_with_the_solution_shown_is_that_of_a_copy():
    problems, tokenizer = distinct(draw("copy"), 40), SUMS.tokenizer()
    assert SUMS.accuracy(Copier(tokenizer), tokenizer, problems, prompt_showing) == 1.0
    assert SUMS.accuracy(Copier(tokenizer), tokenizer, problems) < 0.1


def test_untrained_model_scores_nothing_and_stops_at_the_limit():
    torch.manual_seed(0)
    model = build_model(STUDENT, 17)
    assert SUMS.accuracy(model, SUMS.tokenizer(), [Sum((1, 2, 3)), Sum((1, 2, 3, 4))]) == 0.0


def test_only_the_parts_that_a_model_writes_have_labels():
    tokenizer = SUMS.tokenizer()
    ids_BT, labels_BT = collate([[("1+2", False), ("=3", True), (";4", False), ("#5", True)]], tokenizer)
    assert tokenizer.decode(ids_BT[0]) == "1+2=3;4#"
    assert [tokenizer.decode([i]) if i != IGNORED else "" for i in labels_BT[0]] == ["", "", "=", "3", "", "", "#", "5"]
