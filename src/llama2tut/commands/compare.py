"""`llama2tut compare`: the same prompts answered by the base model and by each adapter, from one load of the base."""

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llama2tut.config.requests import ONE_CALL, CompareRequest
from llama2tut.config.runs import package_versions
from llama2tut.config.votes import read_votes
from llama2tut.console import Console, Result, counted, visible
from llama2tut.distributed import ranks
from llama2tut.distributed.launch import StartRanks
from llama2tut.errors import Faults, MachineError, UsageError
from llama2tut.files import output_fault, write_output, writing
from llama2tut.inference.columns import (
    LANGUAGES,
    Asked,
    Forgetting,
    Models,
    answers_folder,
    measure_forgetting,
)
from llama2tut.inference.config import InferenceConfig, prompt_ids, resolve_inference
from llama2tut.inference.generate import Answers
from llama2tut.inference.groups import label_rows
from llama2tut.inference.outside import Server, find_server, read_answers, read_prompts
from llama2tut.inference.sampling import Sampling
from llama2tut.inference.shots import few_shot_ids, first_answer
from llama2tut.models.adapters import newest_adapter
from llama2tut.models.device import ranks_to_start
from llama2tut.models.loading import load_tokenizer
from llama2tut.reports import exports, markdown, page, table, wording
from llama2tut.reports.card import card_scores
from llama2tut.reports.comparison import Column, ComparedRow, Comparison
from llama2tut.tasks.metrics import Metric, Scores, metric_of, score
from llama2tut.tasks.tokenize import chat_texts, ids_as_read

_LARGEST_PICTURE = 2**21  # bytes; a run draws about 40 kB


def run(request: CompareRequest, console: Console) -> Result:
    """Compare, render, and check the gates.

    Raises:
        UserError: what is wrong with models, rows or flags, before weights are loaded.
    """
    faults = Faults()
    prompts = faults.attempt(read_prompts, request.prompt_file) if request.prompt_file else None
    prompts = prompts and prompts[:request.limit]
    adapters = request.adapter or faults.attempt(lambda: (newest_adapter(),)) or ()
    if len({os.path.realpath(path) for path in adapters}) < len(adapters):
        faults.append("--adapter names one folder twice; give each once")
    if request.prompt_file:
        faults.attempt(wording.check_show, request.show or "all", None)
    faults.attempt(_check_output, request.output)
    votes = faults.attempt(read_votes, request.votes) if request.votes else None
    count = faults.attempt(ranks_to_start, request.gpus) or 1
    faults.refuse()
    aside = Console(err=io.StringIO()) if count > 1 else console  # the first of the ranks says it all
    config = resolve_inference(request, adapters, prompts, aside,
                               template=prompts is not None and bool(request.task))
    if prompts and not request.task:
        aside.note("the prompts are asked as they are; --task puts them into a task's template")
    if votes:
        faults.attempt(votes.check_prompts, config.prompts)
    metric = metric_of(config.task) if config.rows else None
    faults.attempt(wording.check_show, request.show or "all", metric)
    faults.attempt(_check_scored, request, metric)
    labels = faults.attempt(label_rows, config.task, config.rows, request.by) if config.task and metric else None
    server, files = _outside(request, config.prompts, faults)
    faults.refuse()
    if count > 1:
        return StartRanks(count=count)
    comparison = compare(config, labels or [], request, console, server, files)
    if ranks.rank() > 0:
        return Result()  # rank 0 has all answers, too
    if votes:
        comparison = comparison.with_votes(votes)
    width = shutil.get_terminal_size().columns
    shown = _render("table", comparison, request, width, console)
    if request.output:
        _write(request.output, _render(request.format, comparison, request, width, console), console)
        console.note(f"written: {request.output}")
    else:
        shown = _render(request.format, comparison, request, width, console)
        if request.format != "table" and console.out.isatty():
            shown = visible(shown)  # the table has seen to that itself: its colours are its own
    own = all(getattr(request, name) is None for name in ("model", "task", "data", "limit", "max_new_tokens",
                                                          "quantization", "precision"))
    if metric and own and request.split == "test":
        _note_scores(comparison, config, console)
    return Result(shown, 3 if _gates(comparison, request, console) else 0)


def _note_scores(comparison: Comparison, config: InferenceConfig, console: Console) -> None:
    """Write the scores into the model cards, unless a warning says that they may not mean what they seem to."""
    if config.cautions:
        console.note("model cards keep the scores that they have, because of these warnings")
        return
    try:
        card_scores(comparison)
    except MachineError as error:  # a folder of someone else's, say; the answers are what was asked for
        console.warn(str(error))


