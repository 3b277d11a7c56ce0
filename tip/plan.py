"""`python -m tip.plan`: `python -m opsd.plan` for a run of `python -m tip.train`, whose settings it takes."""

from opsd.plan.program import launch
from tip.config import TipRunConfig


def main() -> None:
    launch(TipRunConfig, "tip.conf", "tip")


if __name__ == "__main__":
    main()
