"""Untrusted YAML -> plain values with their line numbers: no tags, anchors, duplicate keys or surprising sizes."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama2tut.errors import UsageError
from llama2tut.files import read_input

_LARGEST = 200_000  # bytes; the longest recipe that ships has under 2,000
_LARGEST_RUN = 4 * 2**20  # of a saved run, which has a line for each data file: room for 25,000 of them
RUN_NAME = "llama2tut.yaml"
_TEXT = "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class YamlFile:
    """A YAML mapping.

    Attributes:
        path: where it was read.
        values: top-level key -> value.
        lines: key -> line, from 1; keys below the top are dotted (`request.lr`).
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def at(self, key: str) -> str:
        """`FILE:LINE` of a key, or of the key that it lies in, for messages."""
        return f"{self.path}:{self.lines.get(key) or self.lines[key.partition('.')[0]]}"

    def section(self, key: str) -> "YamlFile":
        """The mapping below a key, or an empty one."""
        values = self.values.get(key)
        lines = {name.removeprefix(f"{key}."): line for name, line in self.lines.items() if name.startswith(f"{key}.")}
        return YamlFile(self.path, values if isinstance(values, dict) else {}, lines)


class _PlainLoader(yaml.SafeLoader):
    """YAML without anchors, aliases and tags; dates are text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[tuple[int, str]] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # in PyYAML's stubs, as below
        if event.anchor or getattr(event, "tag", None):
            self.faults.append((event.start_mark.line + 1,
                                "anchors, aliases and tags are not read; write the plain value"))
            if isinstance(event, yaml.AliasEvent):
                alias: Any = self.get_event()  # type: ignore[no-untyped-call]
                return yaml.ScalarNode(_TEXT, "", alias.start_mark, alias.end_mark)
        return super().compose_node(parent, index)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "float", "int", "null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def read_yaml(path: Path) -> YamlFile:
    """A file's top-level mapping.

    Raises:
        UsageError: missing, unreadable, too large, not UTF-8, not YAML, not a mapping, or with tags, anchors
            or duplicate keys; every such place is named with its line.
    """
    try:
        data = read_input(path, _LARGEST_RUN if path.name == RUN_NAME else _LARGEST)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EFBIG:
            raise UsageError(f"{path}: {reason} are no configuration; give the YAML file itself") from None
        raise UsageError(f"{path}: cannot be read ({reason}); give a YAML file that exists") from None
    try:
        values, lines = plain_values(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; give a YAML text file") from None
    except UsageError as error:
        raise UsageError(*(f"{path}:{fault}" for fault in error.faults)) from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds no `key: value` lines; write at least one")
    return YamlFile(path, values, lines)


def plain_values(text: str) -> tuple[Any, dict[str, int]]:
    """What a YAML text holds, and the line of each key (dotted where it is nested).

    Raises:
        UsageError: one fault a place, as `LINE: what is wrong; what to do`.
    """
    lines: dict[str, int] = {}
    try:
        loader = _PlainLoader(text)
        root = loader.get_single_node()
        if root:
            _look_through(root, "", lines, loader.faults)
        if loader.faults:
            raise UsageError(*(f"{line}: {fault}" for line, fault in sorted(loader.faults)))
        return loader.construct_document(root) if root else None, lines
    except RecursionError:
        raise UsageError("1: nested too deeply; write plain `key: value` lines") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\\UFFFFFFFF" is beyond what a character can be
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        if "unknown escape character" in problem:
            problem += ": in double quotes a backslash begins an escape; put the text into single quotes"
        raise UsageError(f"{line + 1}: {problem}; mend the YAML there") from None


def _look_through(node: yaml.Node, prefix: str, lines: dict[str, int], faults: list[tuple[int, str]]) -> None:
    """Note the line of each key, and a fault for each that stands twice in one mapping or is no word."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _look_through(item, f"{prefix}{number}.", lines, faults)
    seen = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            faults.append((line, "a key must be a word; write `key: value`"))
            continue
        if key.value in seen:
            faults.append((line, f"{key.value} stands twice; keep one of them"))
        seen.add(key.value)
        key.tag = _TEXT  # `on`, `1` and `null` are words where a key stands
        lines[f"{prefix}{key.value}"] = line
        _look_through(value, f"{prefix}{key.value}.", lines, faults)
