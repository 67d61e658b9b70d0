"""How the next token is picked: the likeliest, or by chance that belongs to its row alone."""

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: the likeliest one, or by chance from (seed, prompt's number, position).

    Attributes:
        max_new_tokens: longest answer, in tokens, eos included.
        do_sample: sample; `temperature`, `top_p` (share of probability) and `top_k` (tokens; 0: all) shape the odds.
        repetition_penalty: above 1, tokens that the prompt or the answer already has become less likely.
        seed: same seed, same answers.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int = 42


class Picker:
    """Picks each row's next token from its logits, with nothing shared between rows.

    Args:
        sampling: how.
        prompts: token ids of each row, without padding.
        numbers: each row's number among all prompts.
        device: where the logits will be.
    """

    def __init__(self, sampling: Sampling, prompts: list[list[int]], numbers: list[int], device: Any) -> None:
        import torch

        self._sampling = sampling
        self._tokens = [torch.tensor(prompt, device=device) for prompt in prompts]
        self._noise: list[Any] = []
        for number in numbers if sampling.do_sample else ():
            seed = random.Random(f"{sampling.seed}:{number}").getrandbits(32)  # torch reads no more bits on a CPU
            self._noise.append(torch.Generator(device).manual_seed(seed))
        self._seen: Any = None

    def keep(self, rows: list[int]) -> None:
        """Go on with these of the rows only."""
        self._noise = [self._noise[row] for row in rows] if self._noise else []
        self._seen = None if self._seen is None else self._seen[rows]

    def __call__(self, scores: Any) -> Any:
        """(B, vocabulary) logits in float32 -> (B,) token ids."""
        import torch

        sampling, penalty = self._sampling, self._sampling.repetition_penalty
        if penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(scores, dtype=torch.bool)
                for seen, tokens in zip(self._seen, self._tokens, strict=True):
                    seen[tokens] = True
            scores = torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self._noise:
            scores = scores / sampling.temperature
            if 0 < sampling.top_k < scores.shape[-1]:
                scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
            if sampling.top_p < 1:
                odds, order = scores.softmax(-1).sort(descending=True)
                beyond = odds.cumsum(-1) - odds >= sampling.top_p  # those before it have that share already
                scores = scores.masked_fill(beyond.gather(-1, order.argsort()), -torch.inf)
            # The largest of logits plus Gumbel noise is a sample from their softmax.
            waits = [torch.empty_like(scores[0]).exponential_(generator=noise) for noise in self._noise]
            scores = scores - torch.stack(waits).log()
        picked = scores.argmax(-1)
        if penalty != 1:
            self._seen[torch.arange(len(picked)), picked] = True
        return picked
