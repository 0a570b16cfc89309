"""What a plan is, and how it is shown: as a table, as JSON, as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.recipes.describe import bytes_text


class Plan(NamedTuple):
    """What the compiled step needs of one device. memory: bytes by class, largest first, `total` not among them.
    capacity: bytes of the device. times: seconds by what is used at its peak; empty where no peaks are known. sent:
    bytes over the network by (kind, axes), with the number of runs. assumed: of what only the data would tell."""

    memory: dict[str, float]
    capacity: float
    model_flops: float
    times: dict[str, float]
    sent: dict[tuple[str, tuple[str, ...]], tuple[int, float]]
    tokens: int
    compile_s: float
    assumed: str = ""

    @property
    def total(self) -> float:
        """Bytes of a device that the step takes."""
        return sum(self.memory.values())

    @property
    def mfu_bound(self) -> float | None:
        """The share of the peak that model FLOPs can reach at most; None where the peaks are not known."""
        return self.times["products"] / max(self.times.values()) if self.times else None


def render(plan: Plan) -> str:
    """The plan as a person reads it."""
    lines = [f"compiled in {plan.compile_s:.0f} s", "", "memory of a device"]
    lines += [f"  {name:12}{bytes_text(int(size)):>12}" for name, size in plan.memory.items() if size]
    fits = "fits" if plan.total <= plan.capacity else "DOES NOT FIT"
    lines += [f"  {'in all':12}{bytes_text(int(plan.total)):>12}  of {bytes_text(int(plan.capacity))}: {fits}", ""]
    lines += ["collectives of a step, per device"]
    for (kind, axes), (runs, sent) in plan.sent.items():
        lines.append(f"  {kind:20}{'+'.join(axes):16}{runs:7,} runs{bytes_text(int(sent)):>12} sent")
    lines += ["" if plan.sent else "  none", "least time of a step, were nothing else to take any"]
    lines += [f"  {name:12}{1e3 * seconds:10.1f} ms" for name, seconds in plan.times.items()]
    bound = "  no peaks are known here" if plan.mfu_bound is None else f"MFU at most {100 * plan.mfu_bound:.0f} %"
    lines += ["", f"{plan.tokens:,} tokens and {plan.model_flops:.3g} model FLOPs a step; {bound}"]
    if plan.assumed:
        lines.append(f"assumed: {plan.assumed}")
    return "\n".join(lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """For JSON."""
    sent = [{"kind": k, "axes": a, "runs": n, "bytes": s} for (k, a), (n, s) in plan.sent.items()]
    return plan._asdict() | {"sent": sent, "total": plan.total, "mfu_bound": plan.mfu_bound}


def plot(plan: Plan, out: str | Path, *, title: str) -> None:
    """Memory by class beside the capacity, and the three times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    memory, times = figure.subplots(1, 2)
    left = 0.0
    for i, (name, size) in enumerate(plan.memory.items()):
        memory.barh(["a device"], [size / 2**30], left=left, color=f"C{i}", label=name)
        left += size / 2**30
    memory.axvline(plan.capacity / 2**30, color="black", linewidth=1, linestyle="--", label="capacity")
    memory.set_xlabel("GiB")
    memory.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    times.barh(list(plan.times), [1e3 * s for s in plan.times.values()], color="#4477aa")
    times.set_xlabel("ms at the peak")
    for axes in (memory, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out)
