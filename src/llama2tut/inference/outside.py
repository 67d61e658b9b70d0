"""What comes from outside: prompts and answers in files, and answers of a server that speaks OpenAI's protocol."""

import ipaddress
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib import error, parse, request

from llama2tut import __version__
from llama2tut.console import Console
from llama2tut.errors import DataError, MachineError, UsageError
from llama2tut.files import read_input
from llama2tut.inference.columns import Kept
from llama2tut.inference.generate import Answers
from llama2tut.tables.reading import kind
from llama2tut.tables.table import cell_text
from llama2tut.tasks.metrics import METRICS

KEY = "LLAMA2TUT_SERVER_KEY"  # of the environment: what is typed can be seen in the list of processes
_LARGEST = 256 * 2**20  # bytes of a file
_LARGEST_REPLY = 16 * 2**20  # bytes
_AT_ONCE = 8  # requests
_PAUSES = (1, 4)  # seconds before the second and the third try
_PATIENCE = 300  # seconds for one answer
_LASTS = 600  # seconds that answers are kept after a fault: longer, and another model may have taken the server's name
_SCORES = "|".join(name for metric in METRICS.values() for name in metric.labels)
# As other columns and scores are called.
_TAKEN = re.compile(rf"prompt|reference|groups|cut|tie|base|few_shot|server|finetuned(_\d+)?|\w+_({_SCORES})")


def read_prompts(path: Path) -> list[str]:
    """A text file, less its last line's end, is one prompt; a .jsonl has one object with `prompt` a line.

    Raises:
        DataError: the file cannot be read, or a line is no such object; file and line are named.
    """
    if kind(path.name) in (".jsonl", ".ndjson"):
        return [entry["prompt"] for entry in _read_lines("--prompt-file", path, "prompt")]
    text = _read_text("--prompt-file", path)
    if not text.strip():
        raise DataError(f"--prompt-file {path} is empty; write a prompt into it")
    return [text.removesuffix("\n").removesuffix("\r")]


def read_answers(given: str, prompts: Sequence[str]) -> tuple[str, str, Answers]:
    """The name, path and answers of `FILE.jsonl[:NAME]`: objects with `prompt` and `completion`, as infer writes them.

    Raises:
        DataError: a line is no such object, or a prompt has no answer.
        UsageError: the name cannot be one of a column.
    """
    head, _, tail = given.rpartition(":")
    path, name = (Path(head), tail) if head.endswith(".jsonl") else (Path(given), "")
    name = name or re.sub(r"\W+", "_", path.stem, flags=re.ASCII).strip("_")
    if not re.fullmatch(r"[A-Za-z]\w{0,39}", name, re.ASCII) or _TAKEN.fullmatch(name):
        raise UsageError(f"--answers {given}: a column cannot be called {name!r}; give another name, as "
                         f"--answers {path}:mine")
    found: dict[str, dict[str, Any]] = {}
    for entry in _read_lines("--answers", path, "prompt", "completion"):
        first = found.setdefault(entry["prompt"], entry)
        if first["completion"] != entry["completion"]:
            raise DataError(f"--answers {path} answers one prompt in two ways ({entry['prompt'][:60]!r}); keep one")
    if missing := [number for number, prompt in enumerate(prompts, 1) if prompt not in found]:
        raise DataError(f"--answers {path} has no answer to {len(missing):,} of {len(prompts):,} prompts (row "
                        f"{missing[0]} is the first); its prompts must be those that are asked here, template and all")
    entries = [found[prompt] for prompt in prompts]
    cut = [entry.get("cut") is True for entry in entries]
    return name, str(path), Answers([entry["completion"] for entry in entries], cut, 0, 0.0)


def _read_text(flag: str, path: Path) -> str:
    try:
        return read_input(path, _LARGEST, pipe=True).decode("utf-8-sig")
    except OSError as fault:
        raise DataError(f"{flag} {path} cannot be read ({fault.strerror}); give a text or .jsonl file") from None
    except UnicodeDecodeError as fault:
        raise DataError(f"{flag} {path}: byte {fault.start} is not UTF-8; save the file as UTF-8") from None


