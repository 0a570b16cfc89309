"""Preference objectives on packed rows: what is scored, what every loss gives, metrics, micro-batches, first losses."""

from __future__ import annotations

import functools
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import losses
from jaxlm.data import pipeline
from jaxlm.data.collate import make_row
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import eval_batches
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.models import decoder, lora
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.layers import project
from jaxlm.models.spec import Param, flatten, normal
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.token_stats import TokenStats
from jaxlm.recipes.preference_losses import (
    BY_RANK,
    PAIRS,
    LossTerm,
    make_pair_values,
    make_response_values,
    make_rewards,
)
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.preference import (
    MAX_TILT,
    TOKENS,
    Responses,
    frozen_alone,
    make_pair_objective,
    make_preference_eval,
    make_preference_loss,
    make_response_objective,
    make_scorer,
    policy_alone,
    segment_sums,
)
from jaxlm.train.reference import make_score_step
from jaxlm.train.state import new_state
from jaxlm.train.step import make_train_step

BYTES = ByteTokenizer()
CFG = DecoderConfig(vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16,
                    scan_layers=False)  # fmt: skip
SPEC = decoder.spec(CFG)
LENGTH, ROWS = 64, 4


def params_of(seed: int, spec=SPEC) -> dict:
    """Parameters far from their initial values, so that no two responses are alike."""
    rng = np.random.default_rng(seed)
    return specs.map_spec(lambda p: jnp.asarray(0.4 * rng.standard_normal(p.shape), jnp.float32), spec)


def source(n: int, seed: int = 0) -> SourceConfig:
    rng = np.random.default_rng(seed)

    def text(least: int, most: int) -> str:
        return "".join(map(chr, rng.integers(97, 123, rng.integers(least, most))))

    rows = [
        {
            "prompt": text(1, 9), "chosen": text(1, 12), "rejected": text(1, 12),
            "completion": text(1, 12), "label": bool(rng.integers(2)),
        }
        for _ in range(n)
    ]  # fmt: skip
    return SourceConfig("memory", rows=tuple(rows), name=f"m{seed}")


def data_of(examples: str = "pairs", *, n: int = 9, **options) -> pipeline.Datasets:
    base = dict(sequence_length=LENGTH, batch_size=ROWS, packing="pack", examples=examples, num_threads=0)
    return pipeline.build(DataConfig(train=(source(n),), **base | options), BYTES)


def batch_of(data: pipeline.Datasets, rows: int | None = None) -> dict[str, np.ndarray]:
    """All rows of the data in one batch, and one that is empty."""
    return next(iter(eval_batches(data.train.sources[0], batch_size=rows or len(data.train.sources[0].plan) + 1)))


def apply(params, tokens, *, positions, segments, key):
    return decoder.forward(params, tokens, cfg=CFG, positions=positions, segments=segments, key=key).hidden


SCORE = make_hidden_scorer(apply, partial(decoder.head, cfg=CFG))
SMALL = {name: {"table": Param((259, 16), ("vocab", "embed"), normal(1.0))} for name in ("embed", "unembed")} | {
    name: {"kernel": Param((16, 16), ("embed", "head_dim"), normal(1.0))} for name in ("q", "k", "v")
}


def small_apply(params, tokens, *, positions, segments, key):
    """One layer of attention: a model that compiles in no time, for what needs its gradients."""
    x = params["embed"]["table"][tokens]
    q, k, v = (project(params[name], x) for name in ("q", "k", "v"))
    mask = attention_mask(positions, positions, segments, segments)
    return jnp.tanh(x + jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(1, 2), -1e9)) @ v)


SMALL_SCORE = make_hidden_scorer(small_apply, lambda params: {"unembed": params["unembed"]["table"]})


@pytest.fixture(scope="module")
def packed():
    """data, a batch that holds all of it, and the scores of two models: policy and reference."""
    data = data_of()
    batch = batch_of(data)
    score = jax.jit(make_scorer(SCORE, slots=data.slots), static_argnums=2)
    return data, batch, score, score(params_of(0), batch, None), score(params_of(1), batch, None)


