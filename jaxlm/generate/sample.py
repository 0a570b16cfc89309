"""Batched generation from prompts: the Python API behind `jaxlm generate`.

results = generate(params, prompts, cfg=cfg, sampling=SamplingConfig(max_new_tokens=64), tokenizer=tokenizer)
results[0].text, results[0].logprobs, results[0].entropies
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate import engine
from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.typing import Constrain, Params

FinishReason = Literal["end", "stop", "length"]


class Codec(Protocol):
    """What generation needs of a tokenizer."""

    eos_id: int | None

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen. temperature 0 is greedy; None switches a truncation off.

    max_new_tokens: tokens per sample at most. top_k: tokens kept; top_p, min_p: probabilities in (0, 1]. stop: strings
    that end a sample and are cut from it. num_samples: samples per prompt. seed: sample s of prompt i draws from
    fold_in(fold_in(key(seed), i), s), whatever the batch.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"max_new_tokens must be at least 1, found {self.max_new_tokens}" if self.max_new_tokens < 1 else "",
            f"temperature must be at least 0 (0 is greedy), found {self.temperature}" if self.temperature < 0 else "",
            f"top_k must be at least 1, found {self.top_k}" if self.top_k is not None and self.top_k < 1 else "",
            f"num_samples must be at least 1, found {self.num_samples}" if self.num_samples < 1 else "",
            "stop strings must not be empty" if "" in self.stop else "",
        ]
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                problems.append(f"{name} must be in (0, 1], found {value}")
        if any(problems):
            raise ValueError("sampling: " + "; ".join(p for p in problems if p))


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sample: its new tokens and text, and per token the model's own log-probability and entropy (nats).

    Both are of the untempered, untruncated distribution. finish_reason: "end" (an end token, the last of `tokens`),
    "stop" (a stop string; text is cut before it, tokens after the one that completes it) or "length".
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    text: str
    finish_reason: FinishReason


OnText = Callable[[int, str], None]
"""Streaming: called with the task's number (prompt * num_samples + sample) and the text that has become final."""


def generate(
    params: Params,
    prompts: Sequence[str | Sequence[int] | np.ndarray],
    *,
    cfg: DecoderConfig,
    sampling: SamplingConfig,
    tokenizer: Codec,
    eos_ids: tuple[int, ...] | None = None,
    batch_size: int = 32,
    chunk: int = 16,
    on_text: OnText | None = None,
    on_finish: Callable[[Generation], None] | None = None,
    constrain: Constrain = decoder.identity,
) -> list[Generation]:
    """Samples continuations of many prompts at full batch and returns them in order (prompt, then sample).

    prompts: strings, or token ids, of any lengths. eos_ids: end tokens (None: the tokenizer's). batch_size:
    slots decoded together. chunk: decode steps between two looks from the host; a finished slot idles at most that
    long before it is refilled. on_finish: called with each sample as it ends, in the order of ending (progress).
    Raises ValueError for an empty prompt, or one that leaves no room for max_new_tokens in cfg.max_length.
    """
    tokens = [_prompt_tokens(p, tokenizer, i) for i, p in enumerate(prompts)]
    if not tokens:
        return []
    longest = max(map(len, tokens)) + sampling.max_new_tokens
    if longest > cfg.max_length:
        raise ValueError(
            f"a prompt of {longest - sampling.max_new_tokens} tokens and max_new_tokens={sampling.max_new_tokens} need "
            f"{longest} positions, and the model has max_length={cfg.max_length}: shorten one of the two"
        )
    if eos_ids is None:
        eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    run = _Run(params, tokens, cfg, sampling, tokenizer, eos_ids, chunk, constrain)
    run.start(min(batch_size, len(tokens) * sampling.num_samples), longest)
    while run.busy():
        for task in run.advance(on_text):
            if on_finish is not None:
                on_finish(task)
    return [run.finished[i] for i in range(len(tokens) * sampling.num_samples)]


def _prompt_tokens(prompt: str | Sequence[int] | np.ndarray, tokenizer: Codec, number: int) -> np.ndarray:
    ids = np.asarray(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)
    bos = getattr(tokenizer, "bos_id", None)
    if isinstance(prompt, str) and bos is not None and (len(ids) == 0 or ids[0] != bos):
        ids = np.concatenate([np.array([bos], np.int32), ids])
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"prompt {number} has no tokens: give it at least one (a beginning-of-text token, say)")
    return ids


@dataclasses.dataclass
class _Task:
    """A sample under way: what it has so far, on the host."""

    prompt: int
    sample: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    streamed: int = 0


