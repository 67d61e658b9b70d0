"""A file of blind votes, as the html page of compare saves it -> whom people chose, row by row.

    {"llama2tut": "votes", "digests": {"prompts": "…", "answers": {"base": "…", "finetuned": "…"}},
     "votes": {"1": "finetuned", "4": "tie"}}
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2tut.errors import DataError
from llama2tut.files import read_input

TIE = "tie"
_LARGEST = 16 * 2**20  # bytes; a vote has about 20
_AGAIN = "vote on the html page and save the votes again"


@dataclass(frozen=True)
class Votes:
    """What one person chose.

    Attributes:
        path: where it was read.
        prompts: those that were voted on, as `digest` gives them.
        answers: the two columns that stood side by side, by their names, likewise.
        choices: row, from 1 -> one of these names, or `TIE`.
    """

    path: Path
    prompts: str
    answers: Mapping[str, str]
    choices: Mapping[int, str]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse votes on other rows than these.

        Raises:
            DataError: they are.
        """
        if self.prompts != digest(prompts) or max(self.choices) > len(prompts):
            raise DataError(f"--votes {self.path} is of other prompts than these {len(prompts):,}; give the --task, "
                            "--data, --split and --limit of the page that it was saved from")

    def check_answers(self, digests: Mapping[str, str]) -> None:
        """Refuse votes on other answers than those of these columns.

        Raises:
            DataError: they are.
        """
        if other := [name for name, found in self.answers.items() if digests.get(name) != found]:
            raise DataError(f"--votes {self.path} is of other answers than {' and '.join(other)} has here; give the "
                            "models and flags of the page that it was saved from, or vote on a new page")


def digest(texts: Any) -> str:
    """SHA-256 of lists of texts, whatever characters they hold."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_votes(path: Path) -> Votes:
    """Read and check one file.

    Raises:
        DataError: it cannot be read, or is no such file, or holds no vote.
    """
    try:
        values = json.loads(read_input(path, _LARGEST, pipe=True).decode("utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise DataError(f"--votes {path} cannot be read ({error.strerror}); give the json file of votes") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("llama2tut") != "votes":
        raise DataError(f"--votes {path} is no file of votes; {_AGAIN}")
    digests, votes = values.get("digests"), values.get("votes")
    prompts, answers = (digests.get(key) for key in ("prompts", "answers")) if isinstance(digests, dict) else (0, 0)
    if not (isinstance(prompts, str) and isinstance(answers, dict) and len(answers) == 2 and isinstance(votes, dict)
            and all(isinstance(found, str) for found in answers.values())):
        raise DataError(f"--votes {path} does not say which rows were voted on, or how; {_AGAIN}")
    if not votes:
        raise DataError(f"--votes {path} holds no vote; {_AGAIN}")
    for row, choice in votes.items():
        if not re.fullmatch("[1-9][0-9]{0,8}", row) or choice not in (*answers, TIE):
            raise DataError(f"--votes {path}: {row!r}: {choice!r} is no vote: a row's number and one of "
                            f"{', '.join(answers)} or {TIE}; {_AGAIN}")
    return Votes(path, prompts, answers, {int(row): choice for row, choice in votes.items()})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key may stand twice."""
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return values
