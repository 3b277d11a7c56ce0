"""The trained student as a Hugging Face folder: see opsd.export; the command opsd-export is the same."""

from opsd.export import main

if __name__ == "__main__":
    main()
