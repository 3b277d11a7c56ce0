"""What a model card says of the loss."""

import pytest

from opsd.models.card import events_of


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({}, "the teacher's top tokens, the student's candidates and one rest bucket"),
        (
            {"payload": "logprobs", "residual": False},
            "the teacher's top tokens, the student's candidates and one rest bucket",
        ),
        ({"residual": True}, "candidates and one rest bucket, with the residual of the sampled token"),
        ({"payload": "hidden"}, "every token, from the teacher's hidden states"),
    ],
)
def test_the_card_says_over_which_tokens_the_loss_was(loss, said):
    assert events_of(loss, "union").endswith(said)
