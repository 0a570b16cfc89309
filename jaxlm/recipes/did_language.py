"""The experiment E10 of the DID recipe: a language model so small that every response can be enumerated.

Letter Y: the 4^T responses of T tokens, in the order of their index, sum_t token_t 4^(T - 1 - t). Training is the real
thing (the library's decoder, rows, scores and losses), and yet every distribution is a table: chosen and rejected
responses are drawn exactly, the frozen reference is an array, and the JSD has no sampling error.

The paper's is the theory: on power-law data DPO's optimum is the target. That this holds in any class of policies which
has the target in it is derived. The design, the bound of 10 and all numbers are this project's.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import losses
from jaxlm.analysis import did
from jaxlm.data.batch import stack_rows
from jaxlm.data.collate import make_row
from jaxlm.data.document import make_document
from jaxlm.models import decoder
from jaxlm.models.cache import init_cache
from jaxlm.models.config import DecoderConfig
from jaxlm.models.spec import init
from jaxlm.recipes.did_checks import Check, Result, Settings, above, below
from jaxlm.recipes.did_fit import LABELS, OBJECTIVES, Objective, Problem
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.typing import Apply, Array, Float, Int, Key, Params

VOCAB = 4
BEGIN = VOCAB
"""The token that every row starts with: an input, never a target."""
BETA = 1.0
EVERY_STEPS = 50
"""How often the JSD is measured."""
LOGIT_SCALE = 4.0
"""The logits of a decoder as it is initialised have a standard deviation of 0.16: on flat policies there is little to
learn, and on a flat reference CPO is DPO. Four times that puts the JSD of two of them between 0.2 and 0.4 nats."""
NAMES = ("dpo", "cpo", "ipo_sum", "orpo")


def model(length: int) -> DecoderConfig:
    """The decoder: 2 layers of width 64, 66,880 parameters at 6 tokens, for the tokens and the begin token."""
    return DecoderConfig(
        vocab_size=VOCAB + 1, width=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, mlp_width=128,
        mlp_gated=False, max_length=length, rope=None, learned_positions=True, tie_embeddings=False,
    )  # fmt: skip


def random_transformer(key: Key[Array, ""], *, length: int) -> Params:
    """A decoder as the library initialises it, its logits scaled up by LOGIT_SCALE."""
    params = init(key, decoder.spec(model(length)))
    return params | {"unembed": {"table": LOGIT_SCALE * params["unembed"]["table"]}}


def enumerate_responses(length: int) -> Int[np.ndarray, "Y T"]:
    """All responses, each on the row of its index: 0…00, 0…01, …"""
    return np.indices((VOCAB,) * length, np.int32).reshape(length, -1).T


def enumerate_rows(length: int) -> dict[str, np.ndarray]:
    """The batch of all responses, [Y, T] each: begin and the first T - 1 tokens in, all T tokens as targets."""
    token_bytes, mask = np.zeros(VOCAB + 1, np.int32), np.arange(length + 1) > 0
    rows = []
    for i, response in enumerate(enumerate_responses(length)):
        document = make_document(np.append(BEGIN, response), mask=mask, token_bytes=token_bytes, origin=f"response:{i}")
        rows.append(make_row([(document, 0, length)], length))
    return stack_rows(rows)


def head(params: Params, *, cfg: DecoderConfig) -> dict[str, Any]:
    """The unembedding without the begin token's row, so that its probability is exactly 0 and 4^T responses are all."""
    whole = decoder.head(params, cfg=cfg)
    return whole | {"unembed": whole["unembed"][:VOCAB]}


def make_apply(cfg: DecoderConfig) -> Apply:
    """The decoder, row by row."""

    def apply(params: Params, tokens: Array, *, positions: Any, segments: Any, key: Any) -> Array:
        return decoder.forward(params, tokens, cfg=cfg, positions=positions, segments=segments).hidden

    return apply


def make_shared_apply(cfg: DecoderConfig) -> Apply:
    """The same hidden states of `enumerate_rows`, each prefix of T - 1 tokens read once: 2,304 tokens for 24,576.

    Of the Y rows, V in a row have the same inputs, and V^2 in a row the same but the last: those go through the decoder
    once, into its cache, from which the last inputs are read.
    """

    def apply(params: Params, tokens: Array, *, positions: Any, segments: Any, key: Any) -> Array:
        prefixes, last = tokens[:: VOCAB**2, :-1], tokens[::VOCAB, -1:]
        first = decoder.forward(params, prefixes, cfg=cfg, cache=init_cache(cfg, len(prefixes), tokens.shape[1]))
        assert first.cache is not None
        cache = first.cache.replace(
            keys=jnp.repeat(first.cache.keys, VOCAB, axis=1),
            values=jnp.repeat(first.cache.values, VOCAB, axis=1),
            length=jnp.repeat(first.cache.length, VOCAB),
        )
        second = decoder.forward(params, last, cfg=cfg, cache=cache)
        parts = jnp.repeat(first.hidden, VOCAB**2, axis=0), jnp.repeat(second.hidden, VOCAB, axis=0)
        return jnp.concatenate(parts, axis=1)

    return apply


@partial(jax.jit, static_argnames=("length", "shared"))
def log_table(params: Params, *, length: int, shared: bool = False) -> Float[Array, "Y"]:
    """Log-probability of every response, nats, through token_stats and seq_logprob: a policy as a table.

        log p(y) = sum_t log p(y_t | begin, y_1 … y_(t-1))

    shared: `make_shared_apply`; the same numbers up to rounding, in a fraction of the time.
    """
    cfg, batch = model(length), enumerate_rows(length)
    apply = make_shared_apply(cfg) if shared else make_apply(cfg)
    stats = make_hidden_scorer(apply, partial(head, cfg=cfg))(params, batch, None, ("logprob",))
    return losses.seq_logprob(stats.logprob, batch["mask"])


