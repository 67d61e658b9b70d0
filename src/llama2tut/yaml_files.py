"""Untrusted YAML -> plain values with their line numbers: no tags, anchors, duplicate keys or surprising sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama2tut.errors import UsageError

_LARGEST = 1_000_000  # bytes; the longest recipe that ships has under 2,000


@dataclass(frozen=True)
class YamlFile:
    """A YAML mapping.

    Attributes:
        path: where it was read.
        values: top-level key -> value.
        lines: top-level key -> line, from 1.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def at(self, key: str) -> str:
        """`FILE:LINE` of a key, for messages."""
        return f"{self.path}:{self.lines[key]}"


def read_yaml(path: Path) -> YamlFile:
    """A file's top-level mapping.

    Raises:
        UsageError: missing, unreadable, too large, not UTF-8, not YAML, not a mapping, or with tags, anchors
            or duplicate keys; every such place is named with its line.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise UsageError(f"{path}: {size:,} bytes are too many for a configuration; give the YAML file itself")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; give a YAML text file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason}); give a YAML file that exists") from None
    faults: list[str] = []
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
                line = token.start_mark.line + 1
                faults.append(f"{path}:{line}: anchors, aliases and tags are not read; write the plain value")
        if faults:
            raise UsageError(*faults)
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply; write plain `key: value` lines") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not a YAML text"
        raise UsageError(f"{where}: {problem}; mend the YAML there") from None
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}: holds no `key: value` lines; write at least one")
    faults = _duplicates(root, path)
    if faults:
        raise UsageError(*faults)
    values = yaml.safe_load(text)
    return YamlFile(path, {str(k): v for k, v in values.items()},
                    {str(k.value): k.start_mark.line + 1 for k, _ in root.value})


def _duplicates(node: yaml.Node, path: Path) -> list[str]:
    """A fault for each key that stands twice in one mapping, at any depth."""
    if isinstance(node, yaml.SequenceNode):
        return [fault for item in node.value for fault in _duplicates(item, path)]
    if not isinstance(node, yaml.MappingNode):
        return []
    faults, seen = [], set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            faults.append(f"{path}:{line}: a key must be a word; write `key: value`")
        elif key.value in seen:
            faults.append(f"{path}:{line}: {key.value} stands twice; keep one of them")
        seen.add(str(key.value))
        faults += _duplicates(value, path)
    return faults
