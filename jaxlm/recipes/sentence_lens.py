"""The latent model of `sentence_by_sentence` under the SentenceLens, as a page of the run."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxlm.analysis import sentence_lens
from jaxlm.analysis.sentence_lens import Read, Reading
from jaxlm.generate import latent as rolls
from jaxlm.models import decoder, latent
from jaxlm.models.latent import LatentConfig
from jaxlm.ops import token_stats
from jaxlm.recipes.sentence_stages import Stages
from jaxlm.typing import Array, Params


def write_lens(
    stages: Stages, cfg: LatentConfig, params: Params, network: Params, *, number: int, folder: Path, title: str
) -> Path:
    """The first test questions under the lens; gives the page's path. network: the sentence decoder's parameters."""
    task, found, read = stages.task, [], make_read(stages, network)
    prompts = task.rows["test"].columns["question"].tokens
    for sample, prompt in zip(task.samples["test"][:number], prompts):
        found.append(
            sentence_lens.look(
                params,
                np.asarray(prompt),
                read,
                cfg=cfg,
                num_steps=len(sample.sentences),
                text=sample.question,
                steps=sample.sentences,
            )  # fmt: skip
        )
    return sentence_lens.write(found, folder, title=title)


def make_read(stages: Stages, network: Params) -> Read:
    """What the sentence decoder writes from vectors, with its own log-probabilities and entropies."""
    model, limit = stages.model, stages.cfg.data.max_step_tokens

    @jax.jit
    def run(network: Params, vectors: Array) -> tuple[Array, ...]:
        new = rolls.write(network, vectors, cfg=model, end_id=stages.ask.end_id, max_tokens=limit)
        hidden = latent.decoder_states(network, vectors, new.tokens, new.segments, cfg=model)
        head = decoder.head(network, cfg=model)
        stats = token_stats(hidden, targets=new.tokens, mask=new.segments != 0, **head)
        return new.tokens, new.segments, stats.logprob, stats.entropy

    def read(vectors: Array) -> list[Reading]:
        tokens, segments, logprob, entropy = run(network, vectors)
        return sentence_lens.readings(tokens, segments, logprob, entropy, stages.task.tokenizer.decode)

    return read