def _read_lines(flag: str, path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, with text under every one of `keys`; only a completion may be empty."""
    form = ", ".join(f'"{key}": "text"' for key in keys)
    entries = []
    for number, line in enumerate(_read_text(flag, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            sound = all(isinstance(entry[key], str) and cell_text(entry[key])[1] in (
                None, "empty" if key == "completion" else None) for key in keys)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise DataError(f"{flag} {path}, line {number}: not an object like {{{form}}}; mend the line")
        entries.append(entry)
    if not entries:
        raise DataError(f"{flag} {path} holds no {keys[-1]}; write one object like {{{form}}} a line")
    return entries


@dataclass(frozen=True)
class Server:
    """A server with OpenAI's completions, such as those of llama.cpp, vLLM and Ollama.

    Attributes:
        url: up to and with `/v1`.
        model: the name that it knows the model by.
    """

    url: str
    model: str

    def answers(self, prompts: Sequence[str], max_new_tokens: int, folder: Path | None, console: Console) -> Answers:
        """Greedy answers to all prompts, several at once, each tried three times.

        What came before a fault is kept in `folder` for ten minutes, so that the next run asks for the rest only.

        Raises:
            MachineError: an answer did not come.
        """
        kept = Kept(folder, [self.url, self.model, max_new_tokens], lasts=_LASTS)
        missing = [prompt for prompt in dict.fromkeys(prompts) if not kept.get(prompt)]
        started, fault = time.perf_counter(), None
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = {pool.submit(self._answer, prompt, max_new_tokens): prompt for prompt in missing}
            for done, answer in enumerate(as_completed(asked), 1):
                try:
                    kept.add(asked[answer], **answer.result())
                except MachineError as error:
                    fault = error
                except CancelledError:
                    continue
                console.progress(f"server: {done:,}/{len(missing):,} answers", last=done == len(missing))
                if fault:
                    pool.shutdown(wait=False, cancel_futures=True)  # those under way are waited for
        if fault:
            came = sum(kept.get(prompt) is not None for prompt in prompts)
            again = "run again within ten minutes, and only the rest is asked" if folder else "mend it, and run again"
            raise MachineError(f"{fault}; {came:,} of {len(prompts):,} answers came: {again}")
        said = [kept.get(prompt) or {} for prompt in prompts]
        kept.forget()  # the server may hold another model next time
        return Answers([one["text"] for one in said], [one["cut"] for one in said], sum(one["tokens"] for one in said),
                       time.perf_counter() - started)

    def _answer(self, prompt: str, max_new_tokens: int) -> dict[str, Any]:
        """Text, whether it was cut off, and how many tokens it took, if the server says so."""
        reply = _ask(f"{self.url}/completions", {"model": self.model, "prompt": prompt, "max_tokens": max_new_tokens,
                                                 "temperature": 0, "stream": False})
        try:
            [choice] = reply["choices"]
            tokens = (reply.get("usage") or {}).get("completion_tokens")
            return {"text": str(choice["text"]), "cut": choice.get("finish_reason") == "length",
                    "tokens": tokens if isinstance(tokens, int) else 0}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise MachineError(f"--server {self.url} gave no completion but {str(reply)[:200]!r}; give the address "
                               "of a server with OpenAI's completions") from None


def find_server(url: str, model: str | None) -> Server:
    """The server at `url`, and the model that it serves, which must be named where there are several.

    Raises:
        UsageError: no such URL, or no such model.
        MachineError: nobody answers there.
    """
    parts = parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise UsageError(f"--server {url} is no address like http://localhost:8080; a key goes into {KEY}")
    url = url.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    try:
        names = [str(entry["id"]) for entry in _ask(f"{url}/models")["data"]]
    except (KeyError, TypeError):
        raise MachineError(f"--server {url} does not list its models as OpenAI's protocol has it; give the address of "
                           "a server that does") from None
    if (model is None and len(names) != 1) or (model is not None and model not in names):
        raise UsageError(f"--server {url} has {', '.join(names[:10]) or 'no models'}; name one with --server-model")
    return Server(url, model or names[0])


class _NoRedirects(request.HTTPRedirectHandler):
    """A key must not be carried to wherever a server points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that a server replies with; passing faults are tried again.

    Raises:
        MachineError: it is none, or none came.
    """
    host = parse.urlsplit(url).hostname or ""
    proxies = [request.ProxyHandler({})] if _is_here(host) else []
    opener = request.build_opener(_NoRedirects, *proxies)
    headers = {"Content-Type": "application/json", "User-Agent": f"llama2tut/{__version__}"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    for pause in (*_PAUSES, None):
        try:
            with opener.open(request.Request(url, data, headers), timeout=_PATIENCE) as reply:
                return json.loads(reply.read(_LARGEST_REPLY))
        except error.HTTPError as fault:
            passing = fault.code in (408, 429) or fault.code >= 500
            what = " ".join(["HTTP", str(fault.code), *fault.read(200).decode("utf-8", "replace").split()])
        except (OSError, HTTPException) as fault:
            passing, what = True, str(getattr(fault, "reason", fault)) or type(fault).__name__
        except (ValueError, RecursionError):
            passing, what = False, "a reply that is not JSON"
        if pause is None or not passing:
            break
        time.sleep(pause)
    raise MachineError(f"--server {url}: {what}; start the server, or mend its address or {KEY}")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
