"""A task is data: a prompt template, the column it is answered with, how an answer is read, and a metric.

To change what the model is asked, change `prompt` below; training and inference both render it from here.

    >>> ARITHMETIC.render({"instruction": "What is 19-59?"})
    'Calculate the following expression:\\nWhat is 19-59?\\n---\\nAnswer:\\n'
    >>> ARITHMETIC.extract("19 - 59 = -40\\nand more")
    '-40'
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unicodedata import decimal

from llama2tut.config.coercion import nearest

Extractor = Callable[[str], str | None]
_PLACEHOLDER = re.compile(r"\{(\w(?:[\w .-]*\w)?)\}")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Chat:
    """How conversations are rendered, and what of them is trained on.

    Attributes:
        template: a Jinja chat template; None for the base model's own.
        trained: all assistant turns, or the last one alone.
    """

    template: str | None = None
    trained: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class Task:
    """How rows become prompts and answers become scores.

    Attributes:
        name: what `--task` is given.
        prompt: template; `{column}` stands for a row's cell.
        target: the column that is trained on, after the prompt and before eos.
        reference: the column that answers are scored against.
        metric: how answers are scored: a name in `metrics.METRICS`, or `none`.
        extract: answer or reference -> the part of it that is compared, or None.
        ignore: differences that do not count: some of `metrics.IGNORED`.
        unread: columns that other trainers read of such rows, and that are left out here.
        shorten: the column cut at its front when a row is longer than the context, or None.
        max_new_tokens: how long an answer may get, in tokens.
        default_data: where rows come from when `--data` is not given: a folder, a hub id, or None.
        recipe: the recipe's name before its device suffix (`arithmetic` -> `arithmetic-cpu`).
        notes: what is odd about it, one warning each.
        bare_prompt: in place of `prompt` where a row has nothing in the columns that only `prompt` names, or "".
        encoding, sheet: of text files and of workbooks, where it is not UTF-8 and the first.
        chat: for conversations: the prompt's column `messages` is JSON of the turns before the answer; None otherwise.
        at: key of its file -> FILE:LINE, for messages; empty for a task that has none.
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
    bare_prompt: str = ""
    encoding: str | None = None
    sheet: str | None = None
    chat: Chat | None = None
    ignore: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    at: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that the template names, in order, each once."""
        return tuple(dict.fromkeys(_PLACEHOLDER.findall(self.prompt)))

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Those of the prompt's columns that a row may do without."""
        needed = _PLACEHOLDER.findall(self.bare_prompt or self.prompt)
        return tuple(column for column in self.prompt_columns if column not in needed)

    @property
    def one_text(self) -> bool:
        """Whether one text fills the prompt, as `asking` does: it needs one column, or it is a conversation."""
        return len(self.prompt_columns) - len(self.optional_columns) == 1

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that a row must have: the prompt's, the target and the reference."""
        return tuple(dict.fromkeys((*self.prompt_columns, self.target, self.reference)))

    def lacking(self, label: str, there: Sequence[str]) -> list[str]:
        """What the table `label` with the columns `there` lacks, one message for each line of the task's file."""
        lacks = [column for column in self.columns if column not in (*there, *self.optional_columns)]
        names, free = ", ".join(map(repr, there)), [column for column in there if column not in self.columns]
        if lacks and not self.at:
            return [f"{label}: no column {', '.join(map(repr, lacks))} (there: {names}; task {self.name} needs "
                    f"{', '.join(map(repr, self.columns))}); rename them, or describe yours in a TASK.yaml"]
        faults = []
        for column in lacks:
            key = ("prompt" if column in self.prompt_columns else "target" if column == self.target else "reference")
            near = nearest(column, free)
            meant = f"did you mean {f'{{{near}}}' if key == 'prompt' else near}?" if near else "name one that is there"
            faults.append(f"{self.at[key]}: {key}: {label} has no column {column!r} (there: {names}); {meant}")
        return faults

    def misplaced_shorten(self) -> list[str]:
        """That `shorten` names a column which the prompt does not show, if it does."""
        if not self.shorten or self.shorten in self.prompt_columns:
            return []
        return [f"{self.at.get('shorten', f'task {self.name}')}: shorten: {self.shorten} is no column of the prompt; "
                f"name one of {', '.join(self.prompt_columns)}"]

    def render(self, row: Mapping[str, str]) -> str:
        """The prompt for one row. Cells are put in as they are: braces in them are never filled again."""
        if self.chat:  # for people; the model gets what the chat template makes of the turns
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns(row))
        optional = self.optional_columns
        bare = optional and not any(row[column].strip(" \n\r\t\0") for column in optional)
        return _PLACEHOLDER.sub(lambda match: row[match[1]], self.bare_prompt if bare else self.prompt)

    def asking(self, text: str) -> dict[str, str]:
        """The row that asks one text: in the one column that a prompt needs, or as a user's turn."""
        cell = _as_json([{"role": "user", "content": text}]) if self.chat else text
        return {column: "" if column in self.optional_columns else cell for column in self.prompt_columns}


