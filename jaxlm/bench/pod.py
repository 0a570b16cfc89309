"""Several processes on this machine against one with the same cores: tokens per second of the same run.

    jaxlm bench pod
    jaxlm bench pod --processes 2 --rounds 3 --json out.json

A small Llama is trained by one process and by several, a device each, that exchange gradients over the loopback (gloo);
the batch is the same. The two take turns, a fresh start each; counted are the steps after compilation and warm-up, by
the trainer's own clock. What is lost is what the exchange costs, and what is won where XLA does not keep all cores of
one process busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from jaxlm.recipes import pod
from jaxlm.train.metrics import read_lines

EVERY, SKIPPED = 4, 2
"""Steps between two readings, and readings that are left out: compilation and warm-up."""
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "{run_dir}"
    config.model = dict(vocab_size=2048, width={width}, num_layers=4, num_heads=4, num_kv_heads=4,
                        head_dim={width} // 4, mlp_width=3 * {width}, max_length=256)
    config.data = dict(tokenizer="bytes", sequence_length=256, batch_size={rows},
                       train=[dict(kind="text", path="{text}")])
    config.optim = dict(learning_rate=1e-3, warmup_steps=2)
    config.train = dict(num_steps={steps}, log_every={every}, checkpoint_every={steps})
    config.mesh = dict(data={processes})
    return config
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench pod`."""
    parser.add_argument("--processes", type=int, default=2, help="of the many (default 2: one for each of two cores)")
    parser.add_argument("--rounds", type=int, default=2, help="starts of each (default 2)")
    parser.add_argument("--steps", type=int, default=24, help="of a start (default 24)")
    parser.add_argument("--rows", type=int, default=16, help="of 256 tokens in a batch (default 16)")
    parser.add_argument("--width", type=int, default=256, help="of the model, which has four layers (default 256)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the readings there")


def main(args: argparse.Namespace) -> int:
    """Runs both in turns, prints their speeds and the ratio of medians."""
    if args.steps < EVERY * (SKIPPED + 1):
        raise ValueError(f"--steps: expected at least {EVERY * (SKIPPED + 1)}, found {args.steps}")
    speeds: dict[int, list[float]] = {1: [], args.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(200_000)))
        for turn in range(args.rounds):
            for processes in speeds if turn % 2 == 0 else reversed(speeds):
                found = one_run(args, Path(folder), processes, turn)
                speeds[processes] += found
                many = "es" if processes > 1 else ""
                print(f"{processes} process{many}: {statistics.median(found):,.0f} tokens/s", flush=True)
    ratio = statistics.median(speeds[args.processes]) / statistics.median(speeds[1])
    print(f"{args.processes} processes / 1 process: {ratio:.2f} times the tokens per second")
    if args.json:
        args.json.write_text(json.dumps({"tokens_per_s": speeds, "ratio": ratio}, indent=1))
    return 0


def one_run(args: argparse.Namespace, folder: Path, processes: int, turn: int) -> list[float]:
    """Tokens per second of every reading that counts; ValueError if the run fails."""
    run_dir, config, output = (folder / f"{processes}-{turn}{end}" for end in ("", ".py", ".txt"))
    size = dict(width=args.width, rows=args.rows, steps=args.steps, every=EVERY, processes=processes)
    config.write_text(CONFIG.format(run_dir=run_dir, text=folder / "text.txt", **size))
    with output.open("w") as out:
        command = [sys.executable, "-m", "jaxlm.cli", "train", "--config", str(config)]
        status = pod.wait(pod.start(command, processes=processes, devices=1, out=out), grace=30)
    if status:
        raise ValueError(f"a run of {processes} ended with status {status}: {output.read_text()[-2000:]}")
    lines = read_lines(run_dir / "metrics.jsonl")
    return [line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line][SKIPPED:]