def documents_of(data: pipeline.Datasets) -> dict[tuple[int, int], object]:
    """(row, slot) -> the document that lies there."""
    rows = data.train.sources[0]
    return {
        (r, s): rows.corpus[piece.document] for r in range(len(rows.plan)) for s, piece in enumerate(rows.pieces(r))
    }


def test_the_batch_is_ragged_and_has_empty_slots(packed):
    """What the other tests rely on."""
    data, batch, _, policy, _ = packed
    lengths = np.asarray(policy.length)
    assert len({len(rows) for rows in data.train.sources[0].plan}) > 1
    assert len(np.unique(lengths[lengths > 0])) > 4
    assert (lengths[-1] == 0).all() and (lengths[:-1, 0] > 0).all()
    assert (lengths == 0).sum() > lengths.shape[1]
    assert (batch["segments"][:-1] == 0).any()


def test_segment_sums_against_a_loop():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    segments = np.sort(rng.integers(0, 7, (5, 40)), axis=1)[:, ::-1].astype(np.int32)
    segments[0] = rng.integers(0, 9, 40)  # in any order, and beyond the slots
    segments[1] = 0
    x[:, :2] = np.where(segments[:, :2] == 0, np.nan, x[:, :2])
    expected = np.zeros((5, 6))
    for b in range(5):
        for t in range(40):
            if 1 <= segments[b, t] <= 6:
                expected[b, segments[b, t] - 1] += np.float64(x[b, t])
    got = segment_sums(jnp.asarray(np.where(segments == 0, np.nan, x)), jnp.asarray(segments), 6)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(got[1], 0)
    half = segment_sums(jnp.ones((1, 4000), jnp.bfloat16), jnp.ones((1, 4000), jnp.int32), 1)
    assert half.dtype == jnp.float32 and float(half[0, 0]) == 4000  # which bfloat16 cannot count to


@pytest.fixture(scope="module")
def singles(packed):
    """Every document alone in a row, and its tokens' statistics."""
    rows = [make_row([(d, 0, len(d.tokens) - 1)], LENGTH) for d in documents_of(packed[0]).values()]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch, jax.jit(lambda p: SCORE(p, batch, None, ("logprob", "entropy")))(params_of(0))


def test_packed_equals_unpacked(packed, singles):
    data, _, _, policy, _ = packed
    batch, stats = singles
    documents = documents_of(data)
    assert len(documents) == 18
    alone = make_scorer(lambda *_: stats, slots=1)(None, batch, None)
    for n, (r, s) in enumerate(documents):
        for field in ("logprob", "entropy"):
            got, want = getattr(policy, field)[r, s], getattr(alone, field)[n, 0]
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5, err_msg=f"{field} of {documents[r, s].origin}")
        assert policy.length[r, s] == alone.length[n, 0] == documents[r, s].mask.sum()
    empty = np.ones(policy.length.shape, bool)
    empty[tuple(np.array(list(documents)).T)] = False
    for field in policy._fields:
        np.testing.assert_array_equal(getattr(policy, field)[empty], 0, err_msg=field)


def test_sums_are_those_of_a_plain_softmax(packed):
    """Against logits of single rows in float64, so that the scorer is not compared with itself."""
    data, _, _, policy, _ = packed
    documents = documents_of(data)
    tokens = np.zeros((len(documents), LENGTH), np.int32)
    for n, d in enumerate(documents.values()):
        tokens[n, : len(d.tokens)] = d.tokens  # what follows, no token of it can see
    hidden = jax.jit(lambda p: decoder.forward(p, tokens, cfg=CFG).hidden)(params_of(0))
    logits = np.asarray(hidden, np.float64) @ np.asarray(params_of(0)["embed"]["table"], np.float64).T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for n, ((r, s), d) in enumerate(documents.items()):
        at = np.flatnonzero(d.mask) - 1
        np.testing.assert_allclose(policy.logprob[r, s], logp[n, at, d.tokens[at + 1]].sum(), rtol=1e-6, atol=1e-5)
        entropy = -(np.exp(logp[n, at]) * logp[n, at]).sum()
        np.testing.assert_allclose(policy.entropy[r, s], entropy, rtol=1e-6, atol=1e-5)


