"""Where the recipes and data that ship with llama2tut lie: beside the package in a wheel, in the repository else."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """The folder or file `name` (`configs`, `data/dialogues`, …) that ships with llama2tut."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parents[1] / name
