"""Meshes, the rules table, and the errors that say which two numbers do not fit."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.models.spec import flatten
from jaxlm.sharding.mesh import AXES, MeshConfig, make_mesh
from jaxlm.sharding.place import check_batch, make_constrain, shard_batch
from jaxlm.sharding.rules import RULES, batch_parts, param_shardings, partition_spec, sharding
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.state import state_shardings

CFG = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)


def test_the_mesh_has_five_auto_axes_and_data_takes_the_rest():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (MeshConfig(fsdp=3), r"8 devices cannot be split by fsdp=3 = 3"),
        (MeshConfig(data=3, tensor=2), r"data=3 x tensor=2 needs 6 devices, and there are 8.*mesh\.data=None"),
        (MeshConfig(tensor=0), r"mesh\.tensor=0: expected at least 1"),
    ],
)
def test_meshes_that_do_not_fit(cfg, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(cfg)


def test_parameters_lie_as_the_table_says():
    placed = {
        path: s.spec
        for path, s in flatten(param_shardings(decoder.spec(CFG), make_mesh(MeshConfig(fsdp=2, tensor=2)))).items()
    }
    assert placed["embed/table"] == PartitionSpec("tensor", "fsdp")
    assert placed["layers/attn/q/kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert placed["layers/attn/out/kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert placed["layers/mlp/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert placed["final_norm/scale"] == PartitionSpec(None)


def test_optimizer_statistics_lie_like_their_parameters():
    mesh, spec = make_mesh(MeshConfig(fsdp=2, tensor=2)), decoder.spec(CFG)
    optimizer, _ = make_optimizer(OptimConfig(), num_steps=10, decay_mask=jax.tree.map(lambda _: True, spec))
    state = state_shardings(spec, optimizer, mesh=mesh, ema=True)
    params = flatten(state.params)
    moments = [s for path, s in flatten(state.opt_state).items() if path.endswith("layers/mlp/up/kernel")]
    assert len(moments) == 2
    assert {s.spec for s in moments} == {params["layers/mlp/up/kernel"].spec}
    assert flatten(state.ema)["embed/table"].spec == params["embed/table"].spec
    assert state.step.spec == PartitionSpec()


def test_sizes_that_do_not_divide_name_both_numbers_and_the_way_out():
    mesh = make_mesh(MeshConfig(tensor=4, fsdp=2))
    with pytest.raises(ValueError, match=r"layers/attn/k/kernel: kv_heads = 2 is not divisible by tensor = 4: use 4"):
        param_shardings(decoder.spec(CFG), mesh)
    with pytest.raises(ValueError, match=r"x: embed = 33 is not divisible by fsdp = 2: use 32 or 34"):
        sharding((33,), ("embed",), mesh, what="x")


def test_collisions_and_unknown_axes():
    with pytest.raises(ValueError, match="'heads' and 'mlp' of one array both go to mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'widht'"):
        partition_spec(("widht",))
    assert partition_spec(("widht",), {**RULES, "widht": None}) == PartitionSpec(None)


def test_batches_that_do_not_divide():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    assert batch_parts(mesh) == 4
    check_batch(mesh, batch_size=8, num_microbatches=2, sequence_length=16)
    with pytest.raises(ValueError, match=r"batch_size=12 is not divisible by .* = 8: use 8 or 16"):
        check_batch(mesh, batch_size=12, num_microbatches=2, sequence_length=16)
    with pytest.raises(ValueError, match="sequence_length=15 is not divisible by mesh.sequence=2"):
        check_batch(mesh, batch_size=8, sequence_length=15)


def test_batches_are_split_over_rows_and_positions():
    mesh = make_mesh(MeshConfig(fsdp=4, sequence=2))
    placed = shard_batch({"inputs": np.arange(8 * 6, dtype=np.int32).reshape(8, 6)}, mesh)["inputs"]
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, np.arange(48).reshape(8, 6))


def test_constrain_is_the_identity_on_one_device():
    x = np.ones((2, 3))
    assert make_constrain(make_mesh(MeshConfig(), jax.devices()[:1]))(x, ("batch", "length")) is x
