"""What a travel plan is worth: eight dimensions of common sense, the traveller's hard constraints, and their mean.

A dimension is 1 where all of its rules are kept, else 0. The score, in [0, 1], is the mean of two halves: the mean of
the dimensions, and the share of the hard constraints that are met. The public scorer's second half is 1 where all of
them are met, else 0: `composite` is the mean with that one. Rules and numbers are DeepPlanning's (arXiv 2601.18137, and
its program's evaluation folder); docs/deepplanning.md says what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from opsd.data.deepplanning import journey, places, times
from opsd.data.deepplanning.database import Database, open_database
from opsd.data.deepplanning.plan import Plan, plan_text, read_plan
from opsd.data.deepplanning.task import Trip, read_task
from opsd.data.math_process import Judgement

Rule = Callable[[Plan, Trip, Database], Iterator[str]]

DIMENSIONS: dict[str, tuple[Rule, ...]] = {
    "route consistency": (journey.length, journey.closed_loop, journey.rides_between_cities),
    "sandbox compliance": (
        places.known_hotels, places.known_attractions, places.known_restaurants, places.known_rides,
    ),
    "itinerary structure": (
        journey.bed, journey.ends_at_the_hotel, journey.enough_meals, journey.enough_attractions,
    ),
    "time feasibility": (times.one_at_a_time, times.ways_as_long_as_they_take),
    "business hours": (places.open_attractions, places.open_restaurants, places.no_closed_days),
    "duration rationality": (places.visits_as_long_as_advised, places.meals_of_a_sensible_length),
    "cost accuracy": (times.total_adds_up,),
    "activity diversity": (places.no_restaurant_twice, places.no_attraction_twice),
}  # fmt: skip
MODES = {  # of rides that count for a constraint of flights or trains
    "flight": ("flight", "飞机", "airplane", "plane"),
    "train": ("train", "火车", "railway", "高铁", "gaotie"),
}


@dataclass(frozen=True, kw_only=True)
class PlanScore:
    """What was found of one answer."""

    wrong: Mapping[str, tuple[str, ...]]  # dimension -> what breaks its rules, in words; of all eight
    met: Mapping[str, bool]  # hard constraint -> is it met
    delivered: bool = True  # the last turn has a plan with a day in it
    unread_lines: int = 0  # lines of the plan with a time that no rule could look at

    @property
    def commonsense(self) -> float:
        """Mean of the dimensions."""
        return fmean(self.delivered and not wrong for wrong in self.wrong.values())

    @property
    def hard_share(self) -> float:
        """Share of the hard constraints that are met; 0 for a task without any, as in public."""
        return fmean(self.met.values()) if self.met else 0.0

    @property
    def hard_all(self) -> float:
        return float(bool(self.met) and all(self.met.values()))

    @property
    def score(self) -> float:
        return (self.commonsense + self.hard_share) / 2

    @property
    def solved(self) -> bool:
        """Every dimension and every hard constraint: the public case accuracy."""
        return self.commonsense == 1.0 and self.hard_all == 1.0

    def parts(self) -> dict[str, float]:
        """Figures that an evaluation prints beside the score, each in [0, 1] but the last."""
        return {
            "delivered": float(self.delivered),
            **{name: float(self.delivered and not wrong) for name, wrong in self.wrong.items()},
            "commonsense": self.commonsense,
            "hard constraints, share": self.hard_share,
            "hard constraints, all": self.hard_all,
            "composite": (self.commonsense + self.hard_all) / 2,
            "unread lines": float(self.unread_lines),
        }


NO_PLAN = PlanScore(wrong={name: () for name in DIMENSIONS}, met={}, delivered=False)


def grade(response: str, reference: str) -> Judgement:
    """The judgement of an answer, or of a whole trajectory, whose last turn is what counts.

    Raises ValueError where `reference` is no task's, and DataError where its database is not there or not whole.
    """
    text = plan_text(response)
    found = NO_PLAN if text is None else score_plan(text, reference)
    return Judgement(right=found.solved, value=None, gave_up=False, score=found.score, parts=found.parts())


def score_plan(text: str, reference: str) -> PlanScore:
    """Of a plan's text, without its tags."""
    task = read_task(reference)
    database = open_database(task.database)
    plan = read_plan(text, database.names)
    if not plan.days:
        return NO_PLAN
    return PlanScore(
        wrong={
            name: tuple(words for rule in rules for words in rule(plan, task.trip, database))
            for name, rules in DIMENSIONS.items()
        },
        met={name: is_met(name, fields, plan, task.trip) for name, fields in task.trip.constraints.items()},
        unread_lines=len(plan.unread),
    )


def is_met(name: str, fields: Mapping[str, Any], plan: Plan, trip: Trip) -> bool:
    """Is a hard constraint met? All that it names must be in the plan: by name, whatever else it asks for."""
    kind = name.partition("_")[0]
    if kind in MODES:
        rides = [ride for day in plan.days for ride in day.of("travel_intercity_public")]
        numbers = {ride.number for ride in rides if ride.mode in MODES[kind]}
        return {fields[key] for key in (f"outbound_{kind}_no", f"inbound_{kind}_no") if fields.get(key)} <= numbers
    if kind == "hotel":
        return fields["hotel_name"] in {day.hotel for day in plan.days}
    if kind == "restaurant":
        return fields["restaurant_name"] in {meal.name for day in plan.days for meal in day.of("meal")}
    if kind == "attraction":
        return set(fields["attraction_names"]) <= {v.name for day in plan.days for v in day.of("attraction")}
    return times.cost(plan, trip) <= fields["max_budget"]
