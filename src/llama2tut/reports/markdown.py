"""A comparison as markdown; no cell can become markup."""

import html
import re

from llama2tut.console import visible
from llama2tut.reports.comparison import Comparison
from llama2tut.reports.wording import facts, group_notes, group_table, score_rows, select, verdicts


def markdown(comparison: Comparison, show: str = "8") -> str:
    """A table as in the tutorial, then the scores: newlines as `<br>`, and no cell can become markup."""
    cells = [[_escape(text or "") for text in (row.prompt, row.reference, *row.answers)]
             for _, row in select(comparison, show)]
    lines = [*(f"- {name}: {_escape(text)}" for name, text in facts(comparison)), ""]
    lines += [_markdown_table([["prompt", "reference", *comparison.names], *cells]), "", score_table(comparison), ""]
    lines += [f"- {text}" for text in verdicts(comparison)]
    if groups := group_table(comparison):
        lines += ["", _markdown_table([[_escape(cell) for cell in row] for row in groups]), ""]
        lines += [f"- {text}" for text in group_notes(comparison)]
    return "\n".join(lines).rstrip() + "\n"


def score_table(comparison: Comparison) -> str:
    """The scores of every column as a Markdown table."""
    return _markdown_table(score_rows(comparison))


def _markdown_table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _escape(text: str) -> str:
    # Backslashes for Markdown's own marks first; html entities then bring no new ones.
    marked = re.sub(r"[\\`*_\[\]|~$]", r"\\\g<0>", visible(text).rstrip())
    return html.escape(marked, quote=False).replace("\n", "<br>")
