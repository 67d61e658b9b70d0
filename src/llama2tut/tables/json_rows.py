"""Json: a list of objects, one object after another, on a line each or not, or one object that holds the list."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, BinaryIO

from llama2tut.errors import DataError
from llama2tut.tables.table import CONVERSATIONS, NumberedRow, Reading, Table, numbered
from llama2tut.tables.text import open_text

# Numbers stay the text they are written as: 1.50 is not 1.5, and 5,000 digits are no error.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda name: None)
_CHUNK = 2**18  # characters
_CUT = 16  # how far from its end, in characters, a text shows that it was cut: `\u12` begins an escape, `tr` is true
_SPACE = re.compile(r"[ \t\n\r]*")


def read_json(label: str, file: BinaryIO, reading: Reading) -> Table:
    """The table in a json or jsonl file; its text says which of both it is."""
    text, encoding = open_text(label, file, reading.encoding, newline="\n")  # U+2028 may stand in a string
    values, how = _Values(label, text), [encoding]
    if values.peek() == "[":
        return _table(label, values.listed(), how)
    first = list(islice(one_after_another := values.one_after_another(), 2))
    if len(first) == 1 and (name := _only_list(first[0][1])):
        return _table(label, _emptied(first.pop()[1][name]), [*how, f"its list {name!r}"])
    return _table(label, chain(first, one_after_another), how)


def _table(label: str, values: Iterable[tuple[int, Any]], how: list[str]) -> Table:
    columns: dict[str, None] = {}

    def rows() -> Iterator[NumberedRow]:
        wrong = []
        for number, row in values:
            if isinstance(row, dict):
                columns.update(dict.fromkeys(row))
                yield number, row
            else:
                wrong.append(number)
        if wrong:
            raise DataError(f"{label}: {numbered(wrong)}: no object; make each row an object of columns and cells")

    return Table(label, columns, rows(), tuple(how))


def _only_list(value: Any) -> str | None:
    """The name of the one list of objects in an object that is no row itself, as in `{"data": [...]}`."""
    if not isinstance(value, dict) or any(name in value for name in CONVERSATIONS):
        return None
    names = [name for name, item in value.items()
             if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)]
    return names[0] if len(names) == 1 else None


def _emptied(items: list[Any]) -> Iterator[tuple[int, Any]]:
    """The items of a list and their numbers; it lets them go one by one."""
    number = 0
    items.reverse()
    while items:
        number += 1
        yield number, items.pop()


class _Values:
    """The json values of a text, of which no more is held than the value at hand and some characters behind it."""

    def __init__(self, label: str, text: io.TextIOWrapper) -> None:
        self._label, self._text = label, text
        self._held, self._at = "", 0
        self._line = self._column = 1  # of the place `_at`

    def listed(self) -> Iterator[tuple[int, Any]]:
        """The items of a list that begins here, numbered from 1; nothing may stand behind it."""
        self._move(self._at + 1)
        number = 0
        while self.peek() != "]" or number:
            number += 1
            yield number, self._value()
            if self.peek() != ",":
                break
            self._move(self._at + 1)
        if self.peek() != "]":
            raise self._fault("Expecting ',' delimiter", self._at)
        self._move(self._at + 1)
        if self.peek():
            raise self._fault("Extra data", self._at)

    def one_after_another(self) -> Iterator[tuple[int, Any]]:
        """All values to the end of the text, each with the line on which it begins."""
        while self.peek():
            yield self._line, self._value()

    def peek(self) -> str:
        """The next character that is no space, to which it moves; "" at the end."""
        while True:
            self._move(_SPACE.match(self._held, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read_on():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
                if end < len(self._held) or not self._read_on():  # a number may go on
                    self._move(end)
                    return value
            except json.JSONDecodeError as error:
                inside = error.pos + _CUT < len(self._held) and not error.msg.startswith("Unterminated")
                if inside or not self._read_on():
                    raise self._fault(error.msg, error.pos) from None
            except RecursionError:
                raise DataError(f"{self._label}: line {self._line}: nested too deep; a row is one object with text in "
                                "it") from None

    def _read_on(self) -> bool:
        """Hold twice as much of the text from here on; whether there was more."""
        more = self._text.read(max(_CHUNK, len(self._held) - self._at))
        if more:
            self._held, self._at = self._held[self._at:] + more, 0
        return bool(more)

    def _move(self, place: int) -> None:
        self._line, self._column = self._seen(place)
        self._at = place

    def _seen(self, place: int) -> tuple[int, int]:
        """The line and the column of a place that is held."""
        lines = self._held.count("\n", self._at, place)
        if lines:
            return self._line + lines, place - self._held.rindex("\n", self._at, place)
        return self._line, self._column + place - self._at

    def _fault(self, message: str, place: int) -> DataError:
        before = self._held[self._at:place]
        end = before.find("\n", len(before.rstrip()))  # what is missing is missed on the line before
        line, column = self._seen(place if end < 0 else self._at + end)
        begun = f", in what begins on line {self._line}" if line > self._line else ""
        return DataError(f"{self._label}: line {line}, column {column}{begun}: {message}; mend it: a list of "
                         "objects, or one object a line")
