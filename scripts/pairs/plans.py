"""The tiny pairs by the names that scripts/make_pair.py knows them by."""

from __future__ import annotations

from pairs.lookups import LOOKUPS
from pairs.sorting import SORTING
from pairs.stories import STORIES
from pairs.sums import SUMS
from pairs.training import PairPlan

PLANS: dict[str, PairPlan] = {"sums": SUMS, "sorting": SORTING, "stories": STORIES, "lookups": LOOKUPS}
