"""Checkpoints come back exactly as they were saved, or not at all."""

from __future__ import annotations

import gc
import json
import logging
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.models.spec import Param, normal
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.checkpoint import Checkpoints, all_steps, expired, latest_step, load_params, load_record, load_state
from jaxlm.train.manifest import make_manifest
from jaxlm.train.state import abstract_state, init_state, new_state

SPEC = {"layers": {"kernel": Param((4, 16, 8), ("layers", "embed", "mlp"), normal(1.0))}}
OPTIMIZER = optax.adamw(1e-2)


@pytest.fixture
def state():
    key = jax.random.key(0)
    params = {
        "half": jax.random.normal(key, (16, 8), jnp.bfloat16),
        "full": jax.random.normal(key, (3,)),
        "flags": jnp.array([True, False, True]),
    }
    return new_state(params, optax.adamw(1e-3), ema=True).replace(step=jnp.int32(7))


def save(folder: Path, steps, state, **options) -> None:
    checkpoints = Checkpoints(folder, **options)
    for step, metrics in steps.items():
        checkpoints.save(step, state, record={"config": {"a": 1}}, metrics=metrics)
    checkpoints.close()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    save(tmp_path, {7: {"eval/loss": 2.5}}, state)
    assert_same(load_state(tmp_path, jax.eval_shape(lambda: state)), state)
    found = load_record(tmp_path, 7)
    assert (found["step"], found["record"], found["metrics"]) == (7, {"config": {"a": 1}}, {"eval/loss": 2.5})


def test_parameters_load_without_the_rest(tmp_path, state):
    state = state.replace(ema=jax.tree.map(jnp.logical_not, {"flags": state.params["flags"]}))
    save(tmp_path, {7: {}}, state)
    shutil.rmtree(tmp_path / "7" / "opt_state")
    assert_same(load_params(tmp_path, state.params), state.params)
    assert_same(load_params(tmp_path, state.ema, ema=True), state.ema)


def test_an_optimizer_without_state_and_no_average(tmp_path):
    state = new_state({"w": jnp.arange(3.0)}, optax.sgd(1.0))
    save(tmp_path, {1: {}}, state)
    assert_same(load_state(tmp_path, state), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "more": p["full"]}, r"params/more: expected float32\[3\], not in the checkpoint"),
        (lambda p: {k: p[k] for k in ("full", "flags")}, r"params/half: in the checkpoint as bfloat16\[16, 8\], not"),
        (lambda p: {**p, "full": jnp.zeros(4)}, r"params/full: expected float32\[4\], saved as float32\[3\]"),
        (lambda p: {**p, "half": p["half"].astype("float32")}, r"params/half: expected float32.*saved as bfloat16"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_any_other_tree_shape_or_dtype_is_refused_by_path(tmp_path, state, change, message):
    save(tmp_path, {7: {}}, state)
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path, change(state.params))
    with pytest.raises(ValueError, match=message):
        load_state(tmp_path, state.replace(params=change(state.params)))


def test_an_average_that_was_saved_must_be_asked_for(tmp_path, state):
    save(tmp_path, {7: {}}, state)
    with pytest.raises(ValueError, match="ema/full: in the checkpoint"):
        load_state(tmp_path, state.replace(ema=None))


def test_what_is_kept(tmp_path, state):
    metrics = {0: {"x": 3.0}, 10: {"x": 1.0}, 20: {"x": 2.0}, 30: {}, 40: {"x": 1.5}}
    save(tmp_path / "low", metrics, state, keep_last=2, best_metric="x")
    assert all_steps(tmp_path / "low") == [10, 30, 40]
    save(tmp_path / "high", metrics, state, keep_last=1, best_metric="x", best_mode="max")
    assert all_steps(tmp_path / "high") == [0, 40]
    save(tmp_path / "last", metrics, state, keep_last=3)
    assert all_steps(tmp_path / "last") == [20, 30, 40]


def test_the_best_is_remembered_over_a_restart(tmp_path, state):
    save(tmp_path, {0: {"x": 1.0}, 10: {"x": 2.0}}, state, keep_last=1, best_metric="x")
    save(tmp_path, {20: {"x": 3.0}, 30: {"x": 4.0}}, state, keep_last=1, best_metric="x")
    assert all_steps(tmp_path) == [0, 30]


def test_of_equal_scores_the_first_is_best():
    assert expired({1: 2.0, 2: 2.0, 3: None}, keep_last=1) == [2]


@pytest.mark.parametrize("before, after", [((4, 4), (2, 2)), ((2, 2), (8, 8)), ((8, 4), (1, 1)), ((1, 1), (8, 2))])
def test_another_mesh(tmp_path, before, after):
    meshes = [make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:n]) for n, fsdp in (before, after)]
    state = init_state(jax.random.key(1), SPEC, OPTIMIZER, mesh=meshes[0])
    save(tmp_path, {5: {}}, state)
    target = abstract_state(SPEC, OPTIMIZER, mesh=meshes[1])
    loaded = load_state(tmp_path, target)
    assert_same(jax.device_get(loaded), jax.device_get(state))
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, target)


