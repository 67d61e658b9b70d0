"""Whether two models answer alike, near ties aside: those are decided by how weights were rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2tut.inference.generate import Generator
from llama2tut.inference.sampling import Sampling
from llama2tut.tasks.tokenize import plain_ids

# Logits closer to each other than this share of their standard deviation are a tie.
_TIE = {"fp32": 0.01, "bf16": 0.25, "fp16": 0.1}


@dataclass(frozen=True)
class Answered:
    """One prompt's answer, and what the model thought of each of its tokens.

    Attributes:
        ids: of prompt and answer.
        start: length of the prompt, in tokens.
        logits: (len(ids) - start + 1, vocabulary), float32: of each token of the answer, and of what follows it.
    """

    ids: list[int]
    start: int
    logits: Any


def answer(generator: Generator, model: Any, prompts: Sequence[list[int]], adapter: int | None,
           tokens: int) -> list[Answered]:
    """Greedy answers of at most `tokens` tokens, and their logits; `model` is the one behind the generator."""
    texts = generator.answers(prompts, adapter=adapter, sampling=Sampling(max_new_tokens=tokens)).texts
    endings = plain_ids(generator.tokenizer, texts, add_special_tokens=False)
    return [Answered(prompt + ending, len(prompt), _logits(model, prompt + ending, len(prompt)))
            for prompt, ending in zip(prompts, endings, strict=True)]


def alike(model: Any, answers: Sequence[Answered], precision: str) -> int:
    """How many of the answers another model would give too, token by token."""
    count = 0
    for known in answers:
        picked = _logits(model, known.ids, known.start).argmax(-1, keepdim=True)
        lost = known.logits.max(-1).values - known.logits.gather(-1, picked)[:, 0]
        count += bool((lost <= _TIE[precision] * known.logits.std(-1)).all())
    return count


def _logits(model: Any, ids: list[int], start: int) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0, start - 1:].float().cpu()
