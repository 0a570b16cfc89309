"""Contrastive and similarity losses against sentence-transformers' own, in float64: values and gradients."""

from __future__ import annotations

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports; ours are errors in every other file
    from sentence_transformers.sentence_transformer import losses as theirs

from jaxlm import losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

B, E, TEMPERATURE = 7, 12, 0.2
SCORE = np.array([0.0, 1.0, 2.0, 2.0, 3.5, 5.0, 4.0])


class Given(torch.nn.Module):
    """A model whose sentence embeddings are the features."""

    def forward(self, features):
        return features

    def get_embedding_dimension(self):
        return E


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def vectors(number: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(number, B, E)))


def assert_equal_to_theirs(ours, loss, arrays, labels=None):
    """The same value, and the same gradient for every array."""
    theirs_in = [torch.tensor(x, requires_grad=True) for x in arrays]
    value = loss([{"sentence_embedding": x} for x in theirs_in], None if labels is None else torch.tensor(labels))
    value.backward()
    found, grads = jax.value_and_grad(lambda xs: jnp.mean(ours(*xs)))([jnp.asarray(x) for x in arrays])
    np.testing.assert_allclose(found, value.item(), rtol=1e-9)
    for grad, x in zip(grads, theirs_in, strict=True):
        np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-7, atol=1e-12)


def test_info_nce():
    loss = theirs.MultipleNegativesRankingLoss(Given(), scale=1 / TEMPERATURE)
    assert_equal_to_theirs(partial(losses.info_nce, temperature=TEMPERATURE), loss, vectors(2))


def test_symmetric_info_nce():
    loss = theirs.MultipleNegativesSymmetricRankingLoss(Given(), scale=1 / TEMPERATURE)
    assert_equal_to_theirs(partial(losses.symmetric_info_nce, temperature=TEMPERATURE), loss, vectors(2))


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_simcse_with_hard_negatives(negatives):
    def ours(query, positive, *hard):
        stacked = jnp.stack(hard, axis=1) if hard else None
        return losses.simcse(query, positive, stacked, temperature=TEMPERATURE)

    loss = theirs.MultipleNegativesRankingLoss(Given(), scale=1 / TEMPERATURE)
    assert_equal_to_theirs(ours, loss, vectors(2 + negatives))


@pytest.mark.parametrize(
    ("ours", "loss"),
    [
        (losses.cosent, theirs.CoSENTLoss),
        (losses.angle, theirs.AnglELoss),
        (losses.cosine_mse, theirs.CosineSimilarityLoss),
    ],
)
def test_losses_on_scores(ours, loss):
    score = SCORE / 8  # exact in float32, which theirs rounds scores to
    assert_equal_to_theirs(lambda a, b: ours(a, b, jnp.asarray(score)), loss(Given()), vectors(2), score)


@pytest.mark.parametrize("weights", [None, [0.3, 1.0, 0.5]])
def test_matryoshka(weights):
    dims = [E, 6, 2]
    inner = theirs.MultipleNegativesRankingLoss(Given(), scale=1 / TEMPERATURE)
    loss = theirs.MatryoshkaLoss(Given(), inner, matryoshka_dims=dims, matryoshka_weights=weights)
    ours = partial(losses.matryoshka(losses.info_nce, dims=dims, weights=weights), temperature=TEMPERATURE)
    arrays = vectors(2)
    value = sum(
        w * inner([{"sentence_embedding": torch.tensor(x[:, :m])} for x in arrays], None).item()
        for m, w in zip(loss.matryoshka_dims, loss.matryoshka_weights, strict=True)
    )
    np.testing.assert_allclose(jnp.mean(ours(*map(jnp.asarray, arrays))), value, rtol=1e-9)


@pytest.mark.parametrize(("margin", "relative"), [(0.0, False), (0.1, False), (0.2, True)])
def test_guided_masks_are_those_of_gist(margin, relative):
    """GIST also takes a-a and p-p negatives; the mask of each part is ours, and so is the sum of all parts."""
    a, p, guide_a, guide_p = vectors(4, seed=3)

    class Guide(torch.nn.Module):
        """Two models in one: features hold the guide's vectors beside the model's."""

        tokenizer = None

        def forward(self, features):
            return {"sentence_embedding": features["guide"]}

    loss = theirs.GISTEmbedLoss.__new__(theirs.GISTEmbedLoss)
    torch.nn.Module.__init__(loss)
    loss.model, loss.guide, loss.temperature = Given(), Guide(), TEMPERATURE
    loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    loss.must_retokenize, loss.gather_across_devices = False, False
    loss.margin_strategy, loss.margin = ("relative" if relative else "absolute"), margin
    loss.contrast_anchors = loss.contrast_positives = False
    features = [
        {"sentence_embedding": torch.tensor(x), "guide": torch.tensor(g)} for x, g in ((a, guide_a), (p, guide_p))
    ]
    own = losses.cosine(jnp.asarray(guide_a), jnp.asarray(guide_p))
    mask = losses.guided_negatives(
        losses.cosines(jnp.asarray(guide_a), jnp.asarray(guide_p)), own, margin=margin, relative=relative
    )
    found = losses.info_nce(jnp.asarray(a), jnp.asarray(p), temperature=TEMPERATURE, negative_mask=mask)
    assert 0 < int((~mask).sum()) < B * B
    np.testing.assert_allclose(jnp.mean(found), loss(features, None).item(), rtol=1e-9)
