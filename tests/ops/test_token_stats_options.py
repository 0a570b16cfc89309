"""What token_stats takes and gives beside log-probability and entropy: against plain formulas in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxlm.ops.token_stats import one_pass_nll, token_stats, token_stats_from_logits, token_stats_sharded
from jaxlm.ops.token_stats.contract import OUTPUTS
from jaxlm.ops.token_stats.tiled import tiled

SMOOTH = ("logprob", "entropy", "logsumexp")
OPTIONS = dict(temperature=0.7, soft_cap=3.0, logit_scale=0.4, valid_vocab=61)
# What `tiled` does with one block it does with several.
SEVERAL_FIRST = ["dense", "small blocks", pytest.param("tiled", marks=pytest.mark.slow)]
implementations = pytest.mark.parametrize("implementation", SEVERAL_FIRST)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem(n=8, d=12, v=70, k=None, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 61, size=n if k is None else (n, k))
    return tuple(jnp.asarray(x) for x in (rng.normal(size=(n, d)), rng.normal(size=(v, d)), targets)), jnp.asarray(
        rng.normal(size=v)
    )


def logits(hidden, unembed, bias, *, temperature=1.0, soft_cap=None, logit_scale=1.0, valid_vocab=None):
    u = logit_scale * hidden @ unembed.T + (0 if bias is None else bias)
    u = u if soft_cap is None else soft_cap * jnp.tanh(u / soft_cap)
    return (u / temperature)[:, :valid_vocab]


def plain(z, targets):
    log_p = jax.nn.log_softmax(z)
    p = jnp.exp(log_p)
    return dict(
        logprob=jnp.take_along_axis(log_p, targets.reshape(len(z), -1), axis=1).reshape(targets.shape),
        entropy=-(p * log_p).sum(-1), logsumexp=jax.nn.logsumexp(z, -1), top_logprob=log_p.max(-1),
        argmax=z.argmax(-1), log_sum_squares=jnp.log((p**2).sum(-1)),
    )  # fmt: skip


def stats_by(implementation, hidden, unembed, targets, **options):
    if implementation != "small blocks":
        return token_stats(hidden, unembed, targets, implementation=implementation, **options)
    from jaxlm.ops.token_stats.contract import check_options

    names = ("bias", "temperature", "soft_cap", "logit_scale", "valid_vocab")
    given = dict(bias=None, temperature=1.0, soft_cap=None, logit_scale=1.0, valid_vocab=None) | options
    checked = check_options(unembed, **{name: given[name] for name in names})
    return tiled(hidden, unembed, targets, outputs=options["outputs"], block=32, rows=4, **checked._asdict())


@implementations
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
def test_values(implementation, k, options):
    arrays, bias = problem(k=k)
    bias = bias if options else None
    stats = stats_by(implementation, *arrays, bias=bias, outputs=OUTPUTS, **options)
    want = plain(logits(*arrays[:2], bias, **options), arrays[2])
    for name, value in want.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-11, atol=1e-11, err_msg=name)
    assert stats.logprob.shape == arrays[2].shape and stats.argmax.dtype == jnp.int32


@implementations
@pytest.mark.parametrize("k", [None, 3])
def test_gradients(implementation, k):
    (hidden, unembed, targets), bias = problem(k=k)
    targets = targets if k is None else targets.at[0].set(targets[0, 0])  # the same one three times
    weights = {name: jnp.sin(jnp.arange(8.0) + i) for i, name in enumerate(SMOOTH)}

    def total(found):
        return sum(jnp.sum(weights[name].reshape(-1, *[1] * (found[name].ndim - 1)) * found[name]) for name in SMOOTH)

    def ours(hidden, unembed, bias):
        stats = stats_by(implementation, hidden, unembed, targets, bias=bias, outputs=OUTPUTS, **OPTIONS)
        return total(stats._asdict()) + jnp.sum(stats.top_logprob) + jnp.sum(stats.log_sum_squares)  # constants

    def formula(hidden, unembed, bias):
        return total(plain(logits(hidden, unembed, bias, **OPTIONS), targets))

    found, want = (jax.grad(f, (0, 1, 2))(hidden, unembed, bias) for f in (ours, formula))
    for got, expected in zip(found, want):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)
    assert not np.any(found[1][61:]) and not np.any(found[2][61:])


@pytest.mark.parametrize("vocab_axis", [None, "v"])
def test_on_a_mesh_they_are_those_of_one_device(vocab_axis):
    """61 of 72 entries over four devices: the last shard has 7 valid ones of 18."""
    (hidden, unembed, targets), bias = problem(v=72, k=2)
    mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(AxisType.Auto,) * 2)
    mask = jnp.arange(8) % 3 != 0

    def run(function, hidden, unembed, bias, **options):
        stats = function(hidden, unembed, bias=bias, outputs=OUTPUTS, **OPTIONS, **options)
        return sum(jnp.sum(jnp.cos(x)) for name, x in stats._asdict().items() if name in SMOOTH), stats

    def sharded(hidden, unembed, bias):
        options = dict(mesh=mesh, token_axes=("t", None), vocab_axis=vocab_axis)
        function = lambda h, w, **o: token_stats_sharded(  # noqa: E731
            h.reshape(2, 4, -1), w, targets.reshape(2, 4, 2), mask=mask.reshape(2, 4), **o
        )
        return run(function, hidden, unembed, bias, **options)

    def single(hidden, unembed, bias):
        return run(lambda h, w, **o: token_stats(h, w, targets, mask=mask, **o), hidden, unembed, bias)

    found, want = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(hidden, unembed, bias) for f in (sharded, single)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-11, atol=1e-11), found, want)
    assert np.all(np.asarray(want[0][1].argmax)[::3] == 0) and np.all(np.asarray(want[0][1].logprob)[::3] == 0)


def test_of_equal_entries_the_first_one_is_the_likeliest_on_any_shard():
    hidden, unembed = jnp.ones((2, 3)), jnp.zeros((64, 3)).at[jnp.array([17, 33, 50])].set(1.0)
    targets = jnp.zeros(2, jnp.int32)
    assert token_stats(hidden, unembed, targets, outputs=("argmax",)).argmax.tolist() == [17, 17]
    found = stats_by("small blocks", jnp.ones((4, 3)), unembed, jnp.zeros(4, jnp.int32), outputs=("argmax",))
    assert found.argmax.tolist() == [17] * 4
    mesh = jax.make_mesh((8,), ("v",), axis_types=(AxisType.Auto,))
    split = token_stats_sharded(
        hidden[None], unembed, targets[None], mesh=mesh, token_axes=(None, None), vocab_axis="v", outputs=("argmax",)
    )
    assert split.argmax.tolist() == [[17, 17]]


@pytest.mark.parametrize("implementation", ["dense", "tiled"])
def test_rows_beyond_the_vocabulary_are_as_if_they_were_not_there(implementation):
    (hidden, unembed, targets), _ = problem()
    huge = unembed.at[61:].set(1e3)
    targets = targets.at[0].set(61)
    stats = token_stats(
        hidden, huge, targets, valid_vocab=61, soft_cap=2.0, outputs=OUTPUTS, implementation=implementation
    )
    cut = token_stats(hidden, huge[:61], targets, soft_cap=2.0, outputs=OUTPUTS, implementation=implementation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), stats, cut)
    assert stats.logprob[0] == -jnp.inf and jnp.all(jnp.isfinite(stats.logprob[1:]))


def test_one_pass_takes_and_gives_them_too():
    (hidden, unembed, targets), bias = problem()
    mask = jnp.arange(8) != 3

    def ours(hidden, unembed, bias):
        total, stats = one_pass_nll(
            hidden, unembed, targets, mask=mask, bias=bias, outputs=OUTPUTS, z_weight=0.1, **OPTIONS
        )
        return total, stats

    def formula(hidden, unembed, bias):
        found = plain(logits(hidden, unembed, bias, **OPTIONS), targets)
        return jnp.sum(jnp.where(mask, 0.1 * found["logsumexp"] ** 2 - found["logprob"], 0)), found

    found, want = (
        jax.value_and_grad(f, (0, 1, 2), has_aux=True)(hidden, unembed, bias) for f in (ours, formula)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), found[1], want[1])
    np.testing.assert_allclose(found[0][0], want[0][0], rtol=1e-11)
    for name, value in want[0][1].items():
        np.testing.assert_allclose(getattr(found[0][1], name)[mask], value[mask], rtol=1e-11, err_msg=name)


def test_from_logits_gives_them_too():
    (hidden, unembed, targets), _ = problem()
    stats = token_stats_from_logits(logits(hidden, unembed, None), targets, outputs=OUTPUTS)
    for name, value in plain(logits(hidden, unembed, None), targets).items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-11, err_msg=name)


def test_a_scale_is_a_temperature_where_nothing_stands_between():
    (hidden, unembed, targets), _ = problem()
    a = token_stats(hidden, unembed, targets, logit_scale=0.25)
    b = token_stats(hidden, unembed, targets, temperature=4.0)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13), a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale: expected a number above 0, found 0.0"),
        ({"valid_vocab": 0}, "valid_vocab: expected 1 to 70, the rows of unembed, found 0"),
        ({"valid_vocab": 71}, "valid_vocab: expected 1 to 70"),
        ({"outputs": ("argmax",), "implementation": "pallas_tpu"}, "pallas_tpu: gives no argmax; use .*'tiled'"),
        ({"targets": jnp.zeros((8, 2), jnp.int32), "implementation": "pallas_tpu"}, "gives no several targets"),
        ({"targets": jnp.zeros((8, 0), jnp.int32)}, "expected integer targets of shape"),
        ({"targets": jnp.zeros((2, 8), jnp.int32)}, "expected integer targets of shape"),
    ],
)
def test_errors_say_what_to_change(change, message):
    (hidden, unembed, targets), _ = problem()
    with pytest.raises(ValueError, match=message):
        token_stats(hidden, unembed, change.pop("targets", targets), **change)