def _outside(request: CompareRequest, prompts: Sequence[str],
             faults: Faults) -> tuple[Server | None, dict[Column, Answers]]:
    """The server, and the columns from files; what is wrong with them goes into `faults`."""
    server = faults.attempt(find_server, request.server, request.server_model) if request.server else None
    if request.server_model and not request.server:
        faults.append("--server-model is for --server; give that too, or leave it out")
    read = list(filter(None, (faults.attempt(read_answers, given, prompts) for given in request.answers)))
    if len({name for name, _, _ in read}) < len(read):
        faults.append("--answers has two columns of one name; give each its own, as FILE.jsonl:NAME")
    return server, {Column(name, "answers", source): answers for name, source, answers in read}


def _check_scored(request: CompareRequest, metric: Metric | None) -> None:
    """Refuse flags that go by scores where there are none, and a gate that no score passes.

    Raises:
        UsageError: there is such a flag.
    """
    needy = (("--fail-under", request.fail_under is not None), ("--fail-if-worse", request.fail_if_worse),
             ("--by", bool(request.by)))
    if metric is None and (given := [name for name, typed in needy if typed]):
        raise UsageError(f"{' and '.join(given)} must have scores; give a --task with a metric, and no --prompt-file")
    if metric and request.fail_under is not None and request.fail_under > metric.top:
        raise UsageError(f"--fail-under {request.fail_under:g} cannot be met: {metric.label} goes from 0 to "
                         f"{metric.top}; give one of these")


def _check_output(path: Path | None) -> None:
    """Refuse a file that could not be written, before anything is answered.

    Raises:
        UsageError: it is a folder, or in none that can be written.
    """
    if path and (fault := output_fault(path)):
        raise UsageError(f"--output {path} {fault}")
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--output {path} is no file in a folder that exists; give another")


def _write(path: Path, result: str, console: Console) -> None:
    """Write the result to its file; where that fails after all, to standard output: it took its time to make."""
    try:
        with writing(path, "compare again"):
            write_output(path, result)
    except MachineError:
        console.write(visible(result) if console.out.isatty() else result)
        raise


def compare(config: InferenceConfig, labels: Sequence[Mapping[str, str]], request: CompareRequest,
            console: Console, server: Server | None, files: dict[Column, Answers]) -> Comparison:
    """Answer with every column and score the answers.

    Args:
        config: what answers which prompts.
        labels: the groups that each row belongs to.
        request: what was asked.
        console: for progress.
        server: that of a further column.
        files: further columns and their answers.
    """
    tokenizer = load_tokenizer(config.base_model.path)
    ids = prompt_ids(config, tokenizer, console)
    shots = few_shot_ids(config, ids, tokenizer) if config.shots else None
    folder = answers_folder() if request.cache else None
    models = Models(config, ids, folder, console)
    served, warnings = {}, list(config.warnings)
    if server and ranks.rank() == 0:
        column = Column("server", "server", f"{server.model} at {server.url}")
        task = config.task
        texts = chat_texts(tokenizer, task, config.inputs) if task and task.chat and config.inputs else config.prompts
        if odd := sum(map(list.__ne__, ids, ids_as_read(tokenizer, texts))):
            warnings.append(f"server: {odd:,} of {len(ids):,} prompts are other tokens to it than to the models here, "
                            "which shorten long rows and take special tokens in cells for plain text")
            console.warn(warnings[-1])
        served[column] = server.answers(texts, config.max_new_tokens, folder, console)
    found = _answers(config, request, models, ids, shots) | served | files
    forgetting: dict[str, list[Forgetting]] = {}
    if request.forgetting or request.fail_if_forgets is not None:
        tuned = [column.name for column in found if column.kind == "adapter"]
        forgetting = measure_forgetting(models, tokenizer, {name: at for at, name in enumerate(tuned)}, request.seed)
    columns = [answers.texts for answers in found.values()]
    task = config.task if config.rows else None
    references = [row[task.reference] for row in config.rows] if task else None
    scores: tuple[Scores, ...] = ()
    values: Sequence[Sequence[float | None]] = [[None] * len(config.prompts) for _ in columns]
    if task and references and metric_of(task):
        scores = tuple(score(task, column, references) for column in columns)
        values = [item.headline_values for item in scores]
    rows = tuple(ComparedRow(prompt=prompt, reference=references[at] if references else None,
                             answers=tuple(column[at] for column in columns),
                             values=tuple(column[at] for column in values),
                             cut=tuple(answers.cut[at] for answers in found.values()),
                             groups=labels[at] if labels else {})
                 for at, prompt in enumerate(config.prompts))
    settings = {"split": request.split if task else None, "data": config.source, "held_out": config.held_out or None,
                "device": config.device, "quantization": config.quantization, "precision": config.precision,
                "max_new_tokens": config.max_new_tokens, "seed": request.seed, "versions": package_versions(),
                "warnings": warnings or None}
    if task and (metric := metric_of(task)):
        settings |= {"scored_on": metric.tokens or None, "ignored": ", ".join(task.ignore) or None}
    first = config.adapters[0]
    return Comparison(task=config.task.name if config.task else None, columns=tuple(found), rows=rows,
                      scores=scores, settings=settings, forgetting=forgetting,
                      tokens_per_second=tuple(answers.new_tokens / max(answers.seconds, 1e-9)
                                              for answers in found.values()),
                      recipe={key: value for key, value in first.request.items() if key not in ONE_CALL},
                      picture=_picture(first.path), seed=request.seed)


