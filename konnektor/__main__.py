"""``python -m konnektor``: the command line."""

from konnektor.cli import main

if __name__ == "__main__":
    main()
