"""A task by name, or from a YAML file:

    prompt: "Translate to French:\\n{english}\\n---\\nFrench:\\n"   # {column} stands for a cell
    target: french            # the column that is trained on
    reference: french         # the column that answers are scored against [target]
    metric: rouge             # how answers are scored: a name in `metrics.METRICS`, or none [the first there]
    extract: '"(.*)"'         # of answers and references, its group or all it matches is compared [the whole]
    ignore: [case, width]     # differences that do not count: case, punctuation, width, whitespace [none]
    shorten: english          # the column that is cut at its front in over-long rows [none: such rows are refused]
    max_new_tokens: 64        # longest answer [128]
    data: my-rows.csv         # where rows are, unless --data says so [none]
    encoding: cp1252          # of text files [UTF-8, or what their BOM says]
    sheet: Tickets            # of an .xlsx [the first]
    recipe: arithmetic        # recipe to start from: `samsum` means samsum-cpu or samsum-24gb [samsum]

Without `prompt` and `target`, rows are conversations (`messages`, or ShareGPT's `conversations`):

    chat_template: my.jinja   # file with the chat template that renders them [the base model's own]
    train_on: last            # all assistant turns, or the last alone [all]
    metric: rouge             # these keys, and the others, as above
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2tut.config.coercion import did_you_mean
from llama2tut.config.yaml_files import YamlFile, read_yaml
from llama2tut.errors import UsageError
from llama2tut.files import read_input
from llama2tut.tables.reading import kind
from llama2tut.tasks.metrics import IGNORED, METRICS
from llama2tut.tasks.sources import SAMPLES, SUFFIXES
from llama2tut.tasks.task import BUILT_IN, CHAT, SAMSUM, Chat, Extractor, Task, whole_answer

_KEYS = {"prompt": str, "target": str, "reference": str, "metric": str, "extract": str, "ignore": list, "shorten": str,
         "max_new_tokens": int, "data": str, "recipe": str, "encoding": str, "sheet": str, "chat_template": str,
         "train_on": str}
_OF_PROMPTS, _OF_CHATS = ("target", "reference", "shorten"), ("chat_template", "train_on")
_WANTS = {str: "text", int: "a whole number above 0", list: f"some of [{', '.join(IGNORED)}]"}
_LONGEST_PATTERN = 500
_LONGEST_CODE = 10_000_000  # bytes of a Python task
_FUNCTION = "get_custom_dataset"  # what llama-recipes calls where a Python task names none
# Meant for a column's cell, it seems: {{message}} or { message }.
_ALMOST = re.compile(r"\{\{\s*\w[\w .-]*\}\}|\{\s+\w[\w .-]*\}|\{\w[\w .-]*\s+\}")


def load_task(name: str) -> Task:
    """The task called `name`, or the one that a `.yaml` file describes.

    Raises:
        UsageError: neither; or everything that is wrong with the file, by line.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if kind(name) in SUFFIXES or name in SAMPLES or os.path.isdir(name):
        raise UsageError(f"--task {name}: this is data, which a task reads; give it as --data {name}, and as --task "
                         f"one of {', '.join(BUILT_IN)} or a TASK.yaml that names its columns")
    if not name.endswith((".yaml", ".yml")):
        raise UsageError(f"--task {name}: there is no such task{did_you_mean(name, BUILT_IN)}; "
                         f"give {', '.join(BUILT_IN)} or a TASK.yaml")
    return _task(read_yaml(Path(name)))


def is_python(task: str) -> bool:
    """Whether a task is a Python file with a function that llama-recipes loads by path."""
    return task.partition(":")[0].endswith(".py")


def task_path(task: str) -> Path:
    """The file of a task of one's own, without the function that may stand behind a Python one."""
    return Path(task.partition(":")[0] if is_python(task) else task)


def recipe_name(task: str, device: str) -> str:
    """The recipe that a task starts from on a device (`cuda` or `cpu`).

    Raises:
        UsageError: there is no such task, or its file is not right.
    """
    if is_python(task):
        check_python(task)
    recipe = SAMSUM.recipe if is_python(task) else load_task(task).recipe
    return f"{recipe}-{'24gb' if device == 'cuda' else 'cpu'}"


def task_digest(name: str) -> dict[str, str]:
    """The files of a task of one's own and their sha256, its chat template's too; nothing for a built-in task."""
    if name in BUILT_IN:
        return {}
    paths = [task_path(name)]
    if not is_python(name) and (template := read_yaml(paths[0]).values.get("chat_template")):
        paths.append(Path(template))
    return {str(path): hashlib.sha256(read_input(path)).hexdigest() for path in paths}


def check_python(task: str) -> None:
    """See that `FILE.py` or `FILE.py:function` has its function, without running it.

    Raises:
        UsageError: the file cannot be read, is not Python, or nothing in it has the function's name.
    """
    path, _, function = task.partition(":")
    function = function or _FUNCTION
    try:
        nodes = list(ast.walk(ast.parse(read_input(Path(path), _LONGEST_CODE))))
    except OSError as error:
        raise UsageError(f"--task {path} cannot be read ({error.strerror}); name a Python file that exists") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UsageError(f"{path}:{line}: {getattr(error, 'msg', error)}; mend the file") from None
    names = {getattr(node, "asname", None) or getattr(node, "name", None) or getattr(node, "id", "") for node in nodes}
    if names.isdisjoint({function, "*"}):
        raise UsageError(f"--task {path} has no function {function}; define it, or name another, as {path}:FUNCTION")