def _picture(adapter: Path) -> bytes:
    """The picture that the adapter's run has drawn of its losses; nothing where there is none."""
    try:
        with (adapter / "loss.png").open("rb") as file:
            picture = file.read(_LARGEST_PICTURE + 1)
    except OSError:
        return b""
    return picture if picture.startswith(b"\x89PNG") and len(picture) <= _LARGEST_PICTURE else b""


def _answers(config: InferenceConfig, request: CompareRequest, models: Models, ids: list[list[int]],
             shots: tuple[list[list[int]], int] | None) -> dict[Column, Answers]:
    """Each column and its answers, the base model's first; `shots` are what `few_shot_ids` gives."""
    base = config.base_model.name
    asked: list[tuple[Column, list[list[int]], int | None]] = [(Column("base", "base", base), ids, None)]
    if shots:
        examples = counted(shots[1], "worked example", "worked examples")
        asked.append((Column("few_shot", "few-shot", f"{base} with {examples} in its prompt, of {request.shots:,} "
                                                     "asked for"), shots[0], None))
    for number, adapter in enumerate(config.adapters):
        name = f"finetuned_{number + 1}" if number else "finetuned"
        asked.append((Column(name, "adapter", str(adapter.path)), ids, number))
    found = {}
    parts = models.answers([Asked(column.name if adapter is None else column.source, ranks.own(prompts)[1], adapter)
                            for column, prompts, adapter in asked],
                           Sampling(max_new_tokens=config.max_new_tokens, seed=request.seed), request.batch_size)
    for (column, _, _), part in zip(asked, parts, strict=True):
        answers = Answers(ranks.together(part.texts), ranks.together(part.cut),
                          sum(ranks.all_values(part.new_tokens)), max(ranks.all_values(part.seconds)))
        if config.task and column.kind == "few-shot":
            texts = [first_answer(config.task, text, config.shots) for text in answers.texts]
            whole = map(str.__eq__, texts, answers.texts)  # what was cut off behind the first answer is not missed
            answers = replace(answers, texts=texts, cut=[*map(bool.__and__, answers.cut, whole)])
        found[column] = answers
    return found


def _render(form: str, comparison: Comparison, request: CompareRequest, width: int, console: Console) -> str:
    if form == "html":
        return page.page(comparison)
    if form == "json":
        return exports.json(comparison)
    show = request.show or ("all" if form == "csv" else "8")
    if form == "csv":
        return exports.csv(comparison, show=show, spreadsheet_safe=request.spreadsheet_safe)
    if form == "markdown":
        return markdown.markdown(comparison, show)
    encoding = getattr(console.out, "encoding", None) or "utf-8"
    ascii_only = encoding.lower().replace("-", "") not in ("utf8", "utf16", "utf32", "gb18030")
    return table.table(comparison, show=show, width=width, ascii=ascii_only,
                        color=console.out.isatty() and "NO_COLOR" not in os.environ)


def _gates(comparison: Comparison, request: CompareRequest, console: Console) -> bool:
    """Whether a gate was not met; says which."""
    missed = False
    for at in comparison.tuned if request.fail_under is not None or request.fail_if_worse else ():
        path, scores = comparison.columns[at].source, comparison.scores[at]
        verdict = comparison.differences[at - 1].verdict
        if verdict == "too few rows":
            console.warn(f"the gates for {path} go by {scores.rows} rows, which are too few to tell; take more of them")
        if request.fail_under is not None and scores.means[scores.headline] < request.fail_under:
            console.note(f"llama2tut: gate not met: {path} has {scores.headline} "
                         f"{scores.means[scores.headline]:.6g}, under {request.fail_under:g}")
            missed = True
        if request.fail_if_worse and verdict == "worse":
            console.note(f"llama2tut: gate not met: {path} is worse than the base beyond chance")
            missed = True
    most = request.fail_if_forgets
    for name, it in ((name, it) for name, found in comparison.forgetting.items() for it in found):
        if most is not None and it.interval[0] > most:
            console.note(f"llama2tut: gate not met: {name} forgets: its loss on {LANGUAGES[it.language]} texts rose by "
                         f"{it.rise:.4g}, over {most:g} beyond chance")
            missed = True
    return missed