def test_what_is_masked_or_padding_changes_nothing(packed):
    _, batch, score, policy, _ = packed
    rng = np.random.default_rng(1)
    masked = ~batch["mask"]
    padding = batch["segments"] == 0
    assert masked[~padding].any() and padding[:-1].any()
    changed = dict(batch)
    changed["targets"] = np.where(masked, rng.integers(0, 259, masked.shape), batch["targets"]).astype(np.int32)
    changed["inputs"] = np.where(padding, rng.integers(0, 259, masked.shape), batch["inputs"]).astype(np.int32)
    changed["positions"] = np.where(padding, 7, batch["positions"]).astype(np.int32)
    for field, want in zip(policy._fields, policy):
        np.testing.assert_array_equal(getattr(score(params_of(0), changed, None), field), want, err_msg=field)


def test_a_prompt_token_changes_its_own_segment_alone(packed):
    _, batch, score, policy, _ = packed
    row = 0
    for segment in (1, 2, 3):
        at = int(np.flatnonzero(batch["segments"][row] == segment)[0]) + 1  # the token after the begin token
        assert not batch["mask"][row, at - 1]
        changed = dict(batch, inputs=batch["inputs"].copy())
        changed["inputs"][row, at] = ord("~")
        got = score(params_of(0), changed, None)
        differs = np.asarray(got.logprob != policy.logprob)
        assert np.argwhere(differs).tolist() == [[row, segment - 1]]
        assert np.argwhere(np.asarray(got.entropy != policy.entropy)).tolist() == [[row, segment - 1]]


