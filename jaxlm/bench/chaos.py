"""Processes of a pod on this machine killed at random moments: does the run still end with the very same parameters?

    jaxlm bench chaos --kills 5
    jaxlm bench chaos --kills 50 --processes 4 --devices 2 --seed 0 --json out.json

First a small model is trained undisturbed. Then the same run is started again and again, and each time a random process
gets SIGKILL or SIGTERM at a random moment: every third time while it starts, else while it trains and saves; after the
last kill it is left alone. In the end the parameters of both runs must be equal bit for bit, and so must their losses:
exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.recipes import pod
from jaxlm.recipes.train import load_recipe
from jaxlm.train.checkpoint import load_params
from jaxlm.train.metrics import read_lines

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "{run_dir}"
    config.model = dict(vocab_size=259, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128,
                        max_length=128)
    config.data = dict(tokenizer="bytes", sequence_length=64, batch_size={rows},
                       train=[dict(kind="text", path="{text}")])
    config.optim = dict(learning_rate=3e-3, warmup_steps=5)
    config.train = dict(num_steps={steps}, log_every=1, checkpoint_every=3)
    config.mesh = dict(fsdp={devices})
    return config
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench chaos`."""
    parser.add_argument("--kills", type=int, default=5, help="of a random process (default 5)")
    parser.add_argument("--processes", type=int, default=2, help="hosts (default 2)")
    parser.add_argument("--devices", type=int, default=2, help="simulated devices of each (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="of the run (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default 0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write what happened there")


def main(args: argparse.Namespace) -> int:
    """Runs both, prints each kill, and compares."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(20_000)))
        with (base / "output.txt").open("w") as out:
            status, begun, length = straight_run(args, run_of(args, base, "straight"), out)
            if status:
                raise ValueError(f"the undisturbed run ended with status {status}: {_tail(base / 'output.txt')}")
            print(f"undisturbed: {length:.0f} s, the first step after {begun:.0f} s", flush=True)
            disturbed = run_of(args, base, "disturbed")
            # On average a start that trains makes half of its share of the steps before it is killed: some are left.
            share = (length - begun) / max(args.kills, 1)
            kills = list(disturb(args, disturbed, out, starting=begun, training=share))
            status = pod.wait(start(args, disturbed, out), grace=30)
        same = status == 0 and equal(base / "straight", base / "disturbed", args.steps)
        number = sum(not kill.get("too_late") for kill in kills)
        told = "are the same" if same else "DIFFER"
        print(f"{number} of {args.kills} kills; parameters and losses {told} bit for bit")
        if number < args.kills:
            print("the run ended before the others: raise --steps")
        if status:
            print(_tail(base / "output.txt"))
    if args.json:
        args.json.write_text(json.dumps({"kills": kills, "same": same}, indent=1))
    return 0 if same else 1


def run_of(args: argparse.Namespace, base: Path, name: str) -> Path:
    """The config of a run in its own folder."""
    devices = args.processes * args.devices
    path = base / f"{name}.py"
    path.write_text(
        CONFIG.format(run_dir=base / name, text=base / "text.txt", rows=2 * devices, steps=args.steps, devices=devices)
    )
    return path


def start(args: argparse.Namespace, config: Path, out: TextIO) -> list[Any]:
    """All processes of a run."""
    command = [sys.executable, "-m", "jaxlm.cli", "train", "--config", str(config)]
    return pod.start(command, processes=args.processes, devices=args.devices, out=out)


def straight_run(args: argparse.Namespace, config: Path, out: TextIO) -> tuple[int, float, float]:
    """The undisturbed run: its status, and the seconds until its first step and until its end."""
    begin, lines = time.monotonic(), config.with_suffix("") / "metrics.jsonl"
    running = start(args, config, out)
    while not (lines.exists() and lines.stat().st_size) and any(process.poll() is None for process in running):
        time.sleep(0.1)
    begun = time.monotonic() - begin
    return pod.wait(running, grace=30), begun, time.monotonic() - begin


def disturb(args: argparse.Namespace, config: Path, out: TextIO, *, starting: float, training: float) -> Any:
    """Starts the run and kills one of its processes, as often as asked; yields what was done.

    A kill comes within `starting` seconds of the start or within `training` seconds of the first step of this start. A
    run that ends before its kill is not started again.
    """
    rng = random.Random(args.seed)
    lines = config.with_suffix("") / "timeline.jsonl"
    for i in range(args.kills):
        running = start(args, config, out)
        victim, number = rng.randrange(args.processes), rng.choice((signal.SIGKILL, signal.SIGTERM))
        while_it = rng.choice(("starts", "trains", "trains"))
        after = rng.uniform(0, training if while_it == "trains" else starting)
        before = steps_told(lines)
        while while_it == "trains" and steps_told(lines) == before and any(p.poll() is None for p in running):
            time.sleep(0.02)
        until = time.monotonic() + after
        while time.monotonic() < until and any(process.poll() is None for process in running):
            time.sleep(0.02)
        ended = all(process.poll() is not None for process in running)
        if not ended:
            running[victim].send_signal(number)
        pod.wait(running, grace=10)
        saved = saved_steps(config.with_suffix(""))
        kill = {"kill": i + 1, "while_it": while_it, "process": victim, "signal": number.name}
        kill |= {"after_s": round(after, 2), "saved": saved}
        kill |= {"too_late": True} if ended else {}
        print(json.dumps(kill), flush=True)
        yield kill
        if ended:
            return


def steps_told(timeline: Path) -> int:
    """Lines of steps in a run's timeline, which only ever grows."""
    return sum('"line"' in line for line in timeline.read_text().splitlines()) if timeline.exists() else 0


def saved_steps(run: Path) -> int | None:
    """The newest checkpoint of a run."""
    found = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(found, default=None)


def equal(one: Path, two: Path, step: int) -> bool:
    """Whether the last parameters of two runs, and all losses, are the same bit for bit."""
    first, second = (
        {line["step"]: line["train/loss"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line}
        for run in (one, two)
    )
    return first == second and jax.tree.all(jax.tree.map(np.array_equal, _params(one, step), _params(two, step)))


def _params(run: Path, step: int) -> Any:
    recipe, cfg = load_recipe(str(run.with_suffix(".py")), [])
    shapes = specs.abstract(decoder.spec(recipe.resolve(cfg).model))
    return load_params(run / "checkpoints", shapes, step=step)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text().splitlines()[-30:])