def _task(file: YamlFile) -> Task:
    values: dict[str, Any] = file.values
    faults = [f"{file.at(key)}: {key} is no key of a task{did_you_mean(key, _KEYS)}; use {', '.join(_KEYS)}"
              for key in values if key not in _KEYS]
    faults += [f"{file.at(key)}: {key} wants {_WANTS[kind]}; mend the value"
               for key, kind in _KEYS.items() if key in values and not _fits(values[key], kind)]
    faults += _kind_faults(values, file)
    if faults:
        raise UsageError(*faults)
    metric = values.get("metric", next(iter(METRICS)))
    if metric not in (names := (*METRICS, "none")):
        faults.append(f"{file.at('metric')}: metric {metric} is none of {', '.join(names)}; name one of them")
    pattern = values.get("extract")
    try:
        extract = _pattern_extractor(pattern) if pattern else whole_answer
    except ValueError as error:
        faults.append(f"{file.at('extract')}: {error}; mend the pattern")
        extract = whole_answer
    chat, prompt, target = None, values.get("prompt", CHAT.prompt), values.get("target", CHAT.target)
    if "prompt" not in values:
        chat = Chat(_read_template(values, file, faults), values.get("train_on", "all"))
    task = Task(name=file.path.stem, prompt=prompt, target=target, reference=values.get("reference", target),
                metric=metric, extract=extract, shorten=values.get("shorten"),
                max_new_tokens=values.get("max_new_tokens", CHAT.max_new_tokens if chat else 128),
                default_data=values.get("data"), encoding=values.get("encoding"), sheet=values.get("sheet"),
                recipe=values.get("recipe", SAMSUM.recipe),
                notes=() if chat else tuple(_odd(prompt, file.at("prompt"))), chat=chat,
                ignore=tuple(values.get("ignore", ())), at={key: file.at(key) for key in values})
    try:
        " ".encode(task.encoding or "utf-8")
    except (LookupError, UnicodeError):  # or of something other than text, such as zip
        faults.append(f"{file.at('encoding')}: there is no encoding {task.encoding}; name one as Python does, such as "
                      "cp1252, gb18030 or utf-16")
    recipes = sorted({each.recipe for each in BUILT_IN.values()})
    if task.recipe not in recipes:
        faults.append(f"{file.at('recipe')}: there is no recipe {task.recipe}; name one of {', '.join(recipes)}")
    if not task.prompt_columns:
        faults.append(f"{file.at('prompt')}: the prompt names no column; put one in braces, as in {{question}}")
    if task.target in task.prompt_columns:
        faults.append(f"{file.at('prompt')}: the prompt shows the target {{{task.target}}}; take it out of the prompt")
    if faults:
        raise UsageError(*faults)
    return task


def _kind_faults(values: Mapping[str, Any], file: YamlFile) -> Iterator[str]:
    """What a task with a prompt lacks or has too much, or one without, whose rows are conversations."""
    if "prompt" in values:
        if "target" not in values:
            yield f"{file.path}: target is missing; add a line `target: …`"
        yield from (f"{file.at(key)}: {key} is for conversations, which need no prompt; leave one of the two out"
                    for key in _OF_CHATS if key in values)
    elif lone := [key for key in _OF_PROMPTS if key in values]:
        yield (f"{file.path}: prompt is missing; add a line `prompt: …`, or for conversations leave "
               f"{' and '.join(lone)} out too")
    elif (trained := values.get("train_on", "all")) not in ("all", "last"):
        yield f"{file.at('train_on')}: train_on {trained} is neither all nor last; name one of them"


def _read_template(values: Mapping[str, Any], file: YamlFile, faults: list[str]) -> str | None:
    """The text of the chat template that a task file names, if it names one."""
    path = values.get("chat_template")
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, ValueError) as error:
        faults.append(f"{file.at('chat_template')}: {path} cannot be read ({error}); name a file with a Jinja template")
        return None


def _odd(prompt: str, at: str) -> Iterator[str]:
    """What a template says that its writer may not mean."""
    for almost in dict.fromkeys(_ALMOST.findall(prompt)):
        name = almost.strip("{} ")
        yield (f"{at}: {almost} is more than the cell of {name}: braces and spaces stay in the prompt; for the cell "
               f"alone write {{{name}}}")
    if "\\n" in prompt:
        yield f"{at}: \\n is two characters here; in double quotes it is a line break"


def _fits(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if kind is list:
        return isinstance(value, list) and all(each in IGNORED for each in value)
    return isinstance(value, str) and bool(value.strip())


def _pattern_extractor(pattern: str) -> Extractor:
    """The first group of a pattern that takes part (the whole match where it has none), or None without a match."""
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters is too long")
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern does not compile ({error})") from None

    def extract(text: str) -> str | None:
        match = compiled.search(text)
        groups = (match.groups() or (match[0],)) if match else ()
        return next((group.strip() for group in groups if group is not None), None)

    return extract


def default_output_dir(task: str) -> Path:
    """`outputs/TASK`; for a file, its name without the ending, and the function that may be named."""
    name, function = task_path(task), task.partition(":")[2] if is_python(task) else ""
    stem = name.stem if name.suffix in (".py", ".yaml", ".yml") else name.name
    return Path("outputs") / (f"{stem}-{function}" if function not in ("", _FUNCTION) else stem)
