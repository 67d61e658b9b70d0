"""The entry point of `llama2tut` and of `python -m llama2tut`."""

import sys


def main() -> None:
    """Run one command line and leave with its exit code."""
    from llama2tut.cli import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
