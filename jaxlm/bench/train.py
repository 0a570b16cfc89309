"""One training step against the same model in PyTorch: tokens per second, in one interleaved run.

    jaxlm bench train --versus torch
    jaxlm bench train --versus torch --dtype bfloat16 --rounds 9 --json out.json
    jaxlm bench train --dtype bfloat16 --batch 8 --length 4096 --width 2048 --layers 16 --heads 32 --kv-heads 8 \\
        --mlp-width 8192            # 1.0B parameters: for one GPU of 80 GB

The model is a Llama (about 42M parameters by default) on random tokens: forward, backward, AdamW. The rival is
transformers' LlamaForCausalLM with sdpa attention and torch's fused AdamW (pip install 'jaxlm[parity]'); in bfloat16 it
runs under autocast. Both keep float32 parameters and use every core. What counts is the ratio of the medians. Where the
chip's peak is known, model FLOPs and MFU are printed with the definition that they are counted by. --trace writes a
profile of the last step, for TensorBoard or Perfetto.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.bench.interleave import interleave, medians
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.train.chips import peak_flops
from jaxlm.train.flops import DEFINITION, flops_per_token
from jaxlm.train.objectives import make_hidden_nll, make_next_token_loss
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.state import new_state
from jaxlm.train.step import make_train_step

OPTIM = OptimConfig(learning_rate=3e-4, schedule="constant", clip_norm=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench train`."""
    parser.add_argument("--versus", choices=("torch", "none"), default="none", help="the rival (default: none)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations and products"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--batch", type=int, default=4, help="rows (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens per row (default 512)")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values (default: as many as --heads)")
    parser.add_argument("--mlp-width", type=int, default=1376)
    parser.add_argument(
        "--remat", choices=("none", "full", "dots", "dots_no_batch"), default="none", help="what is recomputed"
    )
    parser.add_argument("--trace", metavar="FOLDER", help="write a profile of one more step of jaxlm there")
    parser.add_argument("--json", metavar="OUT", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a line per framework, and writes JSON if asked."""
    cfg = DecoderConfig(
        vocab_size=args.vocab, width=args.width, num_layers=args.layers, num_heads=args.heads,
        num_kv_heads=args.kv_heads or args.heads, head_dim=args.width // args.heads, mlp_width=args.mlp_width,
        max_length=args.length, dtype=args.dtype, remat=args.remat, scan_layers=False,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length + 1))
    steps: dict[str, Callable[[], Any]] = {"jaxlm": jaxlm_step(cfg, tokens)}
    if args.versus == "torch":
        steps["torch"] = torch_step(cfg, tokens)
    times = interleave(steps, rounds=args.rounds, warmup=2)
    middle = medians(times)
    per_step = args.batch * args.length
    for name, seconds in middle.items():
        low, high = min(times[name]), max(times[name])
        print(f"{name:6} {per_step / seconds:9,.0f} tokens/s   {seconds:.3f} s a step ({low:.3f} to {high:.3f})")
    mfu = print_mfu(cfg, per_step / middle["jaxlm"])
    if args.trace:
        with jax.profiler.trace(args.trace):
            jax.block_until_ready(steps["jaxlm"]())
    ratio = middle["torch"] / middle["jaxlm"] if "torch" in middle else None
    if ratio is not None:
        print(f"jaxlm / torch: {ratio:.2f} times the tokens per second ({args.dtype}, {os.cpu_count()} cores)")
    if args.json:
        figures = {
            "arguments": _plain(args),
            "seconds": times,
            "median_s": middle,
            "ratio": ratio,
            "mfu": mfu,
            "versions": _versions(),
        }
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def print_mfu(cfg: DecoderConfig, tokens_per_s: float) -> float | None:
    """Prints the model FLOP/s and MFU of a rate; None where the device's peak is not known."""
    device, peak = jax.devices()[0], peak_flops()
    if peak is None:
        return None
    per_token = flops_per_token(
        decoder.spec(cfg), sequence_length=cfg.max_length, num_layers=cfg.num_layers, num_heads=cfg.num_heads,
        head_dim=cfg.head_dim,
    )  # fmt: skip
    rate = tokens_per_s * per_token
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    print(f"{rate / 1e12:.0f} TFLOP/s, MFU {rate / peak:.1%} of {peak / 1e12:.0f} on {device.device_kind}, ", end="")
    print(f"at most {memory:.1f} GiB. {DEFINITION}")
    return rate / peak


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | None)}


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return {p: importlib.metadata.version(p) for p in ("jax", "torch", "transformers") if p in installed}


def jaxlm_step(cfg: DecoderConfig, tokens: np.ndarray) -> Callable[[], Any]:
    """A function that takes one step of the library's own train step and returns the loss, still on its device."""
    spec = decoder.spec(cfg)
    optimizer, schedule = make_optimizer(OPTIM, num_steps=1, decay_mask=specs.decay_mask(spec))

    def apply(params: Any, tokens: Any, *, positions: Any, segments: Any, key: Any) -> Any:
        return decoder.forward(params, tokens, cfg=cfg, positions=positions, segments=segments, key=key).hidden

    loss_fn = make_next_token_loss(make_hidden_nll(apply, partial(decoder.head, cfg=cfg)))
    step = jax.jit(make_train_step(loss_fn, optimizer, seed=0, schedule=schedule), donate_argnums=0)
    state = new_state(specs.init(jax.random.key(0), spec), optimizer)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones(tokens[:, 1:].shape, bool)}
    placed = {name: jnp.asarray(x if x.dtype == bool else x.astype(np.int32)) for name, x in batch.items()}

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, placed)
        return metrics["loss"][0], state.step

    return run


def torch_step(cfg: DecoderConfig, tokens: np.ndarray) -> Callable[[], float]:
    """The same step in PyTorch; ValueError if it is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("--versus torch needs torch and transformers: pip install 'jaxlm[parity]'") from error
    torch.set_num_threads(os.cpu_count() or 1)
    settings: dict[str, Any] = dict(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        max_position_embeddings=cfg.max_length, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM.learning_rate,
        betas=(OPTIM.b1, OPTIM.b2),
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )
    inputs, targets = torch.tensor(tokens[:, :-1]), torch.tensor(tokens[:, 1:])
    precision: Literal["bfloat16", "float32"] = cfg.dtype

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run