def test_a_prompts_weight_is_in_no_gradient_of_another_segment(packed):
    """By gradients of embeddings: the loss of one slot reads its own row and segment."""
    data, batch, _, _, _ = packed
    table = params_of(0)["embed"]["table"]

    def one(embeddings):
        hidden = decoder.forward(
            params_of(0), None, cfg=CFG, embeddings=embeddings, positions=batch["positions"], segments=batch["segments"]
        ).hidden
        score = make_hidden_scorer(lambda *_, **__: hidden, partial(decoder.head, cfg=CFG))
        return make_scorer(score, slots=data.slots)(params_of(0), batch, None).logprob[1, 1]

    grads = jax.jit(jax.grad(one))(table[batch["inputs"]])
    touched = np.asarray(jnp.abs(grads).sum(-1) > 0)
    here = (np.arange(len(touched))[:, None] == 1) & (batch["segments"] == 2)
    last = np.flatnonzero(here[1])[-1]
    assert touched[here].all() and not touched[~here].any() and batch["mask"][1, last]


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5, 1.0])
def test_ld_alpha_packed_equals_the_loss_function_unpacked(packed, singles, ld_alpha):
    data, batch, _, policy, _ = packed
    documents, (single, alone) = list(documents_of(data)), singles
    tokens = np.zeros(batch["mask"].shape, np.float32)  # the same numbers, token by token, where they lie packed
    for n, (r, s) in enumerate(documents):
        here = batch["segments"][r] == s + 1
        tokens[r, here] = np.asarray(alone.logprob)[n, : here.sum()]
    stats = TokenStats(jnp.asarray(tokens), jnp.zeros(tokens.shape), None)
    got = make_scorer(lambda *_: stats, slots=data.slots, ld_alpha=ld_alpha)(None, batch, None)
    np.testing.assert_array_equal(got.length, policy.length)
    assert [s % 2 for _, s in documents] == [0, 1] * 9  # chosen and rejected, in turn
    chosen, rejected = single["mask"][::2], single["mask"][1::2]
    assert (chosen.sum(1) > rejected.sum(1)).any() and (chosen.sum(1) < rejected.sum(1)).any()
    expected = losses.length_desensitised_sums(
        alone.logprob[::2], alone.logprob[1::2], chosen_mask=chosen, rejected_mask=rejected, ld_alpha=ld_alpha
    )
    for n, (r, s) in enumerate(documents):
        np.testing.assert_allclose(got.logprob[r, s], expected[n % 2][n // 2], rtol=1e-6, atol=1e-6)
    change = float(jnp.abs(got.logprob - policy.logprob).max())
    assert change < 1e-4 if ld_alpha == 1 else change > 1
    assert not got.logprob[-1].any()


OPTIONS = {
    "cdpo": dict(beta=0.1, label_smoothing=0.1), "robust_dpo": dict(beta=0.1, label_smoothing=0.1),
    "exo": dict(beta=0.1, label_smoothing=1e-3), "discopop": dict(beta=0.1, tau=0.5), "dpo_norm": dict(beta=5.0),
    "simpo": dict(beta=2.0, gamma=0.5), "alphapo": dict(beta=0.5, gamma=0.1, alpha=0.25), "sft": {},
    "aot": dict(beta=0.1, label_smoothing=0.1), "aot_unpaired": dict(beta=0.1),
}  # fmt: skip


def term_of(name: str, **changes) -> LossTerm:
    return LossTerm(name, options=OPTIONS.get(name, dict(beta=0.1)), **changes)


def numbers(packed) -> tuple[Responses, jax.Array, dict[str, np.ndarray]]:
    """Scores with empty slots, the reference's, and the present pairs alone as the arguments of a loss."""
    _, _, _, policy, reference = packed
    # Two strange models differ by many nats: the losses are to be compared where they bend.
    referred = policy.logprob + 0.1 * (reference.logprob - policy.logprob)
    present = np.asarray(policy.length > 0)[:, ::2]
    assert 0 < present.sum() < present.size

    def sides(x):
        x = np.asarray(x).reshape(len(x), -1, 2)
        return x[present, 0], x[present, 1]

    policy_sums, reference_sums, lengths = sides(policy.logprob), sides(referred), sides(policy.length)
    return policy, referred, dict(
        policy_chosen=policy_sums[0], policy_rejected=policy_sums[1],
        reference_chosen=reference_sums[0], reference_rejected=reference_sums[1],
        chosen_length=lengths[0], rejected_length=lengths[1],
    )  # fmt: skip


def objective_of(*terms: LossTerm, beta: float = 0.1):
    return make_pair_objective(make_pair_values(terms), rewards=make_rewards(terms), beta=beta)


def direct(name: str, pairs: dict[str, np.ndarray], **more):
    function = PAIRS[name]
    takes = inspect.signature(function).parameters
    arrays = {n: jnp.asarray(x) for n, x in pairs.items() if n in takes}
    return function(**arrays, **OPTIONS.get(name, dict(beta=0.1)), **more)


def total_and_gradient(name: str, policy: Responses, referred):
    """(total, weight) of an objective, and the total's gradient in every slot's log-probability."""
    reference = referred if term_of(name).needs_reference else None

    def total(logprob):
        return objective_of(term_of(name))(policy._replace(logprob=logprob), reference, {})[:2]

    return jax.value_and_grad(total, has_aux=True)(policy.logprob)


@pytest.fixture(scope="module")
def by_name(packed):
    """name -> (objective on packed rows, the same on a batch without pairs, the function on the pairs alone)."""
    policy, referred, pairs = numbers(packed)
    objectives = jax.jit(lambda *given: {name: total_and_gradient(name, *given) for name in PAIRS})

    @jax.jit
    def functions(chosen, rejected):
        def total(c, r, name):
            return direct(name, pairs | dict(policy_chosen=c, policy_rejected=r)).sum()

        return {name: jax.value_and_grad(partial(total, name=name), (0, 1))(chosen, rejected) for name in PAIRS}

    given = objectives(policy, referred), objectives(*jax.tree.map(jnp.zeros_like, (policy, referred)))
    expected = functions(pairs["policy_chosen"], pairs["policy_rejected"])
    return {name: (given[0][name], given[1][name], expected[name]) for name in PAIRS}


@pytest.mark.parametrize("name", PAIRS)
def test_every_loss_gives_what_its_function_gives(packed, by_name, name):
    present = np.asarray(packed[3].length > 0)
    ((total, weight), grads), nothing, (expected, sides) = by_name[name]
    assert weight == present.sum() / 2 == 9
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    np.testing.assert_array_equal(grads[~present], 0)
    np.testing.assert_allclose(grads[present].reshape(-1, 2), np.stack(sides, 1), rtol=2e-5, atol=1e-7)
    assert np.isfinite(grads).all() and np.abs(grads).max() > 1e-3
    (total, weight), grads = nothing
    assert total == 0 and weight == 0
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize("name", BY_RANK)
def test_losses_by_rank_survive_huge_margins_and_ties(name):
    """The filling of empty slots must stay behind whatever pairs there are."""
    logprob = jnp.array([[-1e5, -1.0, 0.0, 0.0], [-3.0, -1e5, -50.0, -50.0], [0.0, 0.0, -7.0, -7.0]])
    length = jnp.where(logprob < 0, 1.0, 0.0)
    reference = jnp.array([[-1.0, -1e5, 0, 0], [-3.0, -3.0, -50.0, -50.0], [0.0, 0.0, -1.0, -9.0]])
    got, weight, _ = objective_of(term_of(name))(Responses(logprob, length, length), reference, {})
    keep = np.array([0, 2, 3, 5])
    columns = (logprob.reshape(-1, 2)[keep], reference.reshape(-1, 2)[keep])
    expected = PAIRS[name](*(x[:, side] for x in columns for side in (0, 1)), **OPTIONS[name])
    assert weight == 4
    np.testing.assert_allclose(got, expected.sum(), rtol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_reach_the_loss(packed, divergence):
    policy, referred, pairs = numbers(packed)
    chosen_map = getattr(losses, divergence)
    chosen_map = partial(chosen_map, alpha=0.3) if divergence == "alpha_divergence" else chosen_map
    total, _, _ = objective_of(term_of("hinge", divergence=divergence, alpha=0.3))(policy, referred, {})
    np.testing.assert_allclose(total, direct("hinge", pairs, divergence=chosen_map).sum(), rtol=2e-6)
    assert abs(float(total - direct("hinge", pairs).sum())) > 1e-3


def test_a_sum_of_losses_is_weighted(packed):
    policy, referred, pairs = numbers(packed)
    weights = {"dpo": 0.8, "bco_pair": 0.2, "sft": 1.0, "aot": 0.5}
    total, _, _ = objective_of(*(term_of(n, weight=w) for n, w in weights.items()))(policy, referred, {})
    np.testing.assert_allclose(total, sum(w * direct(n, pairs).sum() for n, w in weights.items()), rtol=2e-6)


def test_metrics_against_numpy(packed):
    policy, referred, pairs = numbers(packed)
    beta = 0.3
    term = LossTerm("dpo", options=dict(beta=beta))
    _, _, metrics = jax.jit(objective_of(term, beta=beta))(policy, referred, {})
    value = {
        name: float(total) / (1.0 if weight is None else float(weight)) for name, (total, weight) in metrics.items()
    }
    p = {name: np.asarray(x, np.float64) for name, x in pairs.items()}
    a, b = (p[f"policy_{s}"] - p[f"reference_{s}"] for s in ("chosen", "rejected"))
    tokens = p["chosen_length"].sum() + p["rejected_length"].sum()
    tilt = {s: np.exp(np.clip(s * x, -MAX_TILT, MAX_TILT)) for s, x in ((beta, b), (-beta, a))}
    expected = {
        "loss": np.log1p(np.exp(-beta * (a - b))).mean(),
        "rewards_chosen": beta * a.mean(),
        "rewards_rejected": beta * b.mean(),
        "margins": beta * (a - b).mean(),
        "accuracies": (a > b).mean(),
        "logprob_chosen": p["policy_chosen"].mean(),
        "logprob_rejected": p["policy_rejected"].mean(),
        "chosen_tokens": p["chosen_length"].mean(),
        "rejected_tokens": p["rejected_length"].mean(),
        "entropy": np.asarray(policy.entropy, np.float64).sum() / tokens,
        "tokens": tokens,
        "pairs": 9,
        "displacement_chosen": a.mean(),
        "displacement_rejected": b.mean(),
        "displacement_chosen_predicted": (tilt[beta] * b).sum() / tilt[beta].sum(),
        "displacement_rejected_predicted": (tilt[-beta] * a).sum() / tilt[-beta].sum(),
        "ordered": (a > b).mean(),
    }
    assert value.keys() == expected.keys()
    assert 0 < expected["accuracies"] < 1
    for name, want in expected.items():
        np.testing.assert_allclose(value[name], want, rtol=2e-5, atol=1e-6, err_msg=name)


def test_metrics_without_a_reference(packed):
    policy, _, pairs = numbers(packed)
    p = {name: np.asarray(x, np.float64) for name, x in pairs.items()}
    means = {s: p[f"policy_{s}"] / p[f"{s}_length"] for s in ("chosen", "rejected")}
    _, _, metrics = objective_of(term_of("simpo"))(policy, None, {})
    assert not any(name.startswith("displacement") or name == "ordered" for name in metrics)
    for name, want in {
        "rewards_chosen": 2 * means["chosen"].mean(),
        "margins": 2 * (means["chosen"] - means["rejected"]).mean(),
        "accuracies": (means["chosen"] > means["rejected"]).mean(),
    }.items():
        np.testing.assert_allclose(metrics[name][0] / metrics[name][1], want, rtol=1e-5, err_msg=name)
    _, _, metrics = objective_of(term_of("cpo"))(policy, None, {})  # compares sums
    margin = 0.1 * (p["policy_chosen"] - p["policy_rejected"]).mean()
    np.testing.assert_allclose(metrics["margins"][0] / metrics["margins"][1], margin, rtol=1e-5)


def test_rewards_are_what_the_loss_compares():
    """A chosen response that is likelier as a whole, and less likely per token: the loss says that it loses."""
    scored = Responses(jnp.array([[-9.0, -8.9]]), jnp.zeros((1, 2)), jnp.array([[20.0, 1.0]]))
    reference = jnp.array([[-11.0, -10.0]])
    total, _, metrics = objective_of(term_of("dpo_norm"))(scored, reference, {})
    assert total > math.log(2)  # 2 / 20 against 1.1 / 1
    assert metrics["accuracies"][0] == 0


def test_metrics_stay_finite_far_from_the_reference_and_without_pairs():
    logprob, ones = jnp.array([[-1.0, -2e4, -2e4, -1.0]]), jnp.ones((1, 4))
    for length in (ones, 0 * ones):
        scored = Responses(logprob, ones, length)
        metrics = objective_of(term_of("dpo"))(scored, jnp.array([[-2e4, -1.0, -1.0, -2e4]]), {})[2]
        assert all(np.isfinite(x) for pair in metrics.values() for x in pair if x is not None)


@pytest.fixture(scope="module")
def responses():
    """Labelled responses, each beside a mismatched one: data, batch, and the scores of policy and reference."""
    data = data_of("responses_mismatched")
    batch = batch_of(data)
    score = jax.jit(make_scorer(SCORE, slots=data.slots), static_argnums=2)
    policy, reference = (score(params_of(seed), batch, None) for seed in (0, 1))
    return batch, policy, policy.logprob + 0.05 * (reference.logprob - policy.logprob)


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.parametrize("sign", [1, -1])
def test_losses_of_responses_equal_direct_calls(responses, name, sign):
    batch, policy, reference = responses
    # With the other sign KTO's baseline is bounded by 0 the other way.
    reference = policy.logprob + sign * (reference - policy.logprob)
    mismatched = name == "kto"
    if not mismatched:  # the very same responses, without the borrowed ones
        policy, reference = Responses(*(x[:, ::2] for x in policy)), reference[:, ::2]
        batch = dict(batch, labels=batch["labels"][:, ::2])
    options = dict(beta=0.2) | (dict(desirable_weight=1.2, undesirable_weight=0.7) if name == "kto" else {})
    term = LossTerm(name, options=options)
    objective = make_response_objective(make_response_values(term), beta=0.2, mismatched=mismatched)
    total, weight, metrics = jax.jit(objective)(policy, reference, batch)

    step = 2 if mismatched else 1
    present = np.asarray(policy.length[:, ::step] > 0)
    own, referred = (np.asarray(x[:, ::step])[present] for x in (policy.logprob, reference))
    labels = np.asarray(batch["labels"])[:, ::step][present]
    assert weight == len(own) == 9 and 0 < labels.sum() < 9
    arrays = tuple(map(jnp.asarray, (own, referred, labels)))
    if name == "kto":
        others = [np.asarray(x[:, 1::2])[present] for x in (policy.logprob, reference)]
        baseline = max(0.0, float(np.mean(others[0].astype(np.float64) - others[1])))
        expected = losses.kto(*arrays, baseline=baseline, **options)
    elif name == "bco":
        expected = losses.bco(*arrays, baseline=float(np.mean(0.2 * (own.astype(np.float64) - referred))), **options)
    else:
        expected = losses.apo_zero_unpaired(*arrays, **options)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)

    value = {n: float(t) / (1.0 if w is None else float(w)) for n, (t, w) in metrics.items()}
    reward = 0.2 * (own - referred)
    scored = np.asarray(policy.entropy).sum() / np.asarray(policy.length).sum()
    for n, want in {
        "loss": expected.mean(), "rewards_chosen": reward[labels].mean(), "rewards_rejected": reward[~labels].mean(),
        "logprob_chosen": own[labels].mean(), "logprob_rejected": own[~labels].mean(), "responses": 9,
        "entropy": scored, "tokens": np.asarray(policy.length).sum(),
    }.items():  # fmt: skip
        np.testing.assert_allclose(value[n], want, rtol=1e-5, err_msg=n)

    def by_logprob(logprob, scored, referred):
        return objective(scored._replace(logprob=logprob), referred, batch)[:2]

    value_and_grad = jax.jit(jax.value_and_grad(by_logprob, has_aux=True))
    _, grads = value_and_grad(policy.logprob, policy, reference)
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(grads[np.asarray(policy.length) == 0], 0)
    if mismatched:
        np.testing.assert_array_equal(grads[:, 1::2], 0)  # the baseline is detached
    assert (grads[:, ::step][present][labels] < 0).all() and (grads[:, ::step][present][~labels] > 0).all()

    nothing = jax.tree.map(jnp.zeros_like, (policy.logprob, policy, reference))
    (total, weight), grads = value_and_grad(*nothing)
    assert total == 0 and weight == 0
    np.testing.assert_array_equal(grads, 0)


@functools.cache
def steps_of(num_microbatches: int):
    """Metrics of two steps of plain descent on batches of 4 ragged rows, and the parameters after them."""
    data = data_of(n=40)
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    loss = make_preference_loss(scorer, objective_of(term_of("dpo")), reference=frozen_alone)
    optimizer = optax.sgd(0.3)
    step = jax.jit(make_train_step(loss, optimizer, seed=0, num_microbatches=num_microbatches))
    state = new_state(params_of(0, SMALL), optimizer).replace(frozen=params_of(1, SMALL))
    lines = []
    for i in range(2):
        batch = data.train.batch(i)
        assert len(set(batch["segments"].max(axis=1).tolist())) > 1  # rows weigh differently
        state, metrics = step(state, batch)
        lines.append({n: float(t) / (1.0 if w is None else float(w)) for n, (t, w) in metrics.items()})
    return lines, state.params


COUNTS = {"tokens", "pairs"}
"""Of a whole step."""


@pytest.mark.parametrize("k", [2, 4])
def test_micro_batches_equal_one_batch(k):
    (lines, params), (one, expected) = steps_of(k), steps_of(1)
    for got, want in zip(lines, one, strict=True):
        for name in want.keys() - COUNTS:
            assert got[name] == pytest.approx(want[name], rel=2e-6, abs=1e-6), name
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, params_of(0, SMALL))
    assert min(jax.tree.leaves(moved)) > 1e-3  # every parameter was trained
    for path, x in flatten(expected).items():
        np.testing.assert_allclose(flatten(params)[path], x, atol=1e-6, rtol=0, err_msg=path)


def test_counts_do_not_depend_on_micro_batches():
    got, want = steps_of(4)[0][0], steps_of(1)[0][0]
    assert {name: got[name] for name in COUNTS} == {name: want[name] for name in COUNTS}


def test_an_empty_row_weighs_nothing_through_the_model(packed):
    """Value and every gradient: wherever it stands, and where there is nothing else."""
    data, batch, _, _, _ = packed
    assert (batch["segments"][-1] == 0).all()
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    loss = make_preference_loss(scorer, objective_of(term_of("dpo"), term_of("simpo")), reference=frozen_alone)
    frozen = params_of(1, SMALL)

    @jax.jit
    def value_and_grad(batch):
        return jax.value_and_grad(lambda p: loss(p, batch, None, frozen=frozen)[:2], has_aux=True)(params_of(0, SMALL))

    (nothing, weight), grads = value_and_grad(jax.tree.map(lambda x: np.stack([x[-1]] * len(x)), batch))
    assert nothing == 0 and weight == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)
    (total, weight), grads = value_and_grad(batch)
    (moved, _), moved_grads = value_and_grad(jax.tree.map(lambda x: np.concatenate([x[-1:], x[:-1]]), batch))
    assert weight == 9
    np.testing.assert_allclose(moved, total, rtol=1e-6)
    for path, g in flatten(grads).items():
        assert np.isfinite(g).all() and float(jnp.abs(g).max()) > 0.01
        np.testing.assert_allclose(flatten(moved_grads)[path], g, atol=1e-5, err_msg=path)


