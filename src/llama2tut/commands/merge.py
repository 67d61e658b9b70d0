"""`llama2tut merge`: base and adapter as one stand-alone model that plain transformers loads."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2tut import __version__
from llama2tut.config.requests import MergeRequest
from llama2tut.console import Console, Result
from llama2tut.errors import MachineError, UsageError
from llama2tut.files import open_to_readers, output_fault, staging, sync, writing
from llama2tut.inference.agreement import alike, answer
from llama2tut.inference.generate import Generator
from llama2tut.models.adapters import Adapter, base_of, check_fit, own_tokens, read_adapter, saved_task
from llama2tut.models.attaching import LoadedModel, load_model
from llama2tut.models.base_models import resolve
from llama2tut.models.checkpoint_files import read_json
from llama2tut.models.device import free_memory_gib, gpu_present
from llama2tut.models.loading import copy_tokenizer, load_tokenizer
from llama2tut.tasks.task import ARITHMETIC, BUILT_IN, Task
from llama2tut.tasks.tokenize import encode_prompt, prompt_text_ids

_PROMPTS = ("What is 19-59?", "Amanda: I baked cookies. Do you want some? Jerry: Sure!", "The capital of France is",
            "def add(a, b):\n", "今天天气很好，")
# In Ollama's Modelfile three quotes end a template and invisible characters are lost; braces begin an action in it.
_NOT_AS_IT_IS = re.compile(r'\{\{ \.Prompt \}\}|"(?="")|\{|[^\n\r\t -~]')
_ANSWER = 16  # tokens of an answer to each of them
_TEXTS = ("README.md", "Modelfile")
_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")  # what a merged model's folder is made of


def run(request: MergeRequest, console: Console) -> Result:
    """Add the adapter to unquantised base weights, on the CPU, and write them with tokenizer and generation settings.

    Raises:
        UserError: adapter or base model cannot be used, the folder is taken, or the disk is full.
    """
    folder, adapter = request.output_dir.absolute(), read_adapter(request.adapter)
    base_model = resolve(base_of(adapter, request.model), console.note)
    task, notes = saved_task(adapter), check_fit(adapter, base_model)
    _refuse_taken(folder, request, Path(base_model.path))
    precision = request.precision or ("bf16" if gpu_present() else "fp32")
    needed, free = base_model.parameters * (4 if precision == "fp32" else 2) / 2**30, free_memory_gib()
    say = console.note if needed < free else console.warn
    say(f"merging in {precision}: about {needed:.1f} GiB of memory ({free:.1f} are free), and as much on disk")
    for note in (*base_model.notes, *notes):
        console.warn(note)
    with staging(folder) as new, writing(request.output_dir, "merge again"):
        if (room := shutil.disk_usage(new).free / 2**30) < needed:
            raise MachineError(f"--output-dir {request.output_dir}: the model takes {needed:.1f} GiB, and the disk has "
                               f"{room:.1f} left: free some space, or give a folder on another disk")
        loaded = load_model(base_model, [adapter], quantization="none", precision=precision, device="cpu")
        # A tokenizer with tokens or an end of its own is the one that the adapter was trained with.
        own = own_tokens(adapter, base_model) or loaded.adapter_ends[0] != loaded.ends
        tokenizer = str(adapter.path) if own else base_model.path
        loaded = replace(loaded, tokenizer=load_tokenizer(tokenizer))
        prompts = _prompt_ids(loaded.tokenizer, task, base_model.positions - _ANSWER)
        known = answer(Generator(loaded), loaded.model, prompts, 0, _ANSWER)
        _merged(loaded).save_pretrained(new)
        ends = _make_readable_elsewhere(new, tokenizer, task, loaded.adapter_ends[0])
        texts = _card(adapter, task, base_model.name, ends), _modelfile(task, ends)
        for name, text in zip(_TEXTS, texts, strict=True):
            (new / name).write_text(text, encoding="utf-8")
        del loaded  # or two models would be in memory
        written = load_model(resolve(str(new)), [], quantization="none", precision=precision, device="cpu")
        if (same := alike(written.model, known, precision)) < len(known):
            raise RuntimeError(f"the merged model gives {same} of {len(known)} answers that base and adapter gave; "
                               "nothing was written")
        console.note(f"checked: base with adapter and the merged model answer {same} of {len(known)} prompts alike")
        open_to_readers(new)
        sync(new)
        _refuse_taken(folder, request, Path(base_model.path))  # once more: merging takes minutes
        if request.force and folder.exists():
            os.replace(folder, new.with_name("old"))
        os.replace(new, folder)  # which the system refuses where files have appeared
    return Result(f"{request.output_dir}\nnext: {_ask(adapter, task, str(request.output_dir))}\n")


def _ask(adapter: Adapter, task: Task | None, folder: str) -> str:
    """A command that the merged model answers, in the template of the adapter's task where there is one."""
    command = f"llama2tut infer --model {shlex.quote(folder)}"
    if task is None:
        return f'{command} --prompt "…"'
    command += f" --task {shlex.quote(adapter.request['task'])}"
    if task.name in BUILT_IN:
        return f'{command} --prompt "{_PROMPTS[0 if task == ARITHMETIC else 1]}"'
    data = adapter.request.get("data")
    return f"{command}{f' --data {shlex.quote(data)}' if data else ''} --limit 1"


