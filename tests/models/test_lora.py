"""Adapters beside a frozen base: their spec, exactness at zero, the merged kernels, gradients, meshes, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.layers import project
from jaxlm.models.lora import LoraConfig, join, lora_spec, merge
from jaxlm.models.spec import Param, flatten, map_spec, normal
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import make_constrain
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.checkpoint import Checkpoints, load_state
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import make_train_step

LORA = LoraConfig(rank=3, alpha=5.0)
TOKENS = jax.random.randint(jax.random.key(7), (4, 8), 0, 29)
NUM_INPUTS = {"out": 2}  # axes of a kernel, after that of the layers, that it reads


def filled(spec, seed=0):
    """Arrays of a spec, none at its initial value; by numpy, which has nothing to compile."""
    rng = np.random.default_rng(seed)
    return map_spec(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), jnp.float32), spec)


@pytest.fixture(scope="module")
def model(families):
    """A config with grouped heads and rematerialised layers, its base and its adapters."""
    cfg = dataclasses.replace(families["qwen3"], vocab_size=32, remat="full")
    return cfg, filled(decoder.spec(cfg)), filled(lora_spec(decoder.spec(cfg), LORA), 1)


@pytest.fixture(scope="module")
def results(model):
    """(adapters, base, constrain) -> the loss, the adapters' gradients, and the merged model."""

    @partial(jax.jit, static_argnames="constrain")
    def results(adapters, base, constrain=decoder.identity):
        value_and_grad = jax.value_and_grad(lambda a: loss_of(join(base, a, LORA), model[0], constrain=constrain))
        return *value_and_grad(adapters), merge(base, adapters, LORA)

    return results


@partial(jax.jit, static_argnames="cfg")
def hidden(params, *, cfg):
    return decoder.forward(params, TOKENS, cfg=cfg).hidden


def loss_of(params, cfg, **options):
    return jnp.sum(jnp.sin(decoder.forward(params, TOKENS, cfg=cfg, **options).hidden))


def low_rank(kernel, a, b, num_inputs, scale):
    """W + scale A B of one layer, with every axis flattened by hand."""
    size_in = int(np.prod(kernel.shape[:num_inputs]))
    product = a.reshape(size_in, -1) @ b.reshape(b.shape[0], -1)
    return kernel + scale * product.reshape(kernel.shape)


def test_the_spec_names_shapes_and_axes(families, paths):
    got = lora_spec(decoder.spec(families["qwen3"]), LORA)
    assert paths(got) == {
        "layers/attn/q/lora_a": (3, 16, 3), "layers/attn/q/lora_b": (3, 3, 4, 8),
        "layers/attn/k/lora_a": (3, 16, 3), "layers/attn/k/lora_b": (3, 3, 2, 8),
        "layers/attn/v/lora_a": (3, 16, 3), "layers/attn/v/lora_b": (3, 3, 2, 8),
        "layers/attn/out/lora_a": (3, 4, 8, 3), "layers/attn/out/lora_b": (3, 3, 16),
        "layers/mlp/gate/lora_a": (3, 16, 3), "layers/mlp/gate/lora_b": (3, 3, 24),
        "layers/mlp/up/lora_a": (3, 16, 3), "layers/mlp/up/lora_b": (3, 3, 24),
        "layers/mlp/down/lora_a": (3, 24, 3), "layers/mlp/down/lora_b": (3, 3, 16),
    }  # fmt: skip
    axes = {path: p.axes for path, p in flatten(got).items()}
    assert axes["layers/attn/q/lora_a"] == ("layers", "embed", None)
    assert axes["layers/attn/q/lora_b"] == ("layers", None, "heads", "head_dim")
    assert axes["layers/attn/out/lora_a"] == ("layers", "heads", "head_dim", None)
    assert axes["layers/mlp/down/lora_b"] == ("layers", None, "embed")
    assert all(jax.tree.leaves(specs.decay_mask(got)))


def test_counts_and_initial_values(families):
    cfg = families["qwen3"]
    width, q, kv, mlp = 16, 4 * 8, 2 * 8, 24
    got = lora_spec(decoder.spec(cfg), LORA)
    assert specs.count(got) == 3 * 3 * (2 * (width + q) + 2 * (width + kv) + 3 * (width + mlp))
    some = lora_spec(decoder.spec(cfg), dataclasses.replace(LORA, targets=("attn/q", "down")))
    assert specs.count(some) == 3 * 3 * (width + q + mlp + width)
    init = flatten(
        specs.init(jax.random.key(0), lora_spec(decoder.spec(cfg), LoraConfig(rank=200, targets=("out", "down", "up"))))
    )
    for path, x in init.items():
        fan_in = {"out": q, "down": mlp}.get(path.split("/")[-2], width)
        if path.endswith("lora_b"):
            assert not np.any(x), path
        else:  # uniform within +-1/sqrt(fan_in)
            assert np.abs(x).max() <= fan_in**-0.5 and np.std(x) == pytest.approx((3 * fan_in) ** -0.5, rel=0.05), path