LORA = lora.LoraConfig(rank=2)


def with_adapters(adapters, base):
    return lora.join(base, adapters, LORA)


REFERENCES = {  # adapters, policy, reference (None: cached in the batch)
    "cached": (False, policy_alone, None),
    "live": (False, policy_alone, frozen_alone),
    "lora cached": (True, with_adapters, None),
    "lora live": (True, with_adapters, frozen_alone),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_first_loss_is_log_2(packed, kind):
    data, batch, _, _, _ = packed
    adapted, policy, reference = REFERENCES[kind]
    base = params_of(0, SMALL)
    trained = specs.init(jax.random.key(3), lora.lora_spec(SMALL, LORA)) if adapted else base
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    score = make_score_step(scorer, make_mesh(MeshConfig(), jax.devices()[:1]))
    tokens = {name: batch[name] for name in TOKENS}
    given = batch if reference else dict(batch, reference=np.asarray(score(base, tokens).logprob))
    objective = objective_of(term_of("dpo"))
    metrics = make_preference_eval(score, objective, policy=policy, reference=reference)((trained, base), given)
    value = {name: float(t) / (1.0 if w is None else float(w)) for name, (t, w) in metrics.items()}
    for name in ("margins", "rewards_chosen", "rewards_rejected", "displacement_chosen", "displacement_rejected"):
        assert value[name] == 0.0, name
    assert value["accuracies"] == value["ordered"] == 0.0
    assert value["loss"] == pytest.approx(math.log(2), abs=6e-8)  # the sum of 9 equal numbers is rounded

    loss = make_preference_loss(scorer, objective, policy=policy, reference=reference)
    first = jax.jit(jax.value_and_grad(lambda p: loss(p, given, None, frozen=base)[:2], has_aux=True))
    (total, weight), grads = first(trained)
    assert float(total / weight) == pytest.approx(math.log(2), abs=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3


def test_a_reference_passes_no_gradient(packed):
    """Where policy and reference are the very same parameters, only the policy's side is differentiated."""
    data, batch, _, _, _ = packed
    scorer = make_scorer(SMALL_SCORE, slots=data.slots)
    live = make_preference_loss(scorer, objective_of(term_of("dpo")), reference=policy_alone)
    cached = make_preference_loss(scorer, objective_of(term_of("dpo")))
    params = params_of(0, SMALL)
    given = dict(batch, reference=jax.jit(scorer)(params, batch, None).logprob)
    grads = [jax.jit(jax.grad(lambda p, f=f: f(p, given, None)[0]))(params) for f in (live, cached)]
    for path, g in flatten(grads[0]).items():
        np.testing.assert_allclose(flatten(grads[1])[path], g, atol=1e-5, err_msg=path)
        assert float(jnp.abs(g).max()) > 0.01