def test_the_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    scramble = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = new_state({"w": jax.random.normal(jax.random.key(0), (512, 1024))}, optax.adam(1e-3))
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    jax.block_until_ready(scramble(state))
    checkpoints.close()
    assert_same(jax.device_get(load_state(tmp_path, jax.eval_shape(lambda: expected))), expected)


def test_latest_ignores_what_is_half_written_or_half_deleted(tmp_path, state):
    assert latest_step(tmp_path / "nowhere") is None
    save(tmp_path, {5: {}}, state)
    shutil.copytree(tmp_path / "5", tmp_path / "6.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "5", tmp_path / "4.deleted")
    (tmp_path / "7").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_step(tmp_path) == 5
    save(tmp_path, {7: {}}, state)  # the empty folder of that step is in nobody's way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7", "notes.txt"]


def test_a_step_is_saved_once(tmp_path, state):
    save(tmp_path, {5: {}}, state)
    with pytest.raises(ValueError, match="already there"):
        save(tmp_path, {5: {}}, state)


def test_a_damaged_byte_is_found_and_the_folder_named(tmp_path, state):
    state = state.replace(params={"w": jax.random.normal(jax.random.key(0), (200, 100))}, ema=None)
    save(tmp_path, {4: {}, 5: {}}, state)
    data = max((tmp_path / "5" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/5 is damaged: the checksum differs in params/w.*\[4\]"):
        load_state(tmp_path, state)
    assert_same(load_state(tmp_path, state, step=4), state)


# Orbax leaves coroutines unawaited when a read fails; that is its noise, not ours.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt"])
def test_a_cut_off_file_is_an_error_that_names_the_folder(tmp_path, state, name):
    save(tmp_path, {4: {}, 5: {}}, state)
    path = tmp_path / "5" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{tmp_path}/5 is damaged.*\[4\]"):
        load_state(tmp_path, state)
    gc.collect()  # here, where the noise is expected, and not in the middle of a later test


@pytest.fixture
def small_files_only():
    """Writes beyond 100 kB fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_in_the_background_surfaces(tmp_path, small_files_only):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, new_state({"w": jax.random.normal(jax.random.key(0), (1000, 200))}, optax.sgd(1.0)))
    with pytest.raises(RuntimeError, match=rf"a checkpoint could not be saved under {tmp_path}.*File too large"):
        while True:
            checkpoints.raise_if_failed()
            time.sleep(0.001)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder was")
    with pytest.raises(NotADirectoryError):
        checkpoints.save(1, state)
    checkpoints.close()


def test_memory_is_logged_around_a_save(tmp_path, state, caplog):
    with caplog.at_level(logging.INFO, logger="jaxlm.train.checkpoint"):
        save(tmp_path, {5: {}}, state)
    assert [("rss" in r.message, "step 5" in r.message) for r in caplog.records] == [(True, True)] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the allocator of Linux")
def test_host_memory_stays_flat_over_200_saves(tmp_path):
    code = """if True:
        import ctypes, sys, jax, optax
        from jaxlm.train.checkpoint import Checkpoints
        from jaxlm.train.memory import rss_bytes
        from jaxlm.train.state import new_state
        state = new_state({"w": jax.random.normal(jax.random.key(0), (1000, 1000))}, optax.adam(1e-3))
        checkpoints = Checkpoints(sys.argv[1], keep_last=2)
        def held():
            checkpoints.wait()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for later is not lost
            return rss_bytes()
        for step in range(200):
            checkpoints.save(step, state)
            if step == 50:
                before = held()
        print(before, held())
        checkpoints.close()
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = map(int, done.stdout.split())
    # A state has 12 MB. Orbax asks TensorStore twice a save for metrics that TensorStore never frees, 40 kB a save.
    assert (after - before) / 149 < 0.3e6


def test_no_checkpoint_where_one_is_expected(tmp_path, state):
    with pytest.raises(ValueError, match=r"expected a checkpoint, found \[\]"):
        load_state(tmp_path, state)
    save(tmp_path, {5: {}}, state)
    with pytest.raises(ValueError, match=r"expected a checkpoint of step 6, found \[5\]"):
        load_state(tmp_path, state, step=6)
    with pytest.raises(ValueError, match="keep_last"):
        Checkpoints(tmp_path, keep_last=0)


def test_checksums_by_hand_on_any_mesh():
    x = jnp.arange(16, dtype=jnp.int32).reshape(8, 2)
    tree = {"i": x, "b": jnp.array([True, True]), "h": jnp.array([1.0, -2.0], jnp.bfloat16)}
    found = make_manifest(tree)
    assert found["i"]["checksum"] == sum(i * (2 * i + 1) for i in range(16))
    assert found["b"]["checksum"] == 1 + 3
    assert found["h"]["checksum"] == 0x3F80 + 3 * 0xC000
    assert json.loads(json.dumps(found)) == found
    mesh = make_mesh(MeshConfig(fsdp=8))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("fsdp")))
    assert make_manifest({"i": sharded}) == {"i": found["i"]}
