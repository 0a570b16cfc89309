"""Ways of answering the questions of a part in `sentence_by_sentence`, and their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.data.reasoning import newline_id
from jaxlm.generate import latent as rolls
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import latent
from jaxlm.models.config import DecoderConfig
from jaxlm.models.latent import LatentConfig
from jaxlm.recipes.sentence_data import Task, judge
from jaxlm.typing import Array, Constrain, Params


class Inference:
    """Everything that answers the samples of a part; scores are in percent."""

    def __init__(
        self, model: DecoderConfig, task: Task, mesh: Mesh, constrain: Constrain, *, num_sentences: int, max_tokens: int
    ):
        """num_sentences: rolled at most, of max_tokens each."""
        self.model, self.task, self.mesh, self.constrain = model, task, mesh, constrain
        self.end_id = newline_id(task.tokenizer)
        self.limits = dict(num_sentences=num_sentences, end_id=self.end_id, max_tokens=max_tokens)

    def token_by_token(self, params: Params, part: str) -> dict[str, float]:
        """The scores of what the language model writes after each question, greedily."""
        samples, tokenizer = self.task.samples[part], self.task.tokenizer
        prompts = [np.append(tokenizer.encode_plain(s.question), self.end_id) for s in samples]
        longest = int(max(self.task.rows["train"].extra["step_segments"].sum(axis=(1, 2))))
        found = generate(
            params, prompts, cfg=self.model, tokenizer=tokenizer, constrain=self.constrain, batch_size=64, eos_ids=(),
            sampling=SamplingConfig(max_new_tokens=longest, temperature=0.0),
        )  # fmt: skip
        return judge(self.task, samples, [result.text.split("\n") for result in found])

    def after_thoughts(self, number: int, max_tokens: int, part: str, params: Params) -> dict[str, float]:
        """The scores of what is written after each question and that many thoughts."""

        def roll(params: Params, question: Array, segments: Array) -> rolls.Sentences:
            limits = dict(number=number, end_id=self.end_id, max_tokens=max_tokens)
            return rolls.roll_thoughts(params, question, segments, cfg=self.model, **limits)

        found = np.asarray(self.whole(roll)(params, *self.questions(part)).tokens)
        texts = [self.task.tokenizer.decode(row).split("\n") for row in found]
        return judge(self.task, self.task.samples[part], texts)

    def reconstructed(self, params: Params, part: str) -> float:
        """Percent of the different sentences of a part that the autoencoder writes again, token for token."""
        tokens, segments = (self.task.rows[part].extra[name] for name in ("steps", "step_segments"))
        joined = np.stack([np.where(segments != 0, tokens, 0), segments])
        there = segments[..., 0] != 0
        tokens, segments = np.unique(joined[:, there], axis=1)

        def again(params: Params, tokens: Array, segments: Array) -> rolls.Sentences:
            vectors = latent.encode_sentences(params, tokens, segments, cfg=self.model)
            limit = self.limits["max_tokens"]
            return rolls.write(params, vectors, cfg=self.model, end_id=self.end_id, max_tokens=limit)

        found = self.whole(again)(params, tokens, segments)
        return 100 * float(np.mean(np.all(np.asarray(found.tokens) == tokens, axis=1)))

    def rolled(
        self, roll: Callable[..., rolls.Roll], part: str, *params: Params, stopped: bool = False
    ) -> dict[str, float]:
        """The scores of a roll over the questions; stopped: it ends by itself, and its last sentence is the answer."""
        question = self.questions(part)
        found = jax.tree.map(np.asarray, self.whole(roll)(*params, *question))
        texts = [
            self.texts(tokens[:number], segments[:number])
            for tokens, segments, number in zip(*found.sentences, found.number)
        ]
        scores = judge(self.task, self.task.samples[part], texts, last=stopped)
        return scores | ({"sentences": float(found.number.mean())} if stopped else {})

    def questions(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of all questions, padded at their ends."""
        column = self.task.rows[part].columns["question"]
        tokens = np.zeros((len(column.tokens), column.length), np.int32)
        segments = np.zeros_like(tokens)
        for i, ids in enumerate(column.tokens):
            tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
        return tokens, segments

    def texts(self, tokens: np.ndarray, segments: np.ndarray) -> list[str]:
        """Sentences without their ends."""
        decode = self.task.tokenizer.decode
        return [decode(t[s != 0]).removesuffix("\n") for t, s in zip(tokens, segments)]

    def whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled, its results whole on every device."""
        return jax.jit(function, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def encoder(self, params: Params, question: Array, segments: Array) -> rolls.Roll:
        """Encoder and decoder alone."""
        return rolls.roll_encoder(params, question, segments, cfg=self.model, **self.limits)

    def continuous(
        self, cfg: LatentConfig, stop: rolls.Stop, params: Params, network: Params, writer: Params, question: Array,
        segments: Array,
    ) -> rolls.Roll:  # fmt: skip
        """Outputs are fed back as they are, until the rule says stop."""
        return rolls.roll_continuous(
            params, writer, question, segments, cfg=cfg, decoder_cfg=self.model, stop=stop, **self.limits
        )

    def discretized(
        self, cfg: LatentConfig, vectors: str, params: Params, network: Params, writer: Params, question: Array,
        segments: Array,
    ) -> rolls.Roll:  # fmt: skip
        """Outputs are written as text, and its vector, or that of what stands before it, is read."""

        def reencode(text: rolls.Text, new: rolls.Sentences) -> Array:
            read = new if vectors == "semantic" else text
            return latent.encode_sentences(network, read.tokens, read.segments, cfg=self.model)

        return rolls.roll_discretized(
            params, writer, question, segments, cfg=cfg, decoder_cfg=self.model, reencode=reencode, **self.limits
        )
