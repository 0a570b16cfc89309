"""Collectives read from compiled programs that are known to have them, loops and mesh axes included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxlm.train.collectives import collectives

N = 128


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, body):
    run = jax.shard_map(body, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")), check_vma=False)
    return jax.jit(run).lower(jax.ShapeDtypeStruct((8 * N,), jnp.float32)).compile().as_text()


@pytest.mark.parametrize(
    "kind, body, axes, size, sent",
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "data"), ("data",), 4 * N, 4 * N),
        ("all-reduce", lambda x: jax.lax.psum(x, ("data", "fsdp")), ("data", "fsdp"), 4 * N, 2 * 4 * N * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp").sum(axis=0), ("fsdp",), 16 * N, 12 * N),
        (
            "reduce-scatter",
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), 4),
            ("fsdp",), 4 * N, 3 * N,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            ("fsdp",), 4 * N, 4 * N,
        ),
    ],
    ids=["psum", "psum over both", "gather", "scatter", "permute"],
)  # fmt: skip
@pytest.mark.parametrize("times", [1, 5])
def test_kind_axes_bytes_and_runs(mesh, kind, body, axes, size, sent, times):
    def repeated(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(body(x)), None), x, None, length=times)[0]

    found = [c for c in collectives(compiled(mesh, repeated), mesh) if c.kind == kind]
    assert sum(c.times for c in found) == times
    assert {(c.axes, c.size, c.sent) for c in found} == {(axes, size, sent)}


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("mesh['a'=2,'b'=2,'c'=2] {'b','c'}", ("fsdp",)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp",)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ("data",)),
        ("mesh['a'=2,'b'=4], device_ids=([8]) {'a'}", ("data",)),
    ],
)
def test_groups_of_named_axes_as_newer_compilers_write_them(mesh, groups, axes):
    line = f"replica_groups={groups}, to_apply=%add"
    hlo = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %r = f32[8]{{0}} all-reduce(%x), {line}\n}}\n"
    (found,) = collectives(hlo, mesh)
    assert found.axes == axes and found.size == 32


def test_a_loop_runs_as_often_as_its_condition_says(mesh):
    hlo = "\n".join(
        [
            "%cond (p: (s32[])) -> pred[] {",
            "  %constant.1 = s32[]{:T(128)} constant(32), metadata={}",
            "}",
            "%body (p: (s32[])) -> (s32[]) {",
            "  %g = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}",
            "}",
            "ENTRY %main (x: s32[]) -> s32[] {",
            "  %w = (s32[]) while(%x), condition=%cond, body=%body",
            "}",
        ]
    )
    (found,) = collectives(hlo, mesh)
    assert found == ("all-gather", ("fsdp",), 32, 128.0, 96.0)


@pytest.mark.parametrize(
    "started, expected",
    [
        ("((f32[8,4]{1,0}, bf16[8]{0}), (f32[2,4]{1,0}, bf16[2]{0})) reduce-scatter", ("reduce-scatter", 144, 108)),
        ("((f32[2,4]{1,0}), f32[8,4]{1,0}) all-gather", ("all-gather", 128, 96)),
        ("((f32[8,4]{1,0}), f32[8,4]{1,0}) all-to-all", ("all-to-all", 128, 96)),
        ("(f32[8,4]{1,0}, f32[4]{0}) all-reduce", ("all-reduce", 144, 216)),
    ],
)
def test_what_is_started_shows_what_goes_in_and_what_comes_out(mesh, started, expected):
    line = f"  %s = {started}-start(%x), replica_groups=mesh['a'=2,'b'=4] {{'b'}}, dimensions={{0}}"
    (found,) = collectives(f"ENTRY %main (x: f32[8,4]) -> f32[2,4] {{\n{line}\n}}\n", mesh)
    assert (found.kind, found.size, found.sent) == expected and found.axes == ("fsdp",)


def test_a_gather_spread_over_a_chain_of_fusions_is_one(mesh):
    line = "%g = f32[8,4]{1,0} all-gather(%x), channel_id=7, dimensions={0}, replica_groups={{0,1,2,3,4,5,6,7}}"
    link = f'{line}, frontend_attributes={{chain_id="2"}}'
    fusions = "".join(f"%f.{i} (x: f32[1,4]) -> f32[8,4] {{\n  {link}\n}}\n" for i in range(3))
    calls = "".join(f"  %c.{i} = f32[8,4]{{1,0}} fusion(%x), calls=%f.{i}\n" for i in range(3))
    hlo = f"{fusions}ENTRY %main (x: f32[1,4]) -> f32[8,4] {{\n{calls}  {line}\n}}\n"
    assert [c.times for c in collectives(hlo, mesh)] == [1, 1]  # the chain, and one that is in none
