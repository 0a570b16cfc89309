"""The Hopper kernel: float64's numbers, interpreted on CPUs and compiled where there is such a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxlm.ops.platform import compiling_for
from jaxlm.ops.token_stats import dispatch, mosaic_gpu, token_stats, token_stats_sharded
from jaxlm.ops.token_stats.head import Head

ALL = ("logprob", "entropy", "logsumexp")
pytestmark = pytest.mark.skipif(not mosaic_gpu.supported(), reason="needs jax 0.11 or newer")


def problem(n, v, d=64, dtype=jnp.bfloat16, scale=1.0):
    keys = jax.random.split(jax.random.key(n + v), 3)
    unembed = (scale * d**-0.5 * jax.random.normal(keys[1], (v, d))).astype(dtype)
    return jax.random.normal(keys[0], (n, d), dtype), unembed, jax.random.randint(keys[2], (n,), 0, v)


def exact(hidden, unembed, targets, *, temperature=1.0):
    """In numpy, in float64, on the same numbers."""
    z = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T / temperature
    m = z.max(axis=1, keepdims=True)
    log_p = z - m - np.log(np.exp(z - m).sum(axis=1, keepdims=True))
    return log_p[np.arange(len(z)), np.asarray(targets)], -(np.exp(log_p) * log_p).sum(axis=1), (z - log_p)[:, 0]


def largest_logit(hidden, unembed):
    return max(1, np.abs(np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T).max())


kernel = partial(token_stats, outputs=ALL, implementation="mosaic_gpu")


@pytest.mark.parametrize("n, v", [(1, 264), (256, 256), (300, 8), (300, 520)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_at_ragged_edges_are_within_the_bound_of_their_inputs(n, v, scale):
    arrays = problem(n, v, scale=scale)
    got = kernel(*arrays)
    for a, b in zip(got, exact(*arrays)):
        np.testing.assert_allclose(a, b, atol=2e-5 * largest_logit(*arrays[:2]), rtol=0)
    assert (got.logprob <= 0).all() and (got.entropy >= 0).all()


def test_an_offset_of_all_logits_costs_no_digits():
    hidden, unembed, targets = problem(256, 512)
    hidden, unembed = hidden.at[:, 0].set(1), unembed.at[:, 0].set(1024)
    got = kernel(hidden, unembed, targets)
    for a, b in zip(got[:2], exact(hidden, unembed, targets)):
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=0)  # one float32 rounding of 1024 is 1.2e-4


def test_temperature_and_float32_masters():
    hidden, unembed, targets = problem(256, 264)
    got = kernel(hidden, unembed.astype(jnp.float32), targets, temperature=0.3)
    for a, b in zip(got, exact(hidden, unembed, targets, temperature=0.3)):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)


def test_masked_tokens_and_targets_outside_the_vocabulary():
    hidden, unembed, targets = problem(600, 264)
    mask = np.arange(600) % 3 == 0
    blanked = jnp.where(mask[:, None], hidden, jnp.nan), unembed, jnp.where(mask, targets, -9)
    got = kernel(*blanked, mask=jnp.asarray(mask))
    for a, b in zip(got, exact(hidden, unembed, targets)):
        np.testing.assert_allclose(np.asarray(a)[mask], b[mask], atol=1e-4)
        assert not np.asarray(a)[~mask].any()
    outside = kernel(hidden[:2], unembed, jnp.array([264, -1]))
    assert np.asarray(outside.logprob).tolist() == [-np.inf, -np.inf] and np.isfinite(outside.entropy).all()


def test_what_is_not_computed_is_neutral():
    hidden, unembed, targets = problem(600, 264)
    sums = mosaic_gpu.sums(Head(hidden, unembed, None, None), targets, jnp.int32(100), soft_cap=None, entropy=True)
    assert not np.asarray(sums.maximum)[100:].any() and (np.asarray(sums.exp)[100:] >= 1).all()


def gradients(implementation, arrays, mask=None):
    hidden, unembed, targets = arrays

    def total(hidden, unembed):
        stats = token_stats(
            hidden, unembed, targets, mask=mask, temperature=0.7, outputs=ALL, implementation=implementation
        )
        return sum(jnp.sum(jnp.sin(jnp.arange(len(hidden)) + i) * x) for i, x in enumerate(jax.tree.leaves(stats)))

    return total, jax.jit(jax.grad(total, (0, 1)))(hidden, unembed)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_tiled(masked):
    arrays = problem(520, 264)
    mask = jnp.arange(520) % 4 == 0 if masked else None
    for a, b in zip(*(gradients(name, arrays, mask)[1] for name in ("mosaic_gpu", "tiled"))):
        assert np.linalg.norm(np.float32(a) - np.float32(b)) <= 4e-3 * np.linalg.norm(np.float32(b))


def test_second_derivatives_and_vmap_are_those_of_tiled():
    hidden, unembed, targets = problem(2, 16)

    def curvature(name):
        total, _ = gradients(name, (hidden, unembed, targets))
        return jax.jit(lambda h: jax.jvp(jax.grad(total), (h, unembed), (h, unembed))[1])(hidden)

    a, b = (np.float32(curvature(name)) for name in ("mosaic_gpu", "tiled"))
    assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)
    both = jnp.stack([hidden, 2 * hidden])
    stats = partial(token_stats, unembed=unembed, targets=targets)
    a, b = (jax.vmap(partial(stats, implementation=name))(both) for name in ("mosaic_gpu", "tiled"))
    np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"soft_cap": 3.0}, "no soft-cap"), ({"d": 40}, "multiple of 64"), ({"v": 100}, "not 64 and 100"),
        ({"dtype": jnp.float32}, "not float32"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(options, match):
    soft_cap = options.pop("soft_cap", None)
    with pytest.raises(ValueError, match=f"{match}.*use implementation='tiled'"):
        kernel(*problem(8, options.pop("v", 64), **options), soft_cap=soft_cap)


def test_it_is_chosen_on_hopper_gpus(monkeypatch):
    hidden, unembed, targets = problem(8, 64)
    monkeypatch.setattr(dispatch, "_hopper", lambda: True)

    def chosen(outputs=("logprob", "entropy"), targets=targets, soft_cap=None, whole=True, platform="gpu"):
        with compiling_for(platform):
            return dispatch.best(Head(hidden, unembed, None, None), soft_cap, targets, outputs, whole=whole)

    assert chosen() == "mosaic_gpu"
    others = {"soft_cap": 30.0}, {"outputs": ("argmax",)}, {"targets": targets[:, None]}, {"whole": False}
    assert [chosen(**other) for other in (*others, {"platform": "cpu"})] == ["tiled"] * 5
    monkeypatch.setattr(dispatch, "_hopper", lambda: False)
    assert chosen() == "tiled"


@pytest.mark.parametrize("width_axis", [None, "data"])
def test_in_blocks_where_the_unembedding_is_cast_or_gathered(width_axis, monkeypatch):
    # One device: the interpreter keeps one memory for all of them.
    monkeypatch.setattr(importlib.import_module("jaxlm.ops.token_stats.tiled"), "KERNEL_COPY", 256 * 64 * 2)
    hidden, unembed, targets = problem(192, 520)  # blocks of 256, 256 and 8
    mask = jnp.arange(192).reshape(2, 96) % 5 != 0
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    got = jax.jit(partial(
        token_stats_sharded, mask=mask, mesh=mesh, token_axes=("data", None), vocab_axis="tensor",
        width_axis=width_axis, outputs=ALL, implementation="mosaic_gpu",
    ))(hidden.reshape(2, 96, 64), unembed.astype(jnp.float32), targets.reshape(2, 96))  # fmt: skip
    for a, b in zip(got, exact(hidden, unembed, targets)):
        kept = np.asarray(mask)
        np.testing.assert_allclose(np.asarray(a)[kept], b.reshape(2, 96)[kept], atol=5e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jaxlm[cuda], on Python 3.12")
@pytest.mark.parametrize("topology", ["h100:1x1", "h200:1x1"])
def test_it_compiles_for_cards_that_are_not_here_and_holds_no_logits(topology, tmp_path):
    n, d, v = 2048, 1024, 151_936
    size = f"--tokens {n} --width {d} --vocab {v} --json {tmp_path / 'out.json'}".split()
    command = [sys.executable, "-m", "jaxlm.cli", "bench", "token_stats", "--compile-for", topology, *size]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())["programs"]
    assert len(found) == 8
    for program in found:
        assert program["kernel"] == (program["implementation"] == "mosaic_gpu"), program
        assert not program["logits"], program
        # Workspace, beyond the float32 gradients and the tokens that were moved.
        held = (4 * n * d + 4 * v * d) * (program["direction"] == "gradients") + 4 * n * d * program["masked"]
        assert program["temp_bytes"] <= (512 << 20) + held, program
