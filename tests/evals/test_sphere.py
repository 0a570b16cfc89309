"""Alignment and uniformity of whole sets: the losses' own numbers, in blocks, and the ends of the scale."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import losses
from jaxlm.evals import sphere


def test_they_are_those_of_the_losses(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 23, 5)).astype(np.float32)
    monkeypatch.setattr(sphere, "BLOCK", 7)
    assert sphere.uniformity(x) == pytest.approx(float(losses.uniformity(jnp.asarray(x))), abs=1e-5)
    assert sphere.alignment(x, y) == pytest.approx(
        float(losses.alignment(jnp.asarray(x), jnp.asarray(y)).mean()), abs=1e-5
    )


def test_the_ends_of_the_scale():
    assert sphere.uniformity(np.ones((9, 3))) == pytest.approx(0, abs=1e-12)
    assert sphere.alignment(np.eye(3), 5 * np.eye(3)) == pytest.approx(0, abs=1e-12)
    assert np.isnan(sphere.alignment(np.zeros((0, 3)), np.zeros((0, 3))))
    with pytest.raises(ValueError, match="at least 2, found 1"):
        sphere.uniformity(np.eye(1))
