"""Answers of a base model and its adapters, from one load of the base weights, many prompts at a time.

    generator = load(base_model, [adapter], quantization="none", precision="fp32", device="cpu")
    generator.answers(prompts, adapter=0).texts         # of the first adapter
    generator.answers(prompts, adapter=None).texts      # of the base model: the same weights, adapters switched off

Batches are sorted by length. A row that has ended leaves its batch, and a batch that does not fit the GPU is halved. In
float32 no answer depends on how prompts were batched, sampled ones included. On a GPU the base model and its adapters
answer greedily in one batch, where that can be: see `Generator.mixes`.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from llama2tut.errors import DataError, MachineError
from llama2tut.gpu.decoding import PREFILL_TOKENS, decode, refuse_overflow
from llama2tut.gpu.kernels import triton_available
from llama2tut.inference.sampling import Picker, Sampling
from llama2tut.models.adapters import Adapter
from llama2tut.models.attaching import LoadedModel, load_model
from llama2tut.models.base_models import BaseModel

_GREEDY = Sampling()
_LARGEST_CPU = (128, 8_192)  # rows and tokens of a batch; measured on two cores
_LARGEST_GPU = 512  # rows; 192 prompts of two columns go 1.2 times as fast as at 256
_TEXTS_AT_ONCE = 16  # whose logits are all in memory: 0.2 GiB for 60 tokens each and a vocabulary of 50,000
_TOO_LONG = ("one prompt at a time runs out of GPU memory: see with nvidia-smi what else is on the GPU, or use a lower "
             "--max-new-tokens, --quantization 4bit where it is not on yet, or a smaller --model")


@dataclass(frozen=True)
class Answers:
    """All prompts' answers in the order of the prompts.

    Attributes:
        texts: without special tokens.
        cut: whether each was cut off at the longest length, before the model ended it.
        new_tokens: of all of them, ends too.
        seconds: that they took.
    """

    texts: list[str]
    cut: list[bool]
    new_tokens: int
    seconds: float


def load(base_model: BaseModel, adapters: Sequence[Adapter], *, quantization: str, precision: str, device: str,
         probes: Sequence[list[int]] = ()) -> "Generator":
    """A generator over what `models.attaching.load_model` loads; arguments and what is raised are its own."""
    loaded = load_model(base_model, adapters, quantization=quantization, precision=precision, device=device,
                        probes=probes)
    # int8 products synchronise with the CPU, which capturing a CUDA graph forbids.
    return Generator(loaded, cuda_graphs=device.startswith("cuda") and quantization != "8bit" and triton_available())


class Generator:
    """Loaded weights that answer prompts.

    Args:
        loaded: a model with its adapters.
        cuda_graphs: greedy answers come from decode steps that are captured as a CUDA graph.

    Attributes:
        tokenizer: the base model's.
        changed: adapters that changed the base weights.
        mixes: one call may ask for answers of several adapters and the base model; greedy ones share its batches.
        pace: seconds a new token in the batch that the last answers came from.
    """

    def __init__(self, loaded: LoadedModel, *, cuda_graphs: bool = False) -> None:
        self._cuda_graphs = cuda_graphs
        self.tokenizer = loaded.tokenizer
        self.changed = loaded.changed
        self._model = loaded.model
        self._peft_model = loaded.peft_model
        self._routes = loaded.routes
        self.mixes = cuda_graphs and (loaded.peft_model is None or loaded.routes is not None)
        self.pace = 0.0
        self._eos: dict[int | None, frozenset[int]] = {None: loaded.ends, **dict(enumerate(loaded.adapter_ends))}
        self._fits: int | None = None  # rows to try next, once a batch has run out of memory

    def answers(self, prompts: Sequence[list[int]], *, adapter: int | Sequence[int | None] | None,
                sampling: Sampling = _GREEDY, batch_size: int | None = None,
                progress: Callable[[int], None] | None = None) -> Answers:
        """Answer all prompts; `progress` is called with the number of those answered so far.

        The other arguments and what is raised: as for `iter_answers`.
        """
        started = time.perf_counter()
        texts, ends, total = [""] * len(prompts), [False] * len(prompts), 0
        found = self.iter_answers(prompts, adapter=adapter, sampling=sampling, batch_size=batch_size)
        for done, (index, text, new_tokens, cut) in enumerate(found, 1):
            texts[index], ends[index] = text, cut
            total += new_tokens
            if progress:
                progress(done)
        return Answers(texts, ends, total, time.perf_counter() - started)

    def iter_answers(self, prompts: Sequence[list[int]], *, adapter: int | Sequence[int | None] | None,
                     sampling: Sampling = _GREEDY, batch_size: int | None = None,
                     first_row: int = 0) -> Iterator[tuple[int, str, int, bool]]:
        """(index, text without special tokens, new tokens, whether it was cut off) of each prompt, as batches finish.

        Prompts are sorted within windows of a few batches, so that answers come roughly in order.

        Args:
            prompts: token ids.
            adapter: which of the loaded adapters answers, None: the base model; for each prompt, where this `mixes`.
            sampling: how tokens are picked.
            batch_size: prompts at a time; None: what measured well.
            first_row: number of the first prompt, by which sampling is seeded: the rest of a file is answered as if
                all of it were.

        Raises:
            DataError: an empty prompt.
            MachineError: a single prompt does not fit the GPU.
        """
        import torch

        if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt]:
            raise DataError(f"prompt {first_row + empty[0]} is empty: give it some text")
        owners = [adapter] * len(prompts) if adapter is None or isinstance(adapter, int) else adapter
        most_rows, most_tokens = self._largest()
        window = 2 * max(most_rows, batch_size or 0)
        todo: list[int] = []
        begun = 0
        while todo or begun < len(prompts):
            if not todo:  # longest first: what does not fit shows at once
                todo = sorted(range(begun, min(begun + window, len(prompts))), key=lambda row: -len(prompts[row]))
                begun += len(todo)
            lengths = [len(prompts[row]) + sampling.max_new_tokens for row in todo[:most_rows]]
            room = (bisect_right([*accumulate(lengths)], most_tokens) if self._packs(sampling)
                    else min(len(lengths), most_tokens // lengths[0]))  # padded to the longest
            rows = todo[:min(batch_size or max(1, room), self._fits or window)]
            # Adapters one after the other: each reads its rows in one piece.
            rows.sort(key=lambda row: (-1 if (owner := owners[row]) is None else owner, -len(prompts[row])))
            began = time.perf_counter()
            try:
                tokens = self._decode([prompts[row] for row in rows], [owners[row] for row in rows], sampling,
                                      [first_row + row for row in rows])
            except torch.OutOfMemoryError:
                tokens = None  # retried outside of `except`: its traceback keeps the batch's tensors alive
            if tokens is None:
                if len(rows) == 1:
                    raise MachineError(_TOO_LONG)
                self._fits = len(rows) // 2
                torch.cuda.empty_cache()
                continue
            self.pace = (time.perf_counter() - began) / sum(map(len, tokens))
            todo = todo[len(rows):]
            for row, ids in zip(rows, tokens, strict=True):
                cut = len(ids) == sampling.max_new_tokens and ids[-1] not in self._eos[owners[row]]
                yield row, self._text(ids if cut else ids[:-1], cut=cut), len(ids), cut

    def stream(self, prompt: list[int], *, adapter: int | None, sampling: Sampling = _GREEDY) -> Iterator[str]:
        """One prompt's answer in pieces, as they come; together they are its text.

        Raises:
            MachineError: it does not fit the GPU.
        """
        import torch

        ids: list[int] = []
        shown = ""
        try:
            with self._only(adapter):
                for [(_, token)] in self._steps([prompt], sampling, [0], self._eos[adapter]):
                    if token in self._eos[adapter]:
                        break
                    ids.append(token)
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    if text != shown and not text.endswith("\ufffd"):  # else a character's tokens are not complete yet
                        yield text[len(shown):]
                        shown = text
        except torch.OutOfMemoryError:
            raise MachineError(_TOO_LONG) from None
        if rest := self._text(ids, cut=len(ids) == sampling.max_new_tokens)[len(shown):]:
            yield rest

    def _text(self, ids: list[int], *, cut: bool) -> str:
        """What token ids spell, without the half of a character that an answer cut off in its midst would end in.

        The token that ended an answer is none of them: it need not be one that the tokenizer calls special.
        """
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.rstrip("\ufffd") if cut else text

    def losses(self, texts: Sequence[list[int]], *, adapter: int | None) -> Iterator[float]:
        """Mean loss of each text in nats a token, its first token aside, from which the others are told."""
        import torch
        from torch.nn.functional import cross_entropy

        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first:first + _TEXTS_AT_ONCE]
            longest = max(map(len, some))
            # Padding on the right: no token of a text sees it.
            ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in some], device=self._model.device)
            with self._only(adapter), torch.inference_mode():
                logits = self._model(input_ids=ids).logits[:, :-1].float()
                found = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T - 1)
            for text, losses in zip(some, found, strict=True):
                yield float(losses[:len(text) - 1].mean())

    def _largest(self) -> tuple[int, int]:
        """Most rows and most tokens of a batch, unless the user says; on a GPU, what its free memory holds as cache."""
        if self._model.device.type == "cpu":
            return _LARGEST_CPU
        import torch

        config, size = self._model.config, self._model.dtype.itemsize
        token = 2 * size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes
        reading = size * PREFILL_TOKENS * (6 * config.hidden_size + 3 * config.intermediate_size)  # likewise
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        free = min(free, int(total * torch.cuda.get_per_process_memory_fraction()) - torch.cuda.memory_reserved())
        return _LARGEST_GPU, max(1, int(max(0.7 * free, 0.95 * free - reading) / token))

    def _packs(self, sampling: Sampling) -> bool:
        """Whether answers come from captured steps, whose rows stand in memory one behind the other."""
        return self._cuda_graphs and not sampling.do_sample and sampling.repetition_penalty == 1

    def _only(self, adapter: int | None) -> AbstractContextManager[Any]:
        """While it lasts, the model answers with this adapter alone, or with none."""
        if self._peft_model is None:
            return nullcontext()
        if adapter is None:
            return self._peft_model.disable_adapter()  # type: ignore[no-any-return]  # peft is untyped
        self._peft_model.set_adapter(str(adapter))
        return nullcontext()

    def _decode(self, prompts: list[list[int]], adapters: list[int | None], sampling: Sampling,
                numbers: list[int]) -> list[list[int]]:
        """New token ids of each prompt, eos included; all in one batch."""
        if self._packs(sampling):
            ends = [self._eos[adapter] for adapter in adapters]
            if self._routes:
                names = [None if adapter is None else str(adapter) for adapter in adapters]
                return decode(self._model, prompts, sampling.max_new_tokens, ends, routes=self._routes, adapters=names)
            with self._only(adapters[0]):
                return decode(self._model, prompts, sampling.max_new_tokens, ends)
        found: list[list[int]] = [[] for _ in prompts]
        with self._only(adapters[0]):
            for step in self._steps(prompts, sampling, numbers, self._eos[adapters[0]]):
                for row, token in step:
                    found[row].append(token)
        return found

    def _steps(self, prompts: list[list[int]], sampling: Sampling, numbers: list[int],
               ends: frozenset[int]) -> Iterator[list[tuple[int, int]]]:
        """One step at a time, (row, new token) of each row that has not ended.

        Not `model.generate`: that computes ended rows to the batch's end, and its repetition penalty sees the padding.
        """
        import torch
        from transformers import DynamicCache

        device, longest = self._model.device, max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)  # (B, T so far)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        pick = Picker(sampling, prompts, numbers, device)
        rows = list(range(len(prompts)))
        # An index copies the last states out. A slice of them, over a frozen output layer, PyTorch multiplies prompt by
        # prompt on a CPU, in bf16 with a copy of that layer for each: 7 s and 7 GB for 128 prompts of SmolLM2.
        last = torch.tensor([-1], device=device)
        for number in range(sampling.max_new_tokens):
            with torch.inference_mode():
                logits = self._model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache,
                                     use_cache=True, logits_to_keep=last).logits[:, -1].float()
                if number == 0:
                    refuse_overflow(logits)
                ids = pick(logits)[:, None]
            tokens = ids[:, 0].tolist()
            yield list(zip(rows, tokens, strict=True))
            kept = [place for place, token in enumerate(tokens) if token not in ends]
            if not kept:
                return
            if len(kept) < len(rows):
                rows = [rows[place] for place in kept]
                ids, mask, places = ids[kept], mask[kept], places[kept]
                cache.batch_select_indices(torch.tensor(kept, device=device))
                pick.keep(kept)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            places = places[:, -1:] + 1
