"""A comparison as one html file to pass around: it asks nothing of any network, and nothing in a row can run."""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby, pairwise, takewhile
from typing import Any

import regex

from llama2tut import __version__
from llama2tut.console import counted, visible
from llama2tut.reports.comparison import ComparedRow, Comparison
from llama2tut.reports.exports import json
from llama2tut.reports.wording import (
    cut_note,
    facts,
    grade,
    interval,
    number,
    select,
    speed_of,
    telling_groups,
    verdicts,
)
from llama2tut.resources import shipped
from llama2tut.tasks.metrics import UNSPACED, plain

_TOKEN = regex.compile(rf"(?V1)-?\d+(?:[.,]\d+)*|[{UNSPACED}]\p{{M}}*|[\w--[{UNSPACED}]]+(?:['’]\w+)*|\s+|[^\w\s]")
_WORD, _SIGN, _EQUALS = re.compile(r"-?\d|\w"), re.compile(r"\S"), re.compile(r"[^\n]*[=＝]")
_GROUPS = 6  # shown of each property
_BLOCK = 50  # rows


def page(comparison: Comparison) -> str:
    """The whole file. It reads without JavaScript, which only filters, searches and saves."""
    template = shipped("reports/page.html").read_text("utf-8")
    style, script = (base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
                     for inside in re.findall(r"<(?:style|script)>(.*?)</", template, re.DOTALL))
    metric = comparison.metric
    kinds = ("all", *(metric.outcomes if metric else ()), "changed")
    heading = f"{comparison.task or 'prompts'}: base against finetuned"
    names = [*facts(comparison)[1:-1], ("rows", f"{len(comparison.rows)}")]
    labels = {kind: f"{kind} <small>{len(select(comparison, kind))}</small>" for kind in kinds}
    hints = ["Marked words differ from the reference."] if metric else []
    if any(_working(row, at) for row in comparison.rows for at in range(len(comparison.columns))):
        hints += ["Working before the last = is not marked."] * bool(metric and not metric.graded)
    if metric and metric.graded:
        hints.append(f"Better, same and worse: {metric.label} of this answer against the base model's.")
    if metric:
        hints += [metric.hint] * bool(metric.hint)
        hints += [f"{metric.label} is counted over {metric.tokens}."] * bool(metric.tokens)
    if note := cut_note(comparison):
        hints.append(f"{note[0].upper()}{note[1:]}.")
    if metric and len(comparison.tuned) > 1:
        hints.append("Filters, recipe and loss are of the first adapter.")
    fills = {
        "policy": f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:; "
                  "base-uri 'none'; form-action 'none'",
        "lang": _language(comparison),
        "title": _escape(f"{heading} · {comparison.model}"),
        "heading": _escape(heading),
        "names": "".join(f"<dt>{name}</dt><dd>{_escape(text)}</dd>" for name, text in names),
        "verdicts": "".join(f'<p class="verdict">{_escape(text)}.</p>' for text in verdicts(comparison)),
        "scores": "".join(_panels(comparison)),
        "groups": _groups(comparison),
        "hint": f'<p class="hint">{" ".join(hints)}</p>' if hints else "",
        "filters": "".join(f'<a href="#{kind}">{label}</a>' for kind, label in labels.items()),
        "rows": "\n".join(_blocks(list(_rows(comparison)))),
        "run": _run(comparison),
        "version": __version__,
        # `<` is the only way out of a script element, and JSON has another spelling for it.
        "data": json(comparison).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fills[match[1]], template)


