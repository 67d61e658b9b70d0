"""Which template a text is asked in: the one that an adapter was trained with, unless the text has it already."""

from llama2tut.console import Console
from llama2tut.errors import Faults
from llama2tut.models.adapters import Adapter
from llama2tut.tasks.task import Task
from llama2tut.tasks.task_files import is_python, load_task


def saved_task(adapter: Adapter) -> Task | None:
    """The task that an adapter was trained for, where its name leads to one with a template from here."""
    name = adapter.request.get("task")
    return None if not name or is_python(name) else Faults().attempt(load_task, name)


def own_template(adapter: Adapter, console: Console) -> str | None:
    """The name of the task whose template an adapter was trained with, if one text fills it; says what is done."""
    task = saved_task(adapter)
    if task and len(task.prompt_columns) == 1:
        console.note(f"task: {task.name}, whose template {adapter.path} was trained with; --raw leaves it out")
        return str(adapter.request["task"])
    if name := adapter.request.get("task"):
        console.note(f"{adapter.path} was trained for {name}, which has no template here that one text fills: the text "
                     "is asked as it is")
    return None


def asked(task: Task, text: str) -> dict[str, str]:
    """The row that asks a text, or the part of it that fills the template where it is in it already.

    A text file ends in a newline that no cell of the training rows had.
    """
    text = text.rstrip("\r\n")
    head, _, tail = task.prompt.partition(f"{{{task.prompt_columns[0]}}}")
    tail = tail.rstrip("\r\n")
    if head.strip() and text.startswith(head) and text.endswith(tail):
        text = text[len(head):len(text) - len(tail)]
    return task.asking(text)
