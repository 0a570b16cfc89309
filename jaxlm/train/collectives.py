"""The collectives of a compiled program, read from its optimized HLO: kind, bytes, mesh axes, and how often they run.

A cost analysis counts the body of a loop once, and a model is a loop over its layers: here a collective inside loops
counts as often as they run, where the constant that a loop counts up to says so. The TPU compiler turns many gathers
into loops of permutes between neighbours, which overlap with the products that need them, and spreads others over a
chain of the fusions that they run beside: such a chain is one collective.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "f32": 32}
_BITS |= {"s64": 64, "u64": 64, "f64": 64, "s4": 4, "u4": 4}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[fsu]\d+)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:body|calls|to_apply|branch_computations|called_computations)=(?:\{([^}]+)\}|%?([\w.\-]+))")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_NAMED = re.compile(rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}")
_IOTA = re.compile(rf"replica_groups=\[([\d,]+)\]<={_ORDER}")


class Collective(NamedTuple):
    """kind, and the mesh axes that it joins. times: runs in one execution of the program. size: bytes of what a device
    holds of the whole array (gathered, reduced or scattered). sent: bytes that a device sends in one run, by a ring."""

    kind: str
    axes: tuple[str, ...]
    times: int
    size: float
    sent: float


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Every collective of the program, in no order."""
    bodies = computations(hlo)
    runs = run_counts(bodies)
    return [
        _parse(line, found, mesh, times=runs[name])
        for name, line in _links_once(bodies)
        if (found := _OP.search(line)) and runs[name]
    ]


def _links_once(bodies: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(computation, line) of all lines, of the links of a chain only the first."""
    seen: set[tuple[str, ...]] = set()
    for name, lines in bodies.items():
        for line in lines:
            if chain := _CHAIN.search(line):
                if chain.groups() in seen:
                    continue
                seen.add(chain.groups())
            yield name, line


def computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name; "ENTRY" for the first that runs."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name = "ENTRY" if line.startswith("ENTRY") else header[1]
            current = found.setdefault(name, [])
        else:
            current.append(line)
    return found


def run_counts(bodies: dict[str, list[str]]) -> collections.Counter[str]:
    """How often each computation runs; loops whose count is not known count once."""
    edges = {name: list(_called(lines, bodies)) for name, lines in bodies.items()}
    runs: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for other, trips in edges.get(name, ()):
            visit(other, times * trips)

    visit("ENTRY", 1)
    return runs


def _called(lines: Sequence[str], bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """What the lines of a computation call, and how often."""
    for line in lines:
        trips = _trips(line, bodies)
        for listed, single in _CALLS.findall(line):
            for name in (listed or single).replace("%", "").split(","):
                yield name.strip(), trips


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: what it says, or the one constant that its condition compares with; 1 if neither."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    limits = _CONSTANT.findall("\n".join(bodies.get(condition[1], ()))) if condition else []
    return int(limits[0]) if len(limits) == 1 else 1


def _parse(line: str, found: re.Match[str], mesh: Mesh, *, times: int) -> Collective:
    kind, started = found[2], found[3] is not None
    sizes = [_size(*shape) for shape in _SHAPE.findall(found[1])]
    group = _group(line, mesh)
    parts = max(len(group), 1)
    if kind == "collective-permute":
        size = max(sizes)
        sent = size
    elif kind in ("all-gather", "reduce-scatter"):
        # When started, its type holds what goes in beside what comes out: the whole and a part of it.
        whole = parts if kind == "reduce-scatter" else 1
        size = sum(sizes) * (parts / (parts + 1) if started else whole)
        sent = size * (parts - 1) / parts
    else:
        size = sum(sizes) / (2 if started and kind == "all-to-all" else 1)
        sent = size * (parts - 1) / parts * (2 if kind == "all-reduce" else 1)
    return Collective(kind, _axes(group, mesh), times, size, sent)


def _size(dtype: str, dims: str) -> float:
    return _BITS.get(dtype, 8) / 8 * math.prod(int(n) for n in dims.split(",") if n)


def _group(line: str, mesh: Mesh) -> list[int]:
    """The places in the mesh of the devices of the first group."""
    if listed := _LISTED.search(line):
        return [int(n) for n in listed[1].split(",")]
    if named := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _ids(named[2] or str(math.prod(sizes.values())), named[3]).reshape(*sizes.values())
        joined = re.findall(r"'(\w+)'", named[4])
        return ids[tuple(slice(None) if name in joined else 0 for name in sizes)].reshape(-1).tolist()
    if iota := _IOTA.search(line):
        return _ids(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")])[0].tolist()
    return list(range(mesh.size))


def _ids(dims: str, order: str | None) -> np.ndarray:
    """0, 1, ... in an array of those dimensions, transposed to that order."""
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _axes(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    where = np.array(np.unravel_index(np.asarray(group), mesh.devices.shape))
    return tuple(name for name, along in zip(mesh.axis_names, where) if len(set(along.tolist())) > 1)