def turns(row: Mapping[str, str]) -> list[dict[str, Any]]:
    """The turns of a chat row before its answer, each with `role` and `content`; `weight` 0 where it is not trained."""
    found: list[dict[str, Any]] = json.loads(row["messages"])
    return found


def chat_cells(conversation: Any, system: Any = None, tools: Any = None) -> dict[str, str]:
    """A conversation as cells: `messages`, JSON of the turns before the last assistant's, and that one as `answer`.

    Assistant turns of weight 0, as OpenAI marks those that are not to be trained on, are no answers.

    Args:
        conversation: a list of {role, content} or {from, value}, or JSON of one.
        system: the first turn's text, where it stands beside the conversation.
        tools: what stands there as the tools that the model may call.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(conversation, str):
        try:
            conversation = json.loads(conversation)
        except (ValueError, RecursionError):
            raise ValueError("no JSON list of turns") from None
    if not isinstance(conversation, list) or not all(isinstance(turn, Mapping) for turn in conversation):
        raise ValueError("no list of turns")
    if tools and tools != "[]":
        raise ValueError("tools beside it, which cannot be trained on here")
    found = [_turn(turn) for turn in conversation]
    if isinstance(system, str) and system.strip() and found[:1] and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    answers = [number for number, turn in enumerate(found) if turn["role"] == "assistant" and "weight" not in turn]
    if not answers or not answers[-1]:
        raise ValueError("no assistant turn after another one")
    return {"messages": _as_json(found[:answers[-1]]), "answer": found[answers[-1]]["content"]}


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role in ("tool", "function", "observation", "function_call") or turn.get("tool_calls"):
        raise ValueError("a tool turn, which cannot be trained on here")
    if role not in _ROLES:
        raise ValueError(f"a turn whose role is {str(role)[:40]!r}, not system, user or assistant")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ValueError("a turn without text")
    untrained = {"weight": 0} if _ROLES[role] == "assistant" and turn.get("weight") == 0 else {}
    return {"role": _ROLES[role], "content": content, **untrained}


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Digits, those of thousands apart or not: 1234, 1,234, 1 234.
_NUMBER = r"([-+−–‐‑‒﹣－＋]?)\s*(\d{1,3}(?:([,'’ \u00a0\u2009\u202f])\d{3})(?:\3\d{3})*|\d+)"
_WHOLE = re.compile(rf"{_NUMBER}(?:\s*[Rr]\s*(\d+))?[.。]?")


def arithmetic_answer(text: str) -> str | None:
    """The number that an arithmetic answer gives: all of its first line, or all that is behind the last `=` there.

    One whole number, its sign in any form, thousands set apart or not, a remainder (`4 R 3`) or `undefined` in its
    place, and a full stop: anything else beside it, and there is no answer.
    """
    said = re.split("[=＝]", text.strip().split("\n", 1)[0])[-1].strip()
    if said.lower().rstrip(".。") == "undefined":
        return "undefined"
    match = _WHOLE.fullmatch(said)
    if match is None:
        return None
    number, remainder = (("".join(str(decimal(char)) for char in part or "" if char.isdecimal()).lstrip("0") or "0")
                         for part in match.group(2, 4))
    sign = "-" * (match[1] not in ("", "+", "＋") and number != "0")
    return f"{sign}{number}" + (f" R {remainder}" if match[4] else "")


def whole_answer(text: str) -> str:
    """The text without surrounding white space."""
    return text.strip()


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

CHAT = Task(
    name="chat",
    prompt="{messages}",
    target="answer",
    reference="answer",
    metric="rouge",
    extract=whole_answer,
    max_new_tokens=256,
    recipe="samsum",
    chat=Chat(),
)

# The two templates that instruction data in Stanford Alpaca's form is trained with everywhere.
_ALPACA = ("Below is an instruction that describes a task{}. Write a response that appropriately completes the "
           "request.\n\n### Instruction:\n{{instruction}}\n\n{}### Response:\n")
ALPACA = Task(
    name="alpaca",
    prompt=_ALPACA.format(", paired with an input that provides further context", "### Input:\n{input}\n\n"),
    bare_prompt=_ALPACA.format("", ""),
    target="output",
    reference="output",
    metric="rouge",
    extract=whole_answer,
    max_new_tokens=256,
    shorten="input",
    recipe="samsum",
    unread=("system", "history"),
)

BUILT_IN = {task.name: task for task in (ARITHMETIC, SAMSUM, CHAT, ALPACA)}
