"""A whole training run of a config against the same model and data in a plain PyTorch loop: held-out bits per byte.

    jaxlm bench pretrain --config configs/pretrain/cpu_5m.py:corpus.jsonl.gz --seeds 0 1 2 --out runs/against_torch

Both start from the same parameters and read the same batches; the rival is transformers' LlamaForCausalLM under
torch's AdamW, with the same schedule, clipping and document mask (pip install 'jaxlm[parity]'). What counts is whether
their held-out bits per byte agree within the spread over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxlm.data import pipeline
from jaxlm.data.loader import eval_batches
from jaxlm.data.sources import describe
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.models import decoder, hf
from jaxlm.models import spec as specs
from jaxlm.recipes import lm
from jaxlm.recipes.runtime import Runtime, configure
from jaxlm.recipes.train import load_recipe
from jaxlm.train.optim import make_schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench pretrain`."""
    parser.add_argument("--config", required=True, metavar="FILE.py", help="a language-model config: Llama, AdamW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each (default 0 1 2)")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="runs and results.json; it resumes"
    )


def main(args: argparse.Namespace) -> int:
    """Runs what is not in the folder yet and prints a line per seed."""
    configure(Runtime())
    cfg = lm.resolve(load_recipe(args.config, args.overrides)[1])
    check_comparable(cfg)
    path = Path(args.out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    for seed in args.seeds:
        for name, run in (("jaxlm", jaxlm_run), ("torch", torch_run)):
            key = f"{name}/{seed}"
            if key not in results:
                results[key] = run(seeded(cfg, seed, Path(args.out) / f"seed_{seed}"))
                path.write_text(json.dumps(results, indent=2) + "\n")
            print(key, " ".join(f"{k}={v:.4f}" for k, v in results[key].items()), flush=True)
    print(summary(results, args.seeds))
    return 0


def check_comparable(cfg: lm.Config) -> None:
    """ValueError where the plain loop below would not do the same."""
    model = cfg.model
    if model is None or cfg.optim.name != "adamw" or model.dropout or cfg.train.ema_decay or cfg.train.z_loss:
        raise ValueError("bench pretrain compares plain runs: optim.name='adamw', no dropout, no ema_decay, no z_loss")
    if model.dtype != "float32" or len(cfg.data.heldout) != 1:
        raise ValueError("bench pretrain expects model.dtype='float32' and one held-out source")


def seeded(cfg: lm.Config, seed: int, run_dir: Path) -> lm.Config:
    """The config with its parameters and its order of data drawn from `seed`."""
    return dataclasses.replace(
        cfg,
        run_dir=str(run_dir),
        train=dataclasses.replace(cfg.train, seed=seed),
        data=dataclasses.replace(cfg.data, seed=seed),
    )


def summary(results: dict[str, dict[str, float]], seeds: Iterable[int]) -> str:
    """The means of both, their differences seed by seed, and the spread over seeds that these are judged by."""
    ours, theirs = ([results[f"{name}/{s}"]["bits_per_byte"] for s in seeds] for name in ("jaxlm", "torch"))
    spread = statistics.stdev(ours) if len(ours) > 1 else math.nan
    gaps = ", ".join(f"{a - b:+.5f}" for a, b in zip(ours, theirs))
    return (
        f"held-out bits per byte: jaxlm {statistics.mean(ours):.4f}, torch {statistics.mean(theirs):.4f}; "
        f"difference per seed {gaps}; standard deviation over seeds {spread:.5f}"
    )


def jaxlm_run(cfg: lm.Config) -> dict[str, float]:
    """The run as `jaxlm train` does it."""
    start = time.perf_counter()
    result = lm.run(cfg)
    bpb = result.metrics[f"{describe(cfg.data.heldout[0])}/bits_per_byte"]
    return {"bits_per_byte": bpb, "seconds": time.perf_counter() - start}


def torch_run(cfg: lm.Config) -> dict[str, float]:
    """The same in a plain loop, from the parameters that the run of jaxlm starts from."""
    start = time.perf_counter()
    model, data = torch_model(cfg), pipeline.build(cfg.data, load_tokenizer(cfg.data.tokenizer))
    optimizer = adamw(model, cfg)
    schedule = make_schedule(cfg.optim, num_steps=cfg.train.num_steps)
    rates = np.asarray(jax.vmap(schedule)(np.arange(cfg.train.num_steps)))
    batches = data.train.batches(0, cfg.train.num_steps, num_threads=0)
    for step, batch in tqdm(batches, total=cfg.train.num_steps, desc="torch"):
        torch_step(model, optimizer, batch, float(rates[step]), cfg.optim.clip_norm)
    (rows,) = data.heldout.values()
    bpb = torch_bits_per_byte(model, eval_batches(rows, batch_size=cfg.data.batch_size))
    return {"bits_per_byte": bpb, "seconds": time.perf_counter() - start}


def torch_model(cfg: lm.Config) -> Any:
    """transformers' Llama with the parameters of step 0 of the jaxlm run, handed over as a Hugging Face folder."""
    import transformers

    assert cfg.model is not None
    folder = Path(cfg.run_dir) / "initial"
    if not folder.exists():
        spec = decoder.spec(cfg.model)
        initial = jax.jit(partial(specs.init, spec=spec))(jax.random.key(cfg.train.seed))
        hf.save(folder, initial, cfg.model, family="llama")
    return transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()


def adamw(model: Any, cfg: lm.Config) -> Any:
    """Decay on matrices alone, as `models.spec.decay_mask` has it."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.optim.b1, cfg.optim.b2), eps=cfg.optim.eps, fused=True)


def torch_step(model: Any, optimizer: Any, batch: dict[str, np.ndarray], rate: float, clip: float | None) -> None:
    """One update on the mean over the batch's targets."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    (torch_nll(model, batch) / int(batch["mask"].sum())).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def torch_nll(model: Any, batch: dict[str, np.ndarray]) -> Any:
    """The sum of -log p(target) over the mask; a document sees only itself."""
    import torch

    segments = torch.from_numpy(batch["segments"])
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    visible = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
    logits = model(
        torch.from_numpy(batch["inputs"]).long(),
        attention_mask=visible,
        position_ids=torch.from_numpy(batch["positions"]).long(),
        use_cache=False,
    ).logits
    targets = torch.from_numpy(np.where(batch["mask"], batch["targets"], -100)).long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def torch_bits_per_byte(model: Any, batches: Iterable[dict[str, np.ndarray]]) -> float:
    """Bits of all held-out targets over the bytes that they stand for."""
    import torch

    nats, num_bytes = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            nats += torch_nll(model, batch).item()
            num_bytes += int(batch["target_bytes"][batch["mask"]].sum())
    return nats / math.log(2) / num_bytes
