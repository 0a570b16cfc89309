"""token_stats over a mesh of eight simulated devices against one device: values and gradients."""

from __future__ import annotations

import importlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.ops.platform import compiling_for
from jaxlm.ops.token_stats import token_stats, token_stats_sharded

tiles = importlib.import_module("jaxlm.ops.token_stats.tiled")
ALL = ("logprob", "entropy", "logsumexp")
B, T, D, V = 8, 6, 8, 40
OPTIONS = {"temperature": 0.7, "soft_cap": 3.0, "outputs": ALL}

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (simulated) devices")


def make_mesh(data, tensor):
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def problem(vocab=V, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    unembed = jax.random.normal(keys[1], (vocab, D)) * D**-0.5
    return hidden, unembed, jax.random.normal(keys[2], (vocab,)), jax.random.randint(keys[3], (B, T), 0, vocab)


def total(stats):
    weights = np.random.default_rng(1).normal(size=(3, B, T))
    return sum((w * x).sum() for w, x in zip(weights, stats) if x is not None), stats


def value_and_grad(run, *, factor=1.0):
    def loss(hidden, unembed, bias, targets, mask):
        value, stats = total(run(hidden, unembed, targets, bias=bias, mask=mask))
        return factor * value, stats

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def assert_close(got, want, *, rtol=4e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def placed(mesh, hidden, unembed, bias, targets, mask):
    specs = (P("data"), P("tensor"), P("tensor"), P("data"), P("data"))
    arrays = (hidden, unembed, bias, targets, mask)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs)]


@pytest.mark.parametrize(
    "data, tensor", [(4, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((8, 1), (2, 4), (1, 8)))]
)
def test_any_mesh_gives_the_numbers_of_one_device(data, tensor):
    mesh = make_mesh(data, tensor)
    hidden, unembed, bias, targets = problem()
    mask = jnp.arange(B * T).reshape(B, T) % 5 != 0  # uneven per shard, with NaN beneath
    hidden = jnp.where(mask[..., None], hidden, jnp.nan)
    arguments = (hidden, unembed, bias, targets, mask)
    run = partial(token_stats_sharded, mesh=mesh, token_axes=("data", None), vocab_axis="tensor", **OPTIONS)
    want = value_and_grad(partial(token_stats, **OPTIONS))(*arguments)
    assert_close(value_and_grad(run)(*placed(mesh, *arguments)), want)
    (value, _), grads = value_and_grad(run, factor=2.0)(*placed(mesh, *arguments))
    assert_close((value, grads), jax.tree.map(lambda x: 2 * x, (want[0][0], want[1])))


