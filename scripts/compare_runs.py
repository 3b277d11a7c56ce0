"""Two evaluations, with intervals: see opsd.evaluation.compare; the command opsd-compare is the same."""

from opsd.evaluation.compare import main

if __name__ == "__main__":
    main()
