"""`jaxlm plan --scale`: the same rows per device on more and more devices, as the compiler sees it.

On every slice the axes tensor and sequence are the config's, fsdp is the config's or, on fewer devices, what there is,
and data takes the rest. Weak scaling is perfect where memory and bytes sent by a device stay what they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.recipes.describe import bytes_text
from jaxlm.recipes.plan import make_plan
from jaxlm.recipes.plan_table import Plan
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.sharding.topology import devices_of


class Point(NamedTuple):
    """One size."""

    topology: str
    num_devices: int
    mesh: MeshConfig
    plan: Plan


def scale(cfg: Any, topologies: Sequence[str], stage: str | None = None) -> Iterator[Point]:
    """The config on each topology, as soon as it is compiled."""
    for topology in topologies:
        found = devices_of(topology)
        sized = resize(cfg, len(found))
        yield Point(topology, len(found), sized.mesh, make_plan(sized, found, stage))


def resize(cfg: Any, num_devices: int) -> Any:
    """The config for that many devices, with as many rows for each; ValueError if its other axes do not divide them."""
    mesh = cfg.mesh
    inner = mesh.tensor * mesh.sequence
    written = mesh.slice * (mesh.data or 1) * mesh.fsdp
    fsdp = min(mesh.fsdp, num_devices // inner)
    if num_devices % (fsdp * inner) or not fsdp:
        raise ValueError(
            f"{num_devices} devices cannot be split by tensor={mesh.tensor} x sequence={mesh.sequence} x fsdp={fsdp}: "
            "choose sizes that divide every topology"
        )
    data = num_devices // (fsdp * inner)
    rows = cfg.data.batch_size // written * data * fsdp
    return dataclasses.replace(
        cfg, mesh=dataclasses.replace(mesh, slice=1, data=data, fsdp=fsdp),
        data=dataclasses.replace(cfg.data, batch_size=rows),
    )  # fmt: skip


def render(points: Sequence[Point]) -> str:
    """A table, a line a size."""
    head = f"{'topology':16}{'devices':>8}{'data':>6}{'fsdp':>6}{'memory':>12}{'sent':>12}"
    names = [name for name in points[0].plan.times]
    lines = [head + "".join(f"{name:>12}" for name in names) + f"{'compiled in':>14}"]
    for p in points:
        line = f"{p.topology:16}{p.num_devices:8,}{p.mesh.data:6,}{p.mesh.fsdp:6,}"
        line += f"{bytes_text(int(p.plan.total)):>12}{bytes_text(int(sent(p.plan))):>12}"
        line += "".join(f"{1e3 * p.plan.times[name]:9.0f} ms" for name in names)
        lines.append(line + f"{p.plan.compile_s:12.0f} s")
    return "\n".join([*lines, "", "memory and bytes sent are a device's in a step; times are bounds at the peaks"])


def sent(plan: Plan) -> float:
    """Bytes that a device sends in a step."""
    return sum(size for _, size in plan.sent.values())


def as_dicts(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"topology": p.topology, "devices": p.num_devices, "mesh": dataclasses.asdict(p.mesh), "total": p.plan.total,
         "sent": sent(p.plan), "times": p.plan.times}
        for p in points
    ]  # fmt: skip


def plot(points: Sequence[Point], out: str | Path, *, title: str) -> None:
    """Memory and bytes sent of a device by the number of devices, and its times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    sizes, times = figure.subplots(1, 2)
    devices = [p.num_devices for p in points]
    sizes.plot(devices, [p.plan.total / 2**30 for p in points], "o-", label="memory")
    sizes.plot(devices, [sent(p.plan) / 2**30 for p in points], "s-", label="sent in a step")
    sizes.axhline(points[0].plan.capacity / 2**30, color="black", linewidth=1, linestyle="--", label="capacity")
    sizes.set_ylabel("GiB of a device")
    for name in points[0].plan.times:
        times.plot(devices, [1e3 * p.plan.times[name] for p in points], "o-", label=name)
    times.set_ylabel("ms of a step, at the peak")
    for axes in (sizes, times):
        axes.set_xscale("log", base=2)
        axes.set_xticks(devices, [f"{n:,}" for n in devices], minor=False)
        axes.set_yscale("log")
        axes.set_xlabel("devices")
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out)
