"""A preference step holds no array of tokens by vocabulary, forward or backward: read from the compiled program."""

from __future__ import annotations

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.data.batch import empty_row, stack_rows
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.preference_losses import LossTerm, make_pair_values, make_rewards
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.objectives import Score, make_hidden_scorer, make_logits_scorer
from jaxlm.train.preference import (
    frozen_alone,
    make_pair_objective,
    make_preference_loss,
    make_scorer,
)
from jaxlm.train.reference import make_score_step
from jaxlm.train.state import new_state
from jaxlm.train.step import make_train_step

B, T, V, SLOTS = 2, 256, 4096, 4
CFG = DecoderConfig(vocab_size=V, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32,
                    scan_layers=False)  # fmt: skip
OPTIMIZER = optax.adamw(1e-4)


def hidden(params, tokens, *, positions, segments, key):
    return decoder.forward(params, tokens, cfg=CFG, positions=positions, segments=segments, key=key).hidden


def logits(params, tokens, **rest):
    return hidden(params, tokens, **rest) @ decoder.head(params, cfg=CFG)["unembed"].T


HEAD = partial(decoder.head, cfg=CFG)
SCORERS: dict[str, Score] = {
    "every position": make_hidden_scorer(hidden, HEAD),
    "targets alone": make_hidden_scorer(hidden, HEAD, capacity=128),
    "logits": make_logits_scorer(logits),
    "dense": make_hidden_scorer(hidden, lambda params: HEAD(params) | {"implementation": "dense"}),
}


def abstract() -> tuple[dict, dict]:
    """Shapes of the parameters and of a batch."""
    params = jax.eval_shape(lambda: specs.init(jax.random.key(0), decoder.spec(CFG)))
    batch = stack_rows([empty_row(T)] * B)
    return params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def train_step_text(score: Score) -> str:
    """The optimised program of a step of DPO beside a live reference."""
    terms = [LossTerm("dpo")]
    objective = make_pair_objective(make_pair_values(terms), rewards=make_rewards(terms), beta=0.1)
    loss = make_preference_loss(make_scorer(score, slots=SLOTS), objective, reference=frozen_alone)
    params, batch = abstract()
    state = jax.eval_shape(lambda p: new_state(p, OPTIMIZER).replace(frozen=p), params)
    step = make_train_step(loss, OPTIMIZER, seed=0)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile().as_text()


def score_step_text(score: Score) -> str:
    """The optimised program that makes the cached reference, and evaluations."""
    step = make_score_step(make_scorer(score, slots=SLOTS), make_mesh(MeshConfig(), jax.devices()[:1]))
    return step.lower(*abstract()).compile().as_text()


def largest_array(text: str) -> int:
    """Elements of the largest array of any type that the program names, in whatever shape."""
    shapes = re.findall(r"\b(?:pred|bf16|[a-z]\d+\w*)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_shapes_are_found():
    for shape, size in {"f32[2,256,4096]{2,1,0}": B * T * V, "bf16[512,4096]": B * T * V, "pred[9]": 9,
                        "f8e4m3fn[600,8]{1,0}": 4800, "u8[3,3]": 9}.items():  # fmt: skip
        assert largest_array(f"%a = (s32[2], {shape}) add(s32[] %b, f32[2,4] %c)") == size


@pytest.mark.parametrize("name", [pytest.param("every position", marks=pytest.mark.slow), "targets alone"])
def test_no_array_of_tokens_by_vocabulary(name):
    for text in (train_step_text(SCORERS[name]), score_step_text(SCORERS[name])):
        assert f"[{V},{CFG.width}]" in text  # the unembedding is there
        # The largest is a tile of logits, half of the vocabulary wide at this size.
        assert largest_array(text) < B * T * V


@pytest.mark.parametrize("name", ["logits", "dense"])
def test_a_model_that_returns_logits_has_one(name):
    assert largest_array(score_step_text(SCORERS[name])) >= B * T * V
    if name == "logits":
        assert largest_array(train_step_text(SCORERS[name])) >= B * T * V


def test_what_is_compiled_is_a_step_of_dpo():
    """The shapes above belong to a step that counts: its first loss is log 2, and its gradient is none of zeros."""
    score = SCORERS["targets alone"]
    terms = [LossTerm("dpo")]
    objective = make_pair_objective(make_pair_values(terms), rewards=make_rewards(terms), beta=0.1)
    loss = make_preference_loss(make_scorer(score, slots=SLOTS), objective, reference=frozen_alone)
    params = specs.init(jax.random.key(0), decoder.spec(CFG))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (2, B, T)).astype(np.int32)
    segments = np.repeat(np.arange(1, SLOTS + 1, dtype=np.int32), T // SLOTS)[None].repeat(B, 0)
    at = np.arange(T) % (T // SLOTS)
    batch = dict(inputs=tokens[0], targets=tokens[1], segments=segments, positions=np.stack([at] * B).astype(np.int32),
                 mask=np.stack([at >= 40] * B))  # fmt: skip
    total, weight, metrics = jax.jit(lambda p: loss(p, batch, None, frozen=p))(params)
    assert weight == B * SLOTS / 2 and metrics["tokens"][0] == B * SLOTS * 24
    np.testing.assert_allclose(total / weight, math.log(2), atol=1e-6)
    assert jnp.isfinite(metrics["logprob_chosen"][0])