@dataclasses.dataclass
class _Run:
    """The host's side of one call of `generate`: a queue of tasks, and which task sits in which slot."""

    params: Params
    prompts: list[np.ndarray]
    cfg: DecoderConfig
    sampling: SamplingConfig
    tokenizer: Codec
    eos_ids: tuple[int, ...]
    chunk: int
    constrain: Constrain
    finished: dict[int, Generation] = dataclasses.field(default_factory=dict)

    def start(self, num_slots: int, longest: int) -> None:
        num_samples = self.sampling.num_samples
        self.queue = deque(_Task(i, s) for i in range(len(self.prompts)) for s in range(num_samples))
        self.seats: list[_Task | None] = [None] * num_slots
        # Prefill writes whole buckets, so the cache is at least one bucket long.
        longest_prompt = max(map(len, self.prompts))
        length = max(engine.bucket(longest), engine.bucket(longest_prompt))
        self.slots = engine.init_slots(self.cfg, num_slots, length, constrain=self.constrain)
        self.key = jax.random.key(self.sampling.seed)

    def busy(self) -> bool:
        return bool(self.queue) or any(task is not None for task in self.seats)

    def advance(self, on_text: OnText | None) -> list[Generation]:
        """Refills the free slots, decodes one chunk, and returns the tasks that ended."""
        free = [row for row, task in enumerate(self.seats) if task is None]
        if free and self.queue:
            self._refill(free[: len(self.queue)])
        self.slots, emitted = engine.decode(
            self.params,
            self.slots,
            cfg=self.cfg,
            num_steps=min(self.chunk, self.sampling.max_new_tokens),
            temperature=float(self.sampling.temperature),
            k=self.sampling.top_k,
            p=self.sampling.top_p,
            minimum=self.sampling.min_p,
            eos_ids=self.eos_ids,
            constrain=self.constrain,
        )
        return self._collect(jax.device_get(emitted), on_text)

    def _refill(self, rows: list[int]) -> None:
        tasks = [self.queue.popleft() for _ in rows]
        distinct = sorted({task.prompt for task in tasks})
        prompts, lengths = engine.padded_prompts([self.prompts[i] for i in distinct])
        size = engine.bucket(len(rows), 1)
        # Padding goes to a row beyond the last slot, which the scatter drops.
        source, target = np.zeros(size, np.int32), np.full(size, len(self.seats), np.int32)
        numbers = np.zeros((size, 2), np.int32)
        for q, (row, task) in enumerate(zip(rows, tasks)):
            source[q], target[q], numbers[q] = distinct.index(task.prompt), row, (task.prompt, task.sample)
            self.seats[row] = task
        self.slots = engine.refill(
            self.params,
            self.slots,
            jnp.asarray(prompts),
            jnp.asarray(lengths),
            jnp.asarray(source),
            jnp.asarray(target),
            _task_keys(self.key, jnp.asarray(numbers)),
            jnp.full((size,), self.sampling.max_new_tokens, jnp.int32),
            cfg=self.cfg,
            constrain=self.constrain,
        )

    def _collect(self, emitted: engine.Emitted, on_text: OnText | None) -> list[Generation]:
        ended = []
        stopped = np.zeros(len(self.seats), bool)
        for row, task in enumerate(self.seats):
            if task is None:
                continue
            valid = emitted.valid[:, row]
            task.tokens += emitted.token[valid, row].tolist()
            task.logprobs += emitted.logprob[valid, row].tolist()
            task.entropies += emitted.entropy[valid, row].tolist()
            done = self._finish(task)
            number = task.prompt * self.sampling.num_samples + task.sample
            if on_text is not None:
                self._stream(task, number, done, on_text)
            if done is not None:
                self.finished[number], self.seats[row] = done, None
                stopped[row] = done.finish_reason == "stop"
                ended.append(done)
        if stopped.any():  # the device does not know strings: end those slots from here
            remaining = jnp.where(jnp.asarray(stopped), 0, self.slots.remaining)
            self.slots = self.slots.replace(remaining=remaining)  # type: ignore[attr-defined]
        return ended

    def _finish(self, task: _Task) -> Generation | None:
        tokens, reason = task.tokens, None
        if tokens and tokens[-1] in self.eos_ids:
            reason = "end"
        elif len(tokens) == self.sampling.max_new_tokens:
            reason = "length"
        if reason is None and not self.sampling.stop:
            return None
        text = self._text(tokens)
        found = [at for at in (text.find(stop) for stop in self.sampling.stop) if at >= 0]
        if found:
            reason, text = "stop", text[: min(found)]
            tokens = tokens[: self._tokens_until(tokens, len(text))]
        if reason is None:
            return None
        n = len(tokens)
        return Generation(
            prompt=task.prompt,
            sample=task.sample,
            tokens=np.array(tokens, np.int32),
            logprobs=np.array(task.logprobs[:n], np.float32),
            entropies=np.array(task.entropies[:n], np.float32),
            text=text,
            finish_reason=reason,
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in self.eos_ids else tokens)

    def _tokens_until(self, tokens: list[int], length: int) -> int:
        """The number of tokens up to and with the one that completes a stop string that starts at `length`."""
        for n in range(1, len(tokens) + 1):
            text = self._text(tokens[:n])
            if any(text.find(stop) == length for stop in self.sampling.stop):
                return n
        return len(tokens)

    def _stream(self, task: _Task, number: int, done: Generation | None, on_text: OnText) -> None:
        """Passes on the text that later tokens cannot change: no half character, no possible start of a stop string."""
        text = done.text if done is not None else self._text(task.tokens).rstrip("\ufffd")
        if done is None:
            held = max((len(s) - 1 for s in self.sampling.stop), default=0)
            text = text[: max(task.streamed, len(text) - held)]
        if len(text) > task.streamed:
            on_text(number, text[task.streamed :])
            task.streamed = len(text)


@jax.jit
def _task_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """One key per task: fold_in(fold_in(key, prompt), sample)."""
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n[0]), n[1]))(numbers)
