"""Who sees whom, against loops over every pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.masks import attention_mask, segment_positions


@pytest.mark.parametrize("window", [None, 1, 2, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_every_pair(window, packed):
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 6, (2, 7))
    segments = rng.integers(0, 3, (2, 7)) if packed else None
    want = np.zeros((2, 7, 7), bool)
    for b, t, s in np.ndindex(2, 7, 7):
        distance = positions[b, t] - positions[b, s]
        together = segments is None or segments[b, t] == segments[b, s] != 0
        want[b, t, s] = distance >= 0 and together and (window is None or distance < window)
    got = attention_mask(positions, positions, segments, segments, window=window)
    np.testing.assert_array_equal(got, want)


def test_segment_positions_restart():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [5, 3, 3, 5, 5, 5, 5]])
    want = [[0, 1, 0, 1, 2, 0, 1], [0, 0, 1, 0, 1, 2, 3]]
    np.testing.assert_array_equal(segment_positions(segments), want)
