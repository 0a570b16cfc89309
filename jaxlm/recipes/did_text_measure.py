"""What E11 measures on the test pairs once its three models are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.analysis.did import ordered_share, power_law
from jaxlm.analysis.did_entropy import estimate_did_entropy, sequence_did_entropy, token_did_entropy
from jaxlm.data import pipeline
from jaxlm.data.corpus import TokenCorpus
from jaxlm.data.document import Document
from jaxlm.data.loader import Rows, eval_batches
from jaxlm.data.packing import pack
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.ops.masked import masked_sum
from jaxlm.recipes import dpo
from jaxlm.recipes.load import load_model
from jaxlm.recipes.wiring import make_apply
from jaxlm.train.metrics import read_lines
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.preference import make_scorer
from jaxlm.typing import Array, Batch, Params


def measure(
    cfg: dpo.Config,
    *,
    rejected: str,
    beta: float,
    num_prompts: int,
    num_samples: int,
    max_new_tokens: int,
    min_ess: float,
    seed: int,
) -> dict[str, float]:
    """Quantity -> value on the test pairs of a finished DPO run; rejected: the run fine-tuned on rejected replies."""
    assert cfg.init_from is not None
    policy, reference, worse = (load_model(folder) for folder in (cfg.run_dir, cfg.init_from, rejected))
    tokenizer, model = load_tokenizer(cfg.data.tokenizer), policy.cfg
    test = pipeline.build(cfg.data, tokenizer).heldout["test"]
    scores = [response_logprobs(m.params, test, model).reshape(-1, 2) for m in (policy, reference, worse)]
    margins = [score[:, 0] - score[:, 1] for score in scores]
    law = power_law(jnp.asarray(margins[1] - margins[2]), jnp.asarray(margins[0] - margins[1]))
    per_token = mean_token_did_entropy(policy.params, reference.params, test, model)
    sampled = sample_replies(
        policy.params, _prompts(test, num_prompts), model, num_samples=num_samples, max_new_tokens=max_new_tokens,
        seed=seed, tokenizer=tokenizer,
    )  # fmt: skip
    logprobs = [response_logprobs(m.params, sampled, model).reshape(-1, num_samples) for m in (policy, reference)]
    return {
        "first_loss": first_loss(cfg),
        "power_law_slope": float(law.slope),
        "power_law_r2": float(law.r2),
        "ordered_share": float(ordered_share(*map(jnp.asarray, margins))),
        "token_did_entropy": per_token,
        "token_did_entropy_share": per_token / float(np.log(model.vocab_size)),
    } | sequence_entropies(*logprobs, min_ess=min_ess, seed=seed)


def first_loss(cfg: dpo.Config) -> float:
    """The loss of the first evaluation, before any update."""
    return float(read_lines(Path(cfg.run_dir) / "metrics.jsonl")[0]["test/loss"])


def response_logprobs(params: Params, rows: Rows, model: DecoderConfig) -> np.ndarray:
    """The summed log-probability of every document of the rows, [documents], nats."""
    slots = rows.most_segments()
    scorer = make_scorer(
        make_hidden_scorer(make_apply(model, decoder.identity), partial(decoder.head, cfg=model)), slots=slots
    )
    score = jax.jit(lambda params, batch: scorer(params, batch, None).logprob)
    by_row = np.concatenate([np.asarray(score(params, batch)) for batch in _batches(rows)])
    return rows.by_document(by_row)


def mean_token_did_entropy(policy: Params, reference: Params, rows: Rows, model: DecoderConfig) -> float:
    """The exact DID entropy of the next token, mean over the predicted tokens of the rows, nats."""
    apply, head = make_apply(model, decoder.identity), partial(decoder.head, cfg=model)

    @jax.jit
    def sums(policy: Params, reference: Params, batch: Batch) -> tuple[Array, Array]:
        sides: list[Any] = []
        for params in (policy, reference):
            hidden = apply(params, batch["inputs"], positions=batch["positions"], segments=batch["segments"], key=None)
            sides += [hidden, head(params)["unembed"]]
        entropy = token_did_entropy(*sides, mask=batch["mask"])
        return masked_sum(entropy, batch["mask"]), jnp.sum(batch["mask"], dtype=jnp.float32)

    found = np.array([jax.device_get(sums(policy, reference, batch)) for batch in _batches(rows)])
    total, count = found.sum(axis=0)
    return float(total / count)


def _batches(rows: Rows, size: int = 8) -> Iterator[Batch]:
    for batch in eval_batches(rows, batch_size=size):
        yield {name: jnp.asarray(x) for name, x in batch.items()}


def _prompts(rows: Rows, number: int) -> list[np.ndarray]:
    """The tokens before the reply of the first pairs."""
    documents = (rows.corpus[2 * i] for i in range(min(number, len(rows.corpus) // 2)))
    return [d.tokens[: int(np.argmax(d.mask))] for d in documents]


def sample_replies(
    params: Params, prompts: list[np.ndarray], model: DecoderConfig, *, num_samples: int, max_new_tokens: int,
    seed: int, tokenizer: Any,
) -> Rows:  # fmt: skip
    """Replies of the model, num_samples to each prompt in order, as rows to be scored."""
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, num_samples=num_samples, seed=seed)
    replies = generate(params, prompts, cfg=model, sampling=sampling, tokenizer=tokenizer, batch_size=64)
    corpus = TokenCorpus.from_documents(_document(prompts[r.prompt], r.tokens) for r in replies)
    length = -(-int(corpus.num_targets().max()) // 128) * 128
    return Rows(corpus, pack(corpus.num_targets(), length), length, tokenizer.pad_id, "sampled replies")


def _document(prompt: np.ndarray, reply: np.ndarray) -> Document:
    tokens = np.concatenate([prompt, reply]).astype(np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt), np.zeros(len(tokens), np.int32), "a sampled reply")


def sequence_entropies(policy: np.ndarray, reference: np.ndarray, *, min_ess: float, seed: int) -> dict[str, float]:
    """The sequence DID entropy over prompts: means of those that are not refused, and how many are.

    policy, reference: [prompts, K] log-probabilities of the policy's own replies. Means are NaN if all are refused.
    """
    _, ess = estimate_did_entropy(jnp.asarray(policy), jnp.asarray(reference))
    found = []
    for i in np.flatnonzero(np.asarray(ess) >= min_ess):
        key = jax.random.fold_in(jax.random.key(seed), int(i))
        pair = jnp.asarray(policy[i]), jnp.asarray(reference[i])
        found.append(sequence_did_entropy(*pair, key=key, min_ess=min_ess))

    def mean(of: Callable[[Any], float]) -> float:
        return float(np.mean([of(f) for f in found])) if found else float("nan")

    return {
        "sequence_did_entropy": mean(lambda f: f.entropy),
        "sequence_did_low": mean(lambda f: f.low),
        "sequence_did_high": mean(lambda f: f.high),
        "sequence_did_ess": float(np.median(ess)),
        "sequence_did_refused": 1 - len(found) / len(policy),
    }