@pytest.mark.parametrize("data, tensor", [(4, 2), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_a_table_split_over_its_width_is_never_whole(data, tensor):
    mesh = make_mesh(data, tensor)
    hidden, unembed, bias, targets = problem(vocab=4400)  # more than a block on every shard of the vocabulary
    mask = jnp.arange(B * T).reshape(B, T) % 5 != 0
    arguments = (hidden, unembed, bias, targets, mask)
    split = dict(mesh=mesh, token_axes=("data", None), vocab_axis="tensor", width_axis="data")
    run = value_and_grad(partial(token_stats_sharded, **split, **OPTIONS))
    with_axes = placed(mesh, *arguments)
    with_axes[1] = jax.device_put(unembed, NamedSharding(mesh, P("tensor", "data")))
    assert_close(run(*with_axes), value_and_grad(partial(token_stats, **OPTIONS))(*arguments))
    text = run.lower(*with_axes).compile().as_text()
    assert "reduce-scatter" in text and "all-gather" in text
    assert not re.search(rf"\[{4400 // tensor},{D}\]", text)


@pytest.mark.parametrize("width_axis", [None, pytest.param("data", marks=pytest.mark.slow)])
@pytest.mark.parametrize("vocab, dtype", [(400, jnp.float32), (528, jnp.bfloat16)])
def test_a_kernel_on_every_device_gives_the_numbers_of_one(vocab, dtype, width_axis, monkeypatch):
    monkeypatch.setattr(tiles, "KERNEL_COPY", 128 * D * 4)  # two blocks or three on each device, the last one ragged
    mesh = make_mesh(4, 2)
    hidden, unembed, _, targets = problem(vocab, dtype)
    targets = targets.at[0, 0].set(vocab // 2 + 3).at[0, 1].set(vocab // 2 - 1).at[1, 1].set(vocab).at[2, 2].set(-1)
    mask = (jnp.arange(B * T).reshape(B, T) % 5 != 0).at[1, 1].set(False).at[2, 2].set(False)
    arguments = (hidden, unembed, None, targets, mask)

    def without_bias(function, **more):
        return lambda *arrays, bias, mask: function(*arrays, mask=mask, **OPTIONS, **more)

    split = dict(mesh=mesh, token_axes=("data", None), vocab_axis="tensor", width_axis=width_axis)
    run = without_bias(token_stats_sharded, implementation="pallas_tpu", **split)
    want = value_and_grad(without_bias(token_stats))(*arguments)
    assert_close(value_and_grad(run)(*arguments), want, rtol=4e-6 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("platform, kernels", [("tpu", 1), ("cpu", 0)])
def test_a_tpu_takes_its_kernel_where_it_knows_what_each_device_has(platform, kernels):
    hidden, unembed, bias, targets = problem()
    split = dict(mesh=make_mesh(4, 2), token_axes=("data", None), vocab_axis="tensor")

    def calls(function, **options):
        with compiling_for(platform):  # a new function each time: a trace is kept
            traced = jax.make_jaxpr(lambda *arrays: function(*arrays, **options))(hidden, unembed, targets)
        return str(traced).count("pallas_call")

    assert calls(token_stats_sharded, **split) == kernels
    assert calls(token_stats_sharded, **split, bias=bias) == 0  # which the kernel has not
    assert calls(token_stats_sharded, **split, outputs=("argmax",)) == 0
    assert calls(token_stats) == 0  # XLA may split these arrays as it likes


def test_an_implementation_of_one_device_is_refused():
    hidden, unembed, _, targets = problem()
    with pytest.raises(ValueError, match="expected one of tiled, pallas_tpu, mosaic_gpu, or None, on a mesh; found 'd"):
        split = dict(mesh=make_mesh(4, 2), token_axes=("data", None), vocab_axis="tensor")
        token_stats_sharded(hidden, unembed, targets, **split, implementation="dense")


def test_a_width_is_split_as_tokens_are():
    mesh = make_mesh(4, 2)
    hidden, unembed, _, targets = problem()
    split = dict(mesh=mesh, token_axes=(None, None), vocab_axis=None)
    with pytest.raises(ValueError, match="width_axis='data': expected one of token_axes"):
        token_stats_sharded(hidden, unembed, targets, width_axis="data", **split)


@pytest.mark.parametrize("outputs", [("logprob",), ("entropy",), ("logsumexp",)], ids="".join)
def test_each_output_alone(outputs):
    mesh = make_mesh(2, 4)
    hidden, unembed, bias, targets = problem()
    arguments = (hidden, unembed, bias, targets, None)
    run = partial(token_stats_sharded, mesh=mesh, token_axes=("data", None), vocab_axis="tensor", outputs=outputs)
    want = value_and_grad(partial(token_stats, outputs=outputs))(*arguments)
    assert_close(value_and_grad(run)(*arguments), want)


@pytest.mark.parametrize(
    "token_axes, vocab_axis",
    [(("data", None), None), ((None, "tensor"), None), ((("data", "tensor"), None), None), ((None, None), "tensor"),
     ((None, None), None), (("tensor", None), "data")],
)  # fmt: skip
def test_axes_may_be_absent_joined_or_swapped(token_axes, vocab_axis):
    mesh = make_mesh(4, 2)
    hidden, unembed, bias, targets = problem()
    arguments = (hidden, unembed, bias, targets, None)
    run = partial(token_stats_sharded, mesh=mesh, token_axes=token_axes, vocab_axis=vocab_axis, outputs=ALL)
    assert_close(value_and_grad(run)(*arguments), value_and_grad(partial(token_stats, outputs=ALL))(*arguments))


def test_bfloat16_sums_the_gradient_of_unembed_in_float32():
    mesh = make_mesh(8, 1)
    hidden, unembed, bias, targets = problem(dtype=jnp.bfloat16)
    arguments = (hidden, unembed, bias, targets, None)
    run = partial(token_stats_sharded, mesh=mesh, token_axes=("data", None), vocab_axis="tensor", outputs=ALL)
    (_, stats), grads = value_and_grad(run)(*arguments)
    (_, want_stats), want = value_and_grad(partial(token_stats, outputs=ALL))(*arguments)
    assert grads[1].dtype == jnp.float32
    assert_close((stats, grads[1:]), (want_stats, want[1:]))


def test_an_impossible_target_is_impossible_on_every_shard():
    mesh = make_mesh(2, 4)
    hidden, unembed, _, targets = problem()
    targets = targets.at[0, 0].set(V).at[1, 1].set(-1)
    run = partial(token_stats_sharded, mesh=mesh, token_axes=("data", None), vocab_axis="tensor")
    logprob = jax.jit(run)(hidden, unembed, targets).logprob
    assert np.argwhere(np.isneginf(logprob)).tolist() == [[0, 0], [1, 1]]


def test_only_vectors_of_tokens_cross_the_vocabulary_axis():
    mesh = make_mesh(1, 8)
    hidden, unembed, _, targets = problem()
    run = partial(token_stats_sharded, mesh=mesh, token_axes=("data", None), vocab_axis="tensor")
    arguments = hidden, jax.device_put(unembed, NamedSharding(mesh, P("tensor"))), targets
    text = jax.jit(run).lower(*arguments).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]*)\][^=]*\ball-reduce(?:-start)?\(", text)
    assert shapes and all(np.prod([int(n) for n in s.split(",")]) == B * T for s in shapes)
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def test_second_derivatives():
    mesh = make_mesh(2, 4)
    hidden, unembed, bias, targets = problem()

    def penalty(run, hidden, unembed):
        grads = jax.grad(lambda *a: total(run(*a, targets, bias=bias, outputs=ALL))[0], (0, 1))(hidden, unembed)
        return sum(jnp.square(g).sum() for g in grads)

    run = partial(token_stats_sharded, mesh=mesh, token_axes=("data", None), vocab_axis="tensor")
    got, want = (jax.jit(jax.grad(partial(penalty, f), (0, 1)))(hidden, unembed) for f in (run, token_stats))
    assert_close(got, want, rtol=1e-5)


def test_inside_the_users_own_shard_map():
    mesh = make_mesh(8, 1)
    hidden, unembed, bias, targets = problem()

    def run(hidden, unembed, targets, *, bias, mask):
        local = lambda h, u, t, b: token_stats(h, u, t, bias=b, outputs=ALL)  # noqa: E731
        specs = (P("data"), P(), P("data"), P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))(hidden, unembed, targets, bias)

    arguments = (hidden, unembed, bias, targets, None)
    assert_close(value_and_grad(run)(*arguments), value_and_grad(partial(token_stats, outputs=ALL))(*arguments))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab": 41}, "the vocabulary of 41 does not divide over the 2 devices.*pad it to 42"),
        ({"token_axes": (None, "data")}, "the T of 6 does not divide over the 4 devices"),
        ({"vocab_axis": "model"}, r"expected axes of the mesh \('data', 'tensor'\), found \['model'\]"),
        ({"outputs": ()}, "non-empty"),
    ],
)
def test_errors_name_both_numbers(change, message):
    hidden, unembed, _, targets = problem(vocab=change.pop("vocab", V))
    options = {"mesh": make_mesh(4, 2), "token_axes": ("data", None), "vocab_axis": "tensor"} | change
    with pytest.raises(ValueError, match=message):
        token_stats_sharded(hidden, unembed, targets, **options)