def _language(comparison: Comparison) -> str:
    """The language that most of the rows are in, as far as their script tells: fonts and line breaks go by it."""
    text = "".join(row.reference or row.prompt for row in comparison.rows[:100])
    weights = {"en": (r"\p{Latin}", 0.25), "zh": (r"\p{Han}", 0.5), "ko": (r"\p{Hangul}", 1),
               "ja": (r"[\p{Hiragana}\p{Katakana}]", 1)}
    return max(weights, key=lambda name: weights[name][1] * len(regex.findall(weights[name][0], text)))


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _panels(comparison: Comparison) -> Iterator[str]:
    """One panel a score, with a bar a column and its 95 % interval on it; lengths and speeds have no better side."""
    metric, columns = comparison.metric, list(zip(comparison.names, comparison.scores, strict=False))
    for key, label in metric.labels.items() if metric else ():
        assert metric is not None
        ends = [(scores.means[key], *(bounds[key] or ())) for (_, scores), bounds in
                zip(columns, comparison.intervals, strict=True)]
        scale = max(10.0, -(-max(map(max, ends)) // 10) * 10) if metric.graded else metric.top
        yield f'<div class="panel"><h3>{label}</h3>' + "".join(
            _bar(name, number(metric, key, scores.means[key]), interval(metric, bounds[key]),
                 [100 * value / scale for value in values])
            for (name, scores), bounds, values in zip(columns, comparison.intervals, ends, strict=True)) + "</div>"
    words = {name: f"{scores.means['words']:.1f} words, " for name, scores in columns if "words" in scores.means}
    yield f'<div class="panel"><h3>{"length and " if words else ""}speed of answers</h3>' + "".join(
        f'<div class="score"><span>{name}</span><small>{words.get(name, "")}{speed_of(speed)} tokens/s</small></div>'
        for name, speed in zip(comparison.names, comparison.tokens_per_second, strict=True)) + "</div>"


def _groups(comparison: Comparison) -> str:
    """One panel a property of the rows, with a bar for the first adapter on each group; what costs most is first."""
    metric, judged, panels = comparison.metric, comparison.tuned[0], dict[str, list[str]]()
    if metric is None or not (groups := telling_groups(comparison)):
        return ""
    for group in groups:
        mean, mark = group.means[judged], '<span class="wrong"> worse</span>' if group.worse else ""
        panels.setdefault(group.by, []).append(
            f'<div class="score"><span>{_escape(group.value)}{mark}</span><span><b>'
            f'{number(metric, metric.headline, mean)}</b> <small>of {counted(group.rows, "row", "rows")}</small></span>'
            '<svg class="bar" width="100%" height="16" aria-hidden="true">'
            '<rect class="track" y="5" width="100%" height="6" rx="3"/>'
            f'<rect class="fill" y="5" width="{100 * mean / metric.top:.2f}%" height="6" rx="3"/></svg></div>')
    drawn = "".join(f'<div class="panel"><h3>by {_escape(by)}</h3>{"".join(bars[:_GROUPS])}'
                    + (f"<small>and {len(bars) - _GROUPS:,} more</small>" if len(bars) > _GROUPS else "") + "</div>"
                    for by, bars in panels.items())
    name = comparison.names[judged]
    return (f'<h2 id="groups">Where {name} still fails</h2><p class="hint">{metric.label} of {name} by groups of rows, '
            f"what costs it most first. Worse: more than chance would do.</p><section class=\"scores\" "
            f'aria-label="Groups of rows">{drawn}</section>')


def _bar(name: str, mean: str, bounds: str, ends: Sequence[float]) -> str:
    at, *bounded = ends
    low, high = bounded or (at, at)
    reach = "".join(f'<line class="reach" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{8 - half}" y2="{8 + half}"/>'
                    for x1, x2, half in ((low, high, 0), (low, low, 4), (high, high, 4)) if bounded)
    return (f'<div class="score {name}"><span>{name}</span><span><b>{mean}</b> <small>{bounds}</small></span>'
            '<svg class="bar" width="100%" height="16" aria-hidden="true">'
            '<rect class="track" y="5" width="100%" height="6" rx="3"/>'
            f'<rect class="fill" y="5" width="{at:.2f}%" height="6" rx="3"/>{reach}</svg></div>')


def _rows(comparison: Comparison) -> Iterator[str]:
    """One article a row. Lines that all prompts begin and end with are the task's frame and recede."""
    prompts = {row.prompt for row in comparison.rows}
    head = _shared(prompts).rpartition("\n")[0]
    tail = _shared({text[len(head):][::-1] for text in prompts})[::-1].partition("\n")[2]
    for n, row in enumerate(comparison.rows, 1):
        changed = "changed" if comparison.changed(row) else None
        kinds = ["all", *filter(None, [comparison.outcome(row, comparison.tuned[0]), changed])]
        middle = row.prompt[len(head):len(row.prompt) - len(tail)]
        prompt = "".join(f'<span class="frame">{_escape(part)}</span>' if at != 1 else _escape(part)
                         for at, part in enumerate((head, middle, tail.rstrip())) if part)
        cells = [_cell("prompt", "", prompt, row.prompt, n)]
        if row.reference is not None:
            cells.append(_cell("reference", "", _escape(row.reference), row.reference, n))
        for at, name in enumerate(comparison.names):
            did, kind = grade(comparison, row, at)
            badge = f'<span class="{kind}">{did}</span>' if did else ""
            cells.append(_cell(name, badge, _marked(comparison, row, at), row.answers[at], n))
        yield (f'<article class="row" id="row-{n}" data-is="{" ".join(kinds)}">'
               f'<h3><a href="#row-{n}" aria-label="row {n}">{n}</a></h3>{"".join(cells)}</article>')


def _blocks(rows: list[str]) -> Iterator[str]:
    """Many rows in blocks, each of which the browser lays out when it comes into view."""
    for first in range(0, len(rows), _BLOCK):
        some = "\n".join(rows[first:first + _BLOCK])
        yield f"<div{' class=block' if len(rows) > _BLOCK else ''}>\n{some}\n</div>"


def _shared(texts: set[str]) -> str:
    """What several texts begin with; nothing for a single one."""
    pairs = zip(min(texts), max(texts), strict=False) if len(texts) > 1 else ()
    return "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _cell(name: str, badge: str, body: str, text: str, n: int) -> str:
    long = ' long" tabindex="0" role="group" aria-label="' + f"{name} of row {n}" if (
        len(text) > 700 or text.count("\n") > 13) else ""
    return (f'<section><h4>{name}{badge}</h4><div class="text{long}" dir="auto">'
            f'{body if text.strip() else "<span class=empty>(empty)</span>"}</div></section>')


def _marked(comparison: Comparison, row: ComparedRow, at: int) -> str:
    """An answer with the words marked that its reference does not have in that place.

    What is right is not marked, nor the working of a wrong answer; what counted for its score counts here, such as
    capitals. Where its words are those of the reference, its other signs are marked.
    """
    answer, outcome = row.answers[at].strip(), comparison.outcome(row, at)
    if comparison.metric is None or row.reference is None or outcome == "right":
        return _escape(answer)
    wrong = outcome == "wrong"
    ignored = (comparison.settings.get("ignored") or "").split(", ") if wrong else ["case"]
    start = len(_working(row, at)) if wrong else 0
    tokens = _TOKEN.findall(answer[start:])
    said, wanted = ([plain(token, ignored) for token in each] for each in (tokens, _TOKEN.findall(row.reference)))
    differ = _differing(said, wanted, _WORD) or (_differing(said, wanted, _SIGN) if wrong else set())
    parts = ((marked, _escape("".join(tokens[i] for i in run)))
             for marked, run in groupby(range(len(tokens)), differ.__contains__))
    return _escape(answer[:start]) + "".join(f"<mark>{text}</mark>" if marked else text for marked, text in parts)


def _working(row: ComparedRow, at: int) -> str:
    """What an answer says before the last `=` of its first line; nothing where the reference has one, too."""
    found = _EQUALS.match(row.answers[at].strip())
    return found[0] if found and not _EQUALS.match(row.reference or "") else ""


def _differing(tokens: Sequence[str], wanted: Sequence[str], counts: re.Pattern[str]) -> set[int]:
    """The places of tokens that are not in that place of `wanted`, and of what stands between two such.

    Args:
        tokens: of an answer.
        wanted: those of its reference.
        counts: what a token begins with that is compared.
    """
    places = [i for i, token in enumerate(tokens) if counts.match(token)]
    matcher = SequenceMatcher(None, [token for token in wanted if counts.match(token)], [tokens[i] for i in places],
                              autojunk=False)
    differ = {i for kind, _, _, first, last in matcher.get_opcodes() if kind != "equal"
              for i in places[first:last]}
    between = [range(first, last) for first, last in pairwise(places) if {first, last} <= differ]
    return differ.union(*between)


def _run(comparison: Comparison) -> str:
    """The picture of the losses, the recipe, and how the answers were made."""
    picture = base64.b64encode(comparison.picture).decode()
    panels = [f'<figure class="panel"><figcaption>Loss</figcaption><img src="data:image/png;base64,{picture}" '
              'alt="training and validation loss over the steps of the run"></figure>' if picture else ""]
    for title, values in (("Recipe", comparison.recipe), ("Answers", comparison.settings)):
        pairs = "".join(f"<div><dt>{_escape(key)}</dt><dd>{_escape(text)}</dd></div>" for key, text in _flat(values))
        panels.append(f'<div class="panel"><h3>{title}</h3><dl class="facts">{pairs}</dl></div>' if pairs else "")
    return f'<h2 id="run">How it was made</h2><div class="run">{"".join(panels)}</div>' if any(panels) else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            items = value if isinstance(value, (list, tuple)) else [value]
            yield f"{prefix}{key}", ", ".join(map(str, items))
