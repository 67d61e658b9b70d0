"""A comparison as markdown; no cell can become markup."""

import html
import re
from collections.abc import Iterator

from llama2tut.console import counted, visible
from llama2tut.reports.comparison import ComparedRow, Comparison
from llama2tut.reports.wording import cut_note, facts, grade, group_notes, group_table, score_rows, select, verdicts


def markdown(comparison: Comparison, show: str = "8") -> str:
    """A table as in the tutorial, then the scores: newlines as `<br>`, and no cell can become markup."""
    shown = [row for _, row in select(comparison, show)]
    cells = [[_escape(row.prompt), _escape(row.reference or ""), *_answers(comparison, row)] for row in shown]
    lines = [*(f"- {name}: {_escape(text)}" for name, text in facts(comparison)),
             f"- {len(shown)} of {counted(len(comparison.rows), 'row', 'rows')} shown", ""]
    lines += [_markdown_table([["prompt", "reference", *comparison.names], *cells]), "", score_table(comparison), ""]
    lines += [f"- {_escape(text)}" for text in (*verdicts(comparison), cut_note(comparison)) if text]
    if groups := group_table(comparison):
        lines += ["", _markdown_table([[_escape(cell) for cell in row] for row in groups]), ""]
        lines += [f"- {text}" for text in group_notes(comparison)]
    return "\n".join(lines).rstrip() + "\n"


def _answers(comparison: Comparison, row: ComparedRow) -> Iterator[str]:
    """Each answer, and below it how it did."""
    for at, answer in enumerate(row.answers):
        said, _ = grade(comparison, row, at)
        yield _escape(answer) + (f"<br>{said}" if said else "")


def score_table(comparison: Comparison) -> str:
    """The scores of every column as a Markdown table."""
    return _markdown_table(score_rows(comparison))


def _markdown_table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _escape(text: str) -> str:
    # Backslashes for Markdown's own marks first; html entities then bring no new ones.
    marked = re.sub(r"[\\`*_\[\]|~$]", r"\\\g<0>", visible(text).rstrip())
    return html.escape(marked, quote=False).replace("\n", "<br>")
