"""Encoding texts against sentence-transformers: texts per second with the same weights, in one interleaved run.

    jaxlm bench encode --model path/to/all-MiniLM-L6-v2 --texts sentences.txt --versus sentence-transformers

Both read the same folder and encode the same texts in their order, tokenising included, on every core, in float32, with
batches of the same size sorted by length. The vectors must agree (cosine of at least 0.9999), or nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlm.bench.interleave import interleave, medians
from jaxlm.evals.encode import Encoder
from jaxlm.recipes.encode import read_texts
from jaxlm.recipes.runtime import Runtime, configure
from jaxlm.sharding.mesh import MeshConfig, make_mesh

RIVAL = "sentence-transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench encode`."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a sentence-transformers folder")
    parser.add_argument("--texts", required=True, metavar="FILE", help="a text a line, or .jsonl with --field")
    parser.add_argument("--field", default="text", help="the field of a jsonl row (default: text)")
    parser.add_argument("--limit", type=int, default=1000, help="texts (default 1000)")
    parser.add_argument("--versus", choices=(RIVAL, "none"), default="none", help="the rival (default: none)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts a call, on each device (default 32)")
    parser.add_argument("--simulate-devices", type=int, metavar="N", help="N CPU devices, between which rows are split")
    parser.add_argument("--rounds", type=int, default=7, help="passes of each (default 7)")
    parser.add_argument("--json", metavar="OUT", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Checks that both agree, measures, prints a line each and their ratio."""
    texts = list(read_texts(Path(args.texts), args.field))[: args.limit]
    if not texts:
        raise ValueError(f"--texts {args.texts}: no text in it")
    configure(Runtime(simulated_devices=args.simulate_devices))
    mesh = make_mesh(MeshConfig())
    model = Encoder.load(args.model).on(mesh)
    runs: dict[str, Callable[[], np.ndarray]] = {
        "jaxlm": lambda: model.encode(texts, batch_size=args.batch_size * mesh.size)
    }
    if args.versus == RIVAL:
        runs[RIVAL] = theirs(args.model, texts, args.batch_size)
        print(f"smallest cosine between both: {check(runs['jaxlm'](), runs[RIVAL]()):.7f}")
    times = interleave(runs, rounds=args.rounds, warmup=1)
    middle = medians(times)
    for name, seconds in middle.items():
        low, high = min(times[name]), max(times[name])
        print(f"{name:22} {len(texts) / seconds:8,.0f} texts/s   {seconds:.3f} s ({low:.3f} to {high:.3f})")
    ratio = middle[RIVAL] / middle["jaxlm"] if RIVAL in middle else None
    if ratio is not None:
        print(f"jaxlm / {RIVAL}: {ratio:.2f} times the texts per second ({os.cpu_count()} cores)")
    if args.json:
        figures = {"texts": len(texts), "seconds": times, "median_s": middle, "ratio": ratio}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def theirs(folder: str, texts: list[str], batch_size: int) -> Callable[[], np.ndarray]:
    """A function that encodes with sentence-transformers; ValueError if it is not installed."""
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(f"--versus {RIVAL} needs it: pip install 'jaxlm[parity]'") from error
    torch.set_num_threads(os.cpu_count() or 1)
    model = SentenceTransformer(folder, device="cpu")
    return lambda: model.encode(texts, batch_size=batch_size)


def check(ours: np.ndarray, others: np.ndarray) -> float:
    """The smallest cosine between the vectors of both; ValueError below 0.9999, for then they are not one model."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(others, axis=1)
    smallest = float(np.min(np.sum(ours * others, axis=1) / norms))
    if not smallest >= 0.9999:
        raise ValueError(f"expected the same vectors from both, found a cosine of {smallest:.6f}: is it one model?")
    return smallest
