"""The graders on answers as models write them."""

import pytest

from opsd.data.grading import GRADERS


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7+3=10;10+9=19#19", "19", True),
        ("7+3=10;10+9=19#18", "19", False),
        ("no mark 19", "19", False),
        ("he has 1,200 left. #### 1,200", "so 3*400 = 1200\n#### 1200", True),
        ("#19 #20", "19", False),
    ],
)
def test_final_hash(response, answer, right):
    assert GRADERS["final_hash"](response, answer) is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
        (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"nested braces: $\boxed{\frac{\sqrt{2}}{2}}$", r"\frac{1}{\sqrt{2}}", True),
        (r"$\boxed{7}$", "8", False),
        ("The answer is 18.", "9 * 2 = $<<9*2=18>>18\n#### 18", True),
    ],
)
def test_math(response, answer, right):
    assert GRADERS["math"](response, answer) is right