def test_scales():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_a_model_without_layers_on_axis_0_and_a_square_kernel():
    tree = {"pool": {"kernel": Param((4, 4), ("embed", "embed"), normal(1.0))}}
    base, lora = specs.init(jax.random.key(0), tree), LoraConfig(rank=2, alpha=2.0)
    adapters = jax.tree.map(jnp.ones_like, specs.init(jax.random.key(0), lora_spec(tree, lora)))
    assert {k: v.shape for k, v in flatten(adapters).items()} == {"pool/lora_a": (4, 2), "pool/lora_b": (2, 4)}
    np.testing.assert_allclose(merge(base, adapters, lora)["pool"]["kernel"], base["pool"]["kernel"] + 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda spec: LoraConfig(rank=0), "lora.rank=0: expected at least 1"),
        (lambda spec: LoraConfig(alpha=0.0), "lora.alpha=0.0: expected a positive number"),
        (lambda spec: LoraConfig(targets="q"), r"write \('q',\)"),
        (lambda spec: lora_spec(spec, LoraConfig(targets=("o",))), "named 'o'; did you mean 'out'"),
        (lambda spec: lora_spec(spec, LoraConfig(targets=("q", "gate_proj"))), "'gate_proj'; did you mean 'gate'"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_so(make, message, families):
    with pytest.raises(ValueError, match=message):
        make(decoder.spec(families["llama2"]))


@pytest.mark.parametrize("function", [join, merge])
def test_adapters_of_another_model_or_rank_are_refused(function, families):
    spec = decoder.spec(families["llama2"])
    params, adapters = specs.abstract(spec), specs.abstract(lora_spec(spec, LORA))
    with pytest.raises(ValueError, match="adapters for layers/mlp/gate, which the parameters do not have"):
        jax.eval_shape(partial(function, cfg=LORA), specs.abstract(decoder.spec(families["gpt2"])), adapters)
    with pytest.raises(ValueError, match=r"at layers/attn/./ has rank 3, and lora.rank=4"):
        jax.eval_shape(partial(function, cfg=dataclasses.replace(LORA, rank=4)), params, adapters)
    with pytest.raises(ValueError, match="at pool/, where the parameters have no kernel"):
        function({"pool": {}}, {"pool": adapters["layers"]["mlp"]["up"]}, LORA)
    with pytest.raises(ValueError, match="not in the spec: layers/attn/k/lora_a"):
        specs.check(jax.eval_shape(partial(join, cfg=LORA), params, adapters), spec)


def test_zero_adapters_are_the_base_exactly_and_joined_equals_merged(families):
    cfg = families["gpt2"]  # with biases behind the products
    spec = decoder.spec(cfg)
    params, adapters = filled(spec), filled(lora_spec(spec, LORA), 1)
    merged = jax.jit(partial(merge, cfg=LORA))
    base = np.asarray(hidden(params, cfg=cfg))
    for zero in ("lora_a", "lora_b"):
        none = with_zeros(adapters, zero)
        np.testing.assert_array_equal(hidden(join(params, none, LORA), cfg=cfg), base)
        np.testing.assert_array_equal(hidden(merged(params, none), cfg=cfg), base)
    joined = np.asarray(hidden(join(params, adapters, LORA), cfg=cfg))
    np.testing.assert_allclose(joined, hidden(merged(params, adapters), cfg=cfg), atol=1e-4)
    assert np.abs(joined - base).max() > 0.1


def with_zeros(tree, name):
    return jax.tree_util.tree_map_with_path(lambda path, x: jnp.zeros_like(x) if path[-1].key == name else x, tree)


def test_merge_equals_a_loop_over_layers_in_float64(model):
    cfg, params, adapters = model
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, adapters))
        got = flatten(jax.tree.map(np.asarray, jax.jit(partial(merge, cfg=LORA))(*wide)))
    pairs, adapted = flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), adapters)), 0
    assert got.keys() == flatten(params).keys()
    for path, x in flatten(params).items():
        *group, leaf = path.split("/")
        a, b = (pairs.get("/".join((*group, f"lora_{c}"))) for c in "ab")
        if a is None or leaf != "kernel":
            np.testing.assert_array_equal(got[path], np.asarray(x, np.float64))
            continue
        adapted += 1
        for i in range(cfg.num_layers):
            want = low_rank(np.asarray(x[i], np.float64), a[i], b[i], NUM_INPUTS.get(group[-1], 1), 5.0 / 3.0)
            np.testing.assert_allclose(got[path][i], want, rtol=1e-13, atol=1e-13)
    assert adapted == len(pairs) // 2


def test_merge_keeps_dtype_and_what_is_not_adapted(families):
    cfg, lora = families["llama2"], dataclasses.replace(LORA, targets=("q",))
    spec = decoder.spec(cfg)
    trees = specs.abstract(spec, jnp.bfloat16), specs.abstract(lora_spec(spec, lora))
    merged = jax.eval_shape(partial(merge, cfg=lora), *trees)
    assert {str(x.dtype) for x in jax.tree.leaves(merged)} == {"bfloat16"}
    specs.check(merged, spec)
    base = {"q": {"kernel": jnp.ones((2, 2))}, "up": {"kernel": jnp.ones((2, 2))}}
    got = merge(base, {"q": {"lora_a": jnp.ones((2, 3)), "lora_b": jnp.ones((3, 2))}}, lora)
    assert got["up"]["kernel"] is base["up"]["kernel"] and float(got["q"]["kernel"][0, 0]) == 6.0


