"""Data sets into verl's format: see opsd.data.prepare; the command opsd-prepare is the same."""

from opsd.data.prepare import main

if __name__ == "__main__":
    main()
