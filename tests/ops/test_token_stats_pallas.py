"""The TPU kernel: the oracle's numbers when it is interpreted, and that it compiles for real chips."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.token_stats import pallas_tpu, token_stats
from jaxlm.ops.token_stats.head import Head
from jaxlm.ops.token_stats.pallas_tpu import Blocks, default_blocks
from jaxlm.sharding.topology import ENVIRONMENT

ALL = ("logprob", "entropy", "logsumexp")


def problem(n, d, v, dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(n + v), 3)
    hidden = jax.random.normal(keys[0], (n, d), dtype)
    unembed = (scale * d**-0.5 * jax.random.normal(keys[1], (v, d))).astype(dtype)
    return hidden, unembed, jax.random.randint(keys[2], (n,), 0, v)


def exact(hidden, unembed, targets, *, temperature=1.0, soft_cap=None):
    """In numpy, in float64, on the same numbers."""
    z = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    z = z / temperature
    m = z.max(axis=1, keepdims=True)
    log_p = z - m - np.log(np.exp(z - m).sum(axis=1, keepdims=True))
    picked = log_p[np.arange(len(z)), np.asarray(targets)]
    return picked, -(np.exp(log_p) * log_p).sum(axis=1), (z - log_p)[:, 0]


def small_blocks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "default_blocks", lambda *_: Blocks(128, 128))


SLOW = [(t, v) for t in (1, 128, 200) for v in (1, 127, 128, 300)]


@pytest.mark.parametrize(
    "tokens, vocab", [(1, 129), (128, 129), (200, 129), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_values_at_ragged_edges_with_logits_of_unit_variance(tokens, vocab, monkeypatch):
    small_blocks(monkeypatch)
    arrays = problem(tokens, 16, vocab)
    got = token_stats(*arrays, outputs=ALL, implementation="pallas_tpu")
    for a, b in zip(got, exact(*arrays)):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
    assert (got.logprob <= 0).all() and (got.entropy >= 0).all()


@pytest.mark.parametrize(
    "options", [{"temperature": 0.3}, {"soft_cap": 2.0}, {"temperature": 7.0, "soft_cap": 1.5}], ids=str
)
def test_options(options, monkeypatch):
    small_blocks(monkeypatch)
    arrays = problem(130, 16, 260, scale=4.0)
    got = token_stats(*arrays, outputs=ALL, implementation="pallas_tpu", **options)
    for a, b in zip(got, exact(*arrays, **options)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_bfloat16_is_within_the_bound_of_its_inputs(scale, monkeypatch):
    small_blocks(monkeypatch)
    arrays = problem(150, 64, 1000, jnp.bfloat16, scale)
    got = token_stats(*arrays, outputs=ALL, implementation="pallas_tpu")
    want = exact(*arrays)
    largest = np.abs(np.asarray(arrays[0], np.float64) @ np.asarray(arrays[1], np.float64).T).max()
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, largest), rtol=0)


def test_masked_tokens_and_targets_outside_the_vocabulary(monkeypatch):
    small_blocks(monkeypatch)
    hidden, unembed, targets = problem(300, 16, 200)
    mask = np.arange(300) % 3 == 0
    got = token_stats(
        jnp.where(mask[:, None], hidden, jnp.nan), unembed, jnp.where(mask, targets, -9), mask=jnp.asarray(mask),
        outputs=ALL, implementation="pallas_tpu",
    )  # fmt: skip
    for a, b in zip(got, exact(hidden, unembed, targets)):
        np.testing.assert_allclose(np.asarray(a)[mask], b[mask], atol=2e-6, rtol=2e-6)
        assert not np.asarray(a)[~mask].any()
    outside = token_stats(hidden[:2], unembed, jnp.array([200, -1]), implementation="pallas_tpu")
    assert np.asarray(outside.logprob).tolist() == [-np.inf, -np.inf] and np.isfinite(outside.entropy).all()


def test_blocks_behind_the_last_token_that_counts_keep_their_start():
    hidden, unembed, targets = problem(384, 8, 130)
    sums = pallas_tpu.sums(
        Head(hidden, unembed, None, None), targets, jnp.int32(100), soft_cap=None, entropy=True, blocks=Blocks(128, 128)
    )
    assert not np.asarray(sums.exp)[128:].any() and np.asarray(sums.exp)[:128].all()


def test_gradients_are_those_of_tiled(monkeypatch):
    small_blocks(monkeypatch)
    hidden, unembed, targets = problem(140, 16, 260)

    def total(implementation, hidden, unembed):
        stats = token_stats(
            hidden, unembed, targets, temperature=0.7, soft_cap=3.0, outputs=ALL, implementation=implementation
        )
        return sum(jnp.sum(jnp.sin(jnp.arange(140.0) + i) * x) for i, x in enumerate(jax.tree.leaves(stats)))

    got, want = (
        jax.jit(jax.value_and_grad(total, (1, 2)), static_argnums=0)(name, hidden, unembed)
        for name in ("pallas_tpu", "tiled")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_what_it_cannot_do_is_refused():
    hidden, unembed, targets = problem(4, 8, 16)
    with pytest.raises(ValueError, match="no bias and no float64; use implementation='tiled'"):
        token_stats(hidden, unembed, targets, bias=jnp.zeros(16), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="of width 100000 do not fit"):
        default_blocks(8192, 100_000, 1000, 4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_it_compiles_for_real_chips_and_holds_no_logits(topology, tmp_path):
    n, d, v = 2048, 1024, 151_936
    size = f"--tokens {n} --width {d} --vocab {v} --json {tmp_path / 'out.json'}".split()
    command = [sys.executable, "-m", "jaxlm.cli", "bench", "token_stats", "--compile-for", topology, *size]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())["programs"]
    assert len(found) == 8
    for program in found:
        assert program["kernel"] == (program["implementation"] == "pallas_tpu"), program
        assert not program["logits"], program
        # Workspace, beyond the float32 gradients and the tokens that were moved.
        held = (4 * n * d + 4 * v * d) * (program["direction"] == "gradients") + 4 * n * d * program["masked"]
        assert program["temp_bytes"] <= (512 << 20) + held, program
    cycles = [program["cycles"] for program in found if not program["masked"]]  # tiled, then the kernel
    assert cycles[2] < 0.7 * cycles[0] and cycles[3] < 0.95 * cycles[1], cycles


FLOAT32_WEIGHTS = """if True:
    import sys
    import jax, jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding
    from jaxlm.ops.platform import compiling_for
    from jaxlm.ops.token_stats import token_stats
    from jaxlm.sharding.topology import devices_of

    device = devices_of(sys.argv[1])[0]
    n, d, v = 2048, 1024, 151_936
    shapes = ((n, d), jnp.bfloat16), ((v, d), jnp.float32), ((n,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*x, sharding=SingleDeviceSharding(device)) for x in shapes]
    with compiling_for("tpu", [device]):
        program = jax.jit(jax.grad(lambda *x: token_stats(*x).logprob.sum(), (0, 1))).lower(*arguments).compile()
    assert f"bf16[{v},{d}]" not in program.as_text()
    copied = 256 << 20  # of the block that the kernel is given at once
    assert program.memory_analysis().temp_size_in_bytes < copied + (32 << 20), program.memory_analysis()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_float32_weights_are_never_held_in_bfloat16_too(topology):
    command = [sys.executable, "-c", FLOAT32_WEIGHTS, topology]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