def objectives(length: int) -> tuple[Objective, ...]:
    """The objectives of NAMES for responses of one length: CPO without its likelihood term, ORPO (weight 1) with it."""

    def orpo(chosen: Array, rejected: Array, *_: Array) -> Array:
        num = jnp.full_like(chosen, length)
        nll = losses.sft(chosen, chosen_length=num)
        return losses.orpo(chosen, rejected, beta=1.0, chosen_length=num, rejected_length=num, chosen_nll=nll)

    return tuple(orpo if name == "orpo" else OBJECTIVES[name](BETA) for name in NAMES)


# The objective is an operand, so that all of them share one compilation, the greater part of a short run.
@partial(jax.jit, static_argnames=("length", "num_steps", "num_pairs", "learning_rate"))
def train(
    params: Params,
    problem: Problem,
    key: Key[Array, ""],
    objective: int | Int[Array, ""],
    *,
    length: int,
    num_steps: int,
    num_pairs: int = 4096,
    learning_rate: float = 1e-3,
) -> tuple[Params, Float[Array, "points"]]:
    """Adam on fresh pairs; the trained parameters, and the JSD to the target every EVERY_STEPS from step 0 on, nats.

    params: those of the reference. problem: its tables [Y]. objective: index into NAMES. num_steps: a multiple of
    EVERY_STEPS. num_pairs: new pairs per step, which the table makes nearly free; they follow from key alone, so every
    objective sees the same ones. learning_rate: of the first step, decaying to 0 along a cosine.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def mean_loss(params: Params, chosen: Array, rejected: Array) -> Array:
        policy = log_table(params, length=length, shared=True)
        reference = problem.reference.astype(policy.dtype)
        pairs = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
        return jnp.mean(jax.lax.switch(objective, objectives(length), *pairs))

    def step(carry: tuple[Params, Any], key: Array) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        keys = jax.random.split(key)
        num, shape = len(problem.reference), (num_pairs,)
        drawn = [jax.random.choice(k, num, shape, p=jnp.exp(p)) for k, p in zip(keys, problem[2:])]
        updates, state = optimizer.update(jax.grad(mean_loss)(params, *drawn), state)
        return (optax.apply_updates(params, updates), state), None

    def distance(params: Params) -> Array:
        policy = log_table(params, length=length, shared=True)
        return did.jsd(problem.target, policy.astype(problem.target.dtype))

    def point(carry: tuple[Params, Any], keys: Array) -> tuple[tuple[Params, Any], Array]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, distance(carry[0])

    keys = jax.random.split(key, num_steps).reshape(-1, EVERY_STEPS)
    (trained, _), curve = jax.lax.scan(point, (params, optimizer.init(params)), keys)
    return trained, jnp.concatenate([distance(params)[None], curve])


def e10(settings: Settings) -> Result:
    """A tiny language model: DPO's policy approaches the target, those of the others stay, or go elsewhere.

    Limits: the layers as they are initialised add little to what the last token and the position say. With their
    kernels 2, 4 and 8 times as large DPO came to 0.007, 0.009 and 0.02 nats in 200 to 300 steps (seed 0), not to 0.001.
    """
    length, num_steps = settings.language_length, settings.num_language_steps
    judged = dataclasses.replace(settings, num_language_seeds=Settings.num_language_seeds) == Settings()
    curves: dict[str, list[list[float]]] = {LABELS[name]: [] for name in NAMES}
    checks, sums, gaps = [], [], []
    for seed in range(settings.num_language_seeds):
        reference, target, pairs = jax.random.split(jax.random.key(seed), 3)
        reference, target = (random_transformer(key, length=length) for key in (reference, target))
        log_reference, log_target = (log_table(p, length=length).astype(float) for p in (reference, target))
        rejected = did.optimal_rejected(log_target, log_reference, beta=BETA)
        problem = Problem(log_reference, log_target, log_reference, rejected)
        tables = [log_reference, log_target]
        for i, name in enumerate(NAMES):
            policy, curve = train(reference, problem, pairs, i, length=length, num_steps=num_steps)
            tables.append(log_table(policy, length=length).astype(float))
            gaps.append(jnp.max(jnp.abs(tables[-1] - log_table(policy, length=length, shared=True))))
            curves[LABELS[name]].append(curve.tolist())
            checks.append(Check(f"final JSD, {LABELS[name]}, seed {seed}", float(curve[-1])))
        sums += [jnp.sum(jnp.exp(table)) for table in tables]
        start, *_ = curve.tolist()
        dpo, *others = (seeds[-1][-1] for seeds in curves.values())
        checks.append(Check(f"JSD(target, reference), the start, seed {seed}", start, 0.1, 0.4, not judged))
        label = f"smallest final JSD of the others, over DPO's, seed {seed}"
        checks.append(above(label, min(others) / dpo, 10.0, at_reference_only=not judged))
    off = np.abs(np.array(sums) - 1).max()
    checks.append(below("largest error of the sum over all responses of exp(seq_logprob), 1", off, 1e-5))
    checks.append(below("largest difference, shared prefixes and row by row, nats", max(gaps), 1e-4))
    series = {"curves": curves, "every": EVERY_STEPS}
    return Result("e10", "A language model, enumerated: only DPO reaches the target", tuple(checks), series)
