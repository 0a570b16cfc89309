"""Summed log-probabilities of packed completions against transformers, one unpadded response at a time."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxlm.data import pipeline  # noqa: E402
from jaxlm.data.config import DataConfig  # noqa: E402
from jaxlm.data.loader import eval_batches  # noqa: E402
from jaxlm.data.sources import SourceConfig  # noqa: E402
from jaxlm.data.tokenizer import ByteTokenizer  # noqa: E402
from jaxlm.models import decoder, hf  # noqa: E402
from jaxlm.models import spec as specs  # noqa: E402
from jaxlm.models.config import DecoderConfig  # noqa: E402
from jaxlm.train.objectives import make_hidden_scorer  # noqa: E402
from jaxlm.train.preference import make_scorer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers' and torch's own; ours are errors in every other file
]

LLAMA = DecoderConfig(
    vocab_size=260, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_length=256,
    tie_embeddings=False,
)  # fmt: skip
FAMILIES = {"llama": LLAMA, "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6)}


def pairs(n: int = 17) -> tuple[dict[str, str], ...]:
    rng = np.random.default_rng(0)

    def text(most: int) -> str:
        return bytes(rng.integers(32, 127, rng.integers(1, most)).astype(np.uint8)).decode()

    return tuple({"prompt": text(20), "chosen": text(30), "rejected": text(30)} for _ in range(n))


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_score_alike(family, tmp_path):
    cfg = FAMILIES[family]
    rng = np.random.default_rng(1)
    params = specs.init(jax.random.key(0), decoder.spec(cfg))  # norms and biases moved from where a mix-up is hidden
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), params)
    hf.save(tmp_path / "model", params, cfg, family=family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert model.config.model_type == family

    data = pipeline.build(
        DataConfig(
            train=(SourceConfig("memory", rows=pairs()),), examples="pairs", packing="pack", sequence_length=160
        ),
        ByteTokenizer(),
    )
    rows = data.train.sources[0]
    (batch,) = eval_batches(rows, batch_size=len(rows.plan) + 1)
    assert data.slots >= 4 and data.capacity < 160

    def apply(params, tokens, *, positions, segments, key):
        return decoder.forward(params, tokens, cfg=cfg, positions=positions, segments=segments, key=key).hidden

    score = make_hidden_scorer(apply, partial(decoder.head, cfg=cfg), capacity=data.capacity)
    scored = jax.jit(make_scorer(score, slots=data.slots), static_argnums=2)(params, batch, None)

    compared = []
    for r in range(len(rows.plan)):
        for s, piece in enumerate(rows.pieces(r)):
            document = rows.corpus[piece.document]
            tokens = torch.tensor(document.tokens)[None].long()
            with torch.no_grad():
                logp = torch.log_softmax(model(tokens[:, :-1]).logits.double(), dim=-1)[0]
            each = logp.gather(1, tokens[0, 1:, None])[:, 0]
            kept = torch.tensor(document.mask[1:])
            assert scored.length[r, s] == int(kept.sum())
            compared.append((float(scored.logprob[r, s]), float(each[kept].sum())))
            entropy = float(-(logp.exp() * logp).sum(-1)[kept].sum())
            np.testing.assert_allclose(scored.entropy[r, s], entropy, rtol=1e-5)
    got, want = np.array(compared).T
    assert len(got) == 2 * 17 and np.ptp(want) > 50
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    assert (np.abs(got[::2] - got[1::2]) > 1e-2).all()  # chosen and rejected are not the same numbers
