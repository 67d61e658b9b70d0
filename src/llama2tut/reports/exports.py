"""A comparison for programs: csv and json."""

import csv as csv_format
import io
import json as json_format
import re

from llama2tut.reports.comparison import Comparison
from llama2tut.reports.wording import select

# A spreadsheet may pass over white space, controls and zero-widths before the sign that starts a formula.
_FORMULA = re.compile(r"[\s\x00-\x1f\x7f-\xa0\xad\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]*[=+\-@＝＋－＠]"
                      r"|[ \n]*[\t\r]")


def csv(comparison: Comparison, *, show: str = "all", spreadsheet_safe: bool = False) -> str:
    """Every row as csv: prompt, reference, answers, their headline scores, which were cut off, and the row's groups.

    Where the metric reads words, a last column says what it took for one.

    Args:
        spreadsheet_safe: an apostrophe before cells that a spreadsheet would run as a formula.
    """
    def cell(text: str | None) -> str:
        return "'" + text if spreadsheet_safe and text and _FORMULA.match(text) else text or ""

    scored = [f"{name}_{comparison.metric.headline}" for name in comparison.names] if comparison.metric else []
    by = dict.fromkeys(name for row in comparison.rows for name in row.groups)
    made = {"scored_on": how} if scored and (how := comparison.settings.get("scored_on")) else {}
    out = io.StringIO()
    csv_format.writer(out, lineterminator="\n").writerow(
        ["prompt", "reference", *comparison.names, *scored, "cut", *(f"by_{name}" for name in by), *made])
    # All text in quotes: Python 3.11 leaves a bare carriage return unquoted otherwise, and readers break the row there.
    writer = csv_format.writer(out, lineterminator="\n", quoting=csv_format.QUOTE_NONNUMERIC)
    for _, row in select(comparison, show):
        cut = " ".join(name for name, cut in zip(comparison.names, row.cut, strict=True) if cut)
        writer.writerow([*map(cell, (row.prompt, row.reference, *row.answers)), *(row.values if scored else ()), cut,
                         *(cell(row.groups.get(name)) for name in by), *made.values()])
    return out.getvalue().encode("utf-8", "replace").decode()


def json(comparison: Comparison) -> str:
    """All rows and scores as one JSON object, by docs/comparison.schema.json."""
    text = json_format.dumps(comparison.to_dict(), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    # Half of a surrogate pair has no UTF-8; JSON's own spelling of it does.
    return text.encode("utf-8", "backslashreplace").decode()