def test_gradients_are_those_of_the_dense_kernels_by_the_chain_rule(model, results):
    """dA = s dW B^T and dB = s A^T dW, with dW from the merged model, layer by layer; under scan and remat."""
    cfg, params, adapters = model
    _, got, merged = results(adapters, params)
    assert jax.tree.structure(got) == jax.tree.structure(adapters)
    dense = flatten(jax.jit(jax.grad(partial(loss_of, cfg=dataclasses.replace(cfg, remat="none"))))(merged))
    got, pairs = flatten(got), flatten(adapters)
    for path in (p.removesuffix("lora_a") for p in pairs if p.endswith("lora_a")):
        a, b, dw = (np.asarray(x, np.float64) for x in (pairs[path + "lora_a"], pairs[path + "lora_b"],
                                                          dense[path + "kernel"]))  # fmt: skip
        for i in range(cfg.num_layers):
            flat_a, flat_b = a[i].reshape(-1, 3), b[i].reshape(3, -1)
            flat_dw = dw[i].reshape(len(flat_a), -1)
            for name, want in (("lora_a", flat_dw @ flat_b.T), ("lora_b", flat_a.T @ flat_dw)):
                found = np.asarray(got[path + name][i]).reshape(want.shape)
                np.testing.assert_allclose(found, LORA.scale * want, rtol=2e-3, atol=2e-4, err_msg=path + name)


def test_no_gradient_of_the_base_is_ever_computed_or_held():
    """Wide kernels and few tokens, so that what has a kernel's size, in memory or as a product, is a kernel's."""
    cfg = DecoderConfig(vocab_size=29, width=128, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=256)
    lora = LoraConfig(rank=2)
    base, adapters = (specs.abstract(s) for s in (decoder.spec(cfg), lora_spec(decoder.spec(cfg), lora)))

    def compiled(f, *args):
        found = jax.jit(f).lower(*args).compile()
        memory = found.memory_analysis()
        shapes = re.findall(r"\w+\[([\d,]+)\]\S* dot\(", found.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        return memory.output_size_in_bytes, memory.temp_size_in_bytes, largest

    ours = compiled(jax.grad(lambda adapters, base: loss_of(join(base, adapters, lora), cfg)), adapters, base)
    full = compiled(jax.grad(partial(loss_of, cfg=cfg)), base)
    kernels = 4 * sum(p.size for p in jax.tree.leaves(base["layers"]))
    assert ours[0] < 0.05 * kernels < kernels < full[0]
    assert ours[0] + ours[1] < full[0] + full[1] - 0.75 * kernels
    assert ours[2] < 128 * 128 <= full[2]


def test_a_mesh_gives_the_numbers_of_one_device(model, results):
    cfg, params, adapters = model
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = [
        jax.device_put(tree, param_shardings(spec, mesh))
        for tree, spec in ((params, decoder.spec(cfg)), (adapters, lora_spec(decoder.spec(cfg), LORA)))
    ]
    b = placed[1]["layers"]["attn"]["q"]["lora_b"]
    assert b.sharding.shard_shape(b.shape) == (3, 3, 2, 8)

    alone, spread = results(adapters, params), results(placed[1], placed[0], constrain=make_constrain(mesh))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(alone[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * scale), alone, spread)


def test_a_train_state_of_adapters_alone_learns_and_comes_back_strictly(tmp_path):
    linear = {"up": {"kernel": Param((8, 6), ("embed", "mlp"), normal(1.0))}}  # a model of one kernel
    base, spec, x = filled(linear), lora_spec(linear, LORA), jax.random.normal(jax.random.key(0), (4, 2, 8))
    before = jax.tree.map(np.asarray, base)
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), optax.adam(1e-2)
    state = init_state(jax.random.key(0), spec, optimizer, mesh=mesh)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * specs.count(spec) + 1

    @jax.jit
    def step(state, base):
        def loss_fn(adapters, batch, key):
            total, weight = jnp.sum(project(join(base, adapters, LORA)["up"], batch["x"]) ** 2), jnp.float32(1)
            return total, weight, {"loss": (total, weight)}

        return make_train_step(loss_fn, optimizer, seed=0)(state, {"x": x})

    losses = []
    for _ in range(4):
        state, metrics = step(state, base)
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[1] < losses[0] and state.num_skipped == 0
    jax.tree.map(np.testing.assert_array_equal, base, before)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state)
    checkpoints.close()
    found = load_state(tmp_path, abstract_state(spec, optimizer, mesh=mesh))
    jax.tree.map(np.testing.assert_array_equal, found, state)
    other = lora_spec(linear, dataclasses.replace(LORA, rank=4))
    with pytest.raises(ValueError, match="up/lora_a"):
        load_state(tmp_path, abstract_state(other, optimizer, mesh=mesh))
