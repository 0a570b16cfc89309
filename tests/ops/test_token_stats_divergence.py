"""KL between two heads against the plain formula in float64: values, gradients, options, memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.token_stats import divergence, token_kl


def heads(n=6, v=300, widths=(8, 5), dtype=np.float64):
    rng = np.random.default_rng(0)
    return [
        dict(
            hidden=jnp.asarray(rng.normal(size=(n, d)), dtype), unembed=jnp.asarray(rng.normal(size=(v, d)), dtype),
            bias=jnp.asarray(rng.normal(size=v), dtype), soft_cap=cap, temperature=t, logit_scale=s,
        )
        for d, cap, t, s in zip(widths, (None, 2.0), (0.7, 1.3), (1.5, 1.0))
    ]  # fmt: skip


def log_probs(head):
    u = head.get("logit_scale", 1) * head["hidden"] @ head["unembed"].T + head.get("bias", 0)
    cap = head.get("soft_cap")
    u = u if cap is None else cap * jnp.tanh(u / cap)
    return jax.nn.log_softmax(u / head.get("temperature", 1))


def plain(p, q):
    log_p, log_q = log_probs(p), log_probs(q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def by_arrays(function, p, q):
    """The function of the arrays that it is differentiated in."""
    names = ("hidden", "unembed", "bias")

    def run(a, b):
        return function(p | dict(zip(names, a)), q | dict(zip(names, b)))

    return run, tuple(tuple(x[name] for name in names) for x in (p, q))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(divergence, "default_block", lambda rows, width: 128)


@pytest.mark.parametrize("v", [1, 128, 300])
def test_value_and_gradient_in_both_heads(small_blocks, v):
    with jax.enable_x64(True):
        p, q = heads(v=v)
        (ours, arrays), (formula, _) = by_arrays(token_kl, p, q), by_arrays(plain, p, q)
        np.testing.assert_allclose(ours(*arrays), formula(*arrays), rtol=1e-11, atol=1e-14)
        weights = jnp.cos(jnp.arange(6.0))
        found, want = (jax.grad(lambda *a, f=f: weights @ f(*a), (0, 1))(*arrays) for f in (ours, formula))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, want)


@pytest.mark.slow
def test_twice_differentiated_and_mapped(small_blocks):
    with jax.enable_x64(True):
        p, q = heads()
        (ours, arrays), (formula, _) = by_arrays(token_kl, p, q), by_arrays(plain, p, q)

        def curvature(f):
            inner = jax.grad(lambda a: f(a, arrays[1]).sum())
            return jax.grad(lambda a: jnp.sum(jnp.sin(inner(a)[0])))(arrays[0])

        found, want = curvature(ours), curvature(formula)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), found, want)
        one = {k: x for k, x in p.items() if k != "hidden"}, {k: x for k, x in q.items() if k != "hidden"}
        mapped = jax.vmap(lambda a, b: token_kl(one[0] | {"hidden": a}, one[1] | {"hidden": b}))(
            p["hidden"][:, None], q["hidden"][:, None]
        )
        np.testing.assert_allclose(mapped[:, 0], token_kl(p, q), rtol=1e-12)


def test_a_masked_token_is_zero_whatever_stands_there(small_blocks):
    p, q = heads(dtype=np.float32)
    mask = jnp.arange(6) % 2 == 0
    (ours, arrays) = by_arrays(lambda p, q: token_kl(p, q, mask=mask), p, q)
    spoilt = tuple((a[0].at[1].set(jnp.nan), *a[1:]) for a in arrays)
    clean = tuple((a[0].at[1].set(0), *a[1:]) for a in arrays)
    value, grads = jax.value_and_grad(lambda *a: ours(*a).sum(), (0, 1))(*spoilt)
    assert np.isfinite(value) and np.all(np.asarray(ours(*spoilt))[1::2] == 0)
    want = jax.grad(lambda *a: ours(*a).sum(), (0, 1))(*clean)
    jax.tree.map(np.testing.assert_array_equal, grads, want)


def test_what_is_forbidden_and_what_only_fills_up(small_blocks):
    p, q = ({k: x for k, x in head.items() if k in ("hidden", "unembed")} for head in heads(dtype=np.float32))
    cut = [x | {"unembed": x["unembed"][:200]} for x in (p, q)]
    padded = [x | {"valid_vocab": 200} for x in (p, q)]
    np.testing.assert_allclose(token_kl(*padded), token_kl(*cut), rtol=2e-5)
    forbidden = jnp.zeros(300).at[7].set(-jnp.inf)
    assert np.all(np.isinf(token_kl(p, q | {"bias": forbidden})))
    both = token_kl(p | {"bias": forbidden}, q | {"bias": forbidden})
    assert np.all(np.isfinite(both)) and np.all(both > 0)
    p, q = p | {"bias": forbidden}, q | {"bias": forbidden}
    grads = jax.grad(lambda h: token_kl(p | {"hidden": h}, q).sum())(p["hidden"])
    assert np.all(np.isfinite(grads))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_heads_are_not_apart_and_near_ones_keep_their_digits(small_blocks, offset):
    p, _ = heads(dtype=np.float32)
    p = {name: p[name] for name in ("hidden", "unembed")}
    shifted = p | {"bias": jnp.full(300, offset)}
    assert np.all(np.asarray(token_kl(p, p)) == 0)
    near = p | {"hidden": p["hidden"] + 1e-2}
    with jax.enable_x64(True):
        want = plain(*({k: np.asarray(x, np.float64) for k, x in head.items()} for head in (p, near)))
    tolerance = 1e-6 if not offset else 3e-3  # an offset costs the logits their digits before anything is subtracted
    np.testing.assert_allclose(token_kl(shifted, near), want, rtol=0, atol=tolerance)


def test_neither_heads_logits_are_held_and_a_frozen_one_costs_no_gradient():
    both = heads(512, 8192, (64, 64), np.float32)
    p, q = ({k: x for k, x in head.items() if k in ("hidden", "unembed")} for head in both)

    def loss(both, *, frozen):
        a, b = (jax.tree.map(jax.lax.stop_gradient, both[0]) if frozen else both[0]), both[1]
        return token_kl(a, b).sum()

    products = {}
    for frozen in (False, True):
        compiled = jax.jit(jax.grad(lambda both, f=frozen: loss(both, frozen=f))).lower((p, q)).compile()
        text = compiled.as_text()
        assert "512,8192]" not in text and "8192,512]" not in text
        products[frozen] = len(re.findall(r" dot\(|custom_call_target=\"__onednn\$matmul", text))
    assert products == {False: 8, True: 6}  # the two logits, forward and backward, and two for each head's gradient


def test_errors_say_what_to_change():
    p, q = heads(dtype=np.float32)
    with pytest.raises(ValueError, match="expected the same tokens and as many entries in both heads"):
        token_kl(p, q | {"unembed": q["unembed"][:5], "bias": None})
    with pytest.raises(ValueError, match="a head: expected hidden, unembed and of bias, .*; found hidden, table"):
        token_kl({"hidden": p["hidden"], "table": p["unembed"]}, q)
    with pytest.raises(ValueError, match=r"expected hidden \[..., D\], unembed \[V, D\]"):
        token_kl(p | {"unembed": p["unembed"].T}, q)
    with pytest.raises(ValueError, match="boolean mask"):
        token_kl(p, q, mask=jnp.ones(6))


def test_tokens_may_be_split_over_a_mesh():
    p, q = heads(16, 300, dtype=np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    (ours, arrays) = by_arrays(token_kl, p, q)
    split = tuple((jax.device_put(a[0], rows), *a[1:]) for a in arrays)
    run = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(ours(*a))), (0, 1)))
    assert "all-gather" not in run.lower(*split).compile().as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), run(*split), run(*arrays))