def _merged(loaded: LoadedModel) -> Any:
    """The model, without a trace of PEFT.

    Output layer and embedding get weights of their own first: merged into shared ones, what one of them learned would
    be in both. They share again where that changes nothing.
    """
    import torch

    model = loaded.model
    shared = {id(weight) for weight in model.get_input_embeddings().parameters()}
    tied = False
    with torch.inference_mode():
        for layer in model.get_output_embeddings().modules():
            if id(layer._parameters.get("weight")) in shared:
                layer.weight, tied = torch.nn.Parameter(layer.weight.clone(), requires_grad=False), True
        model = loaded.peft_model.merge_and_unload(safe_merge=True)
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        model.config.tie_word_embeddings = tied and bool(embedding.weight.equal(output.weight))
    if model.config.tie_word_embeddings:
        output.weight = embedding.weight
    return model


def _prompt_ids(tokenizer: Any, task: Task | None, room: int) -> list[list[int]]:
    """What both models are asked: a few texts, in the template of the adapter's task where there is one."""
    if task is None or not task.one_text:
        return prompt_text_ids(tokenizer, list(_PROMPTS))
    return [encode_prompt(tokenizer, task, task.asking(text), room)[0] for text in _PROMPTS]


def _card(adapter: Adapter, task: Task | None, base: str, ends: Sequence[str]) -> str:
    """README.md of the merged model: what it is made of, and the prompt that it was trained to answer."""
    template = ["## Prompt", "", *_in_words(task), ""] if task else []
    return "\n".join([
        "---", "library_name: transformers", f"base_model: {json.dumps(base)}", "tags: [llama2tut, merged]", "---", "",
        f"# {adapter.path.name}, merged", "",
        f"{base} and the LoRA adapter {adapter.path.name}, added up by llama2tut {__version__}.", "", *template,
        f"An answer ends at {' or '.join(f'`{end}`' for end in ends)}.", "",
        "The base model's licence applies to the merged model too.", ""])


def _in_words(task: Task) -> list[str]:
    """How the merged model is asked, in lines of its card."""
    if task.chat:
        return ["It answers conversations in its tokenizer's chat template:", "", "```python",
                "tokenizer.apply_chat_template(messages, add_generation_prompt=True)", "```"]
    return ["It answers prompts in the template that it was trained with:", "", "```", task.prompt.rstrip("\n"), "```"]


def _modelfile(task: Task | None, ends: Sequence[str]) -> str:
    """What Ollama needs beside the GGUF file: the template, and what ends an answer."""
    text = "{{ .Prompt }}"
    if task and task.one_text:
        text = _NOT_AS_IT_IS.sub(_spelled, task.render(task.asking(text)))
    template = [f'TEMPLATE """{text}"""'] if not (task and task.chat) else []  # a chat's is read from the GGUF file
    stops = [f'PARAMETER stop "{end}"' for end in ends]  # as text: its parser knows no escapes
    return "\n".join(["FROM ./model.gguf", *template, *stops, "PARAMETER temperature 0", "PARAMETER repeat_penalty 1",
                      ""])


def _spelled(match: re.Match[str]) -> str:
    """A character as an action of Go's templates that writes it, where it would not arrive as it stands."""
    kept = len(match[0]) > 1 or (match[0].isprintable() and match[0] not in '"{')
    return match[0] if kept else f'{{{{ "\\U{ord(match[0]):08x}" }}}}'


def _make_readable_elsewhere(folder: Path, tokenizer: str, task: Task | None, ends: frozenset[int]) -> list[str]:
    """Add the tokenizer's files, rotary settings under their older names, too, and all end tokens.

    The tokenizer's files stay as they are, but for a chat template that the task brought.

    transformers 4 and llama.cpp's converters of before 2026 know neither the tokenizer class nor the place of the
    rotary base that transformers 5 saves; without the base, the model would answer nonsense there, not fail. Plain
    `generate` looks for end tokens in the generation settings alone, and llama.cpp ends at the one of the
    configuration where the tokenizer's files do not call the tokenizer's own special.

    Returns:
        The text of each end token that has one.
    """
    copy_tokenizer(tokenizer, folder)
    if task and task.chat and task.chat.template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would count for more, and older readers miss it
        settings = read_json(folder / "tokenizer_config.json") | {"chat_template": task.chat.template}
        _write(folder / "tokenizer_config.json", settings)
    written = load_tokenizer(str(folder))
    config = read_json(folder / "config.json")
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        config["rope_scaling"] = rope
    config["eos_token_id"] = written.eos_token_id
    settings = read_json(folder / "generation_config.json")
    settings["eos_token_id"] = min(ends) if len(ends) == 1 else sorted(ends)
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", settings)
    return [text for end in sorted(ends) if (text := written.decode([end]))]


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _refuse_taken(folder: Path, request: MergeRequest, base: Path) -> None:
    """Let only a folder be replaced that holds a model, nothing else, and nothing that is read from.

    Raises:
        UsageError: something would be lost.
    """
    if fault := output_fault(folder):
        raise UsageError(f"--output-dir {request.output_dir} {fault}")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output-dir {request.output_dir} is a file or a link: give a new folder")
    files = list(folder.iterdir()) if folder.exists() else []
    if files and not request.force:
        raise UsageError(f"--output-dir {request.output_dir} is not empty: give a new folder, or --force to replace "
                         "the model in it")
    model = (folder / "config.json").is_file() and all(
        file.is_file() and (file.suffix in _SUFFIXES or file.name in _TEXTS) for file in files)
    if files and (not model or folder.resolve() == base.resolve()):
        raise UsageError(f"--output-dir {request.output_dir} is the base model, or holds more than a merged model: "
                         "give a new folder")
