"""A task is data: a prompt template, the column it is answered with, how an answer is read, and a metric.

To change what the model is asked, change `prompt` below; training and inference both render it from here.

    >>> ARITHMETIC.render({"instruction": "What is 19-59?"})
    'Calculate the following expression:\\nWhat is 19-59?\\n---\\nAnswer:\\n'
    >>> ARITHMETIC.extract("19 - 59 = -40\\nand more", "-40")
    '-40'
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Extractor = Callable[[str, str], str | None]
_PLACEHOLDER = re.compile(r"\{(\w(?:[\w .-]*\w)?)\}")


@dataclass(frozen=True)
class Task:
    """How rows become prompts and answers become scores.

    Attributes:
        name: what `--task` is given.
        prompt: template; `{column}` stands for a row's cell.
        target: the column that is trained on, after the prompt and before eos.
        reference: the column that answers are scored against.
        metric: how answers are scored: a name in `metrics.METRICS`, or `none`.
        extract: (completion, reference) -> the part of the completion that is compared, or None.
        shorten: the column cut at its front when a row is longer than the context, or None.
        max_new_tokens: how long an answer may get, in tokens.
        default_data: where rows come from when `--data` is not given: a folder, a hub id, or None.
        recipe: the recipe's name before its device suffix (`arithmetic` -> `arithmetic-cpu`).
        notes: what is odd about it, one warning each.
    """

    name: str
    prompt: str
    target: str
    reference: str
    metric: str
    extract: Extractor
    max_new_tokens: int
    shorten: str | None = None
    default_data: str | None = None
    recipe: str = "arithmetic"
    notes: tuple[str, ...] = ()

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that the template names, in order, each once."""
        return tuple(dict.fromkeys(_PLACEHOLDER.findall(self.prompt)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that a row must have: the prompt's, the target and the reference."""
        return tuple(dict.fromkeys((*self.prompt_columns, self.target, self.reference)))

    def render(self, row: Mapping[str, str]) -> str:
        """The prompt for one row. Cells are put in as they are: braces in them are never filled again."""
        return _PLACEHOLDER.sub(lambda match: row[match[1]], self.prompt)


def arithmetic_answer(completion: str, reference: str) -> str | None:
    """The number in an arithmetic answer: on its first line, after the last `=`, the first integer.

    A remainder (`4 R 3`) or `undefined` is read only where the reference has one.
    """
    text = completion.strip().split("\n", 1)[0].rsplit("=", 1)[-1]
    if reference == "undefined":
        return "undefined" if "undefined" in text else None
    match = re.search(r"-?\d+(?: R \d+)?" if " R " in reference else r"-?\d+", text)
    return match[0] if match else None


def whole_answer(completion: str, reference: str) -> str:
    """The completion without surrounding white space."""
    return completion.strip()


ARITHMETIC = Task(
    name="arithmetic",
    prompt="Calculate the following expression:\n{instruction}\n---\nAnswer:\n",
    target="output",
    reference="answer",
    metric="exact_match",
    extract=arithmetic_answer,
    max_new_tokens=24,
    default_data="data/arithmetic",
    recipe="arithmetic",
)

SAMSUM = Task(
    name="samsum",
    prompt="Summarize this dialog:\n{dialogue}\n---\nSummary:\n",
    target="summary",
    reference="summary",
    metric="rouge",
    extract=whole_answer,
    max_new_tokens=96,
    shorten="dialogue",
    default_data="knkarthick/samsum",
    recipe="samsum",
)

BUILT_IN = {task.name: task for task in (ARITHMETIC, SAMSUM)}
