"""One training step of a sentence-space model against a PyTorch loop of the same computation, in one interleaved run.

    jaxlm bench latent --versus torch
    jaxlm bench latent --versus torch --width 256 --layers 4 --rounds 9 --json out.json

The stage `latents` of the recipe sentence_by_sentence on samples of Blocksworld: a frozen encoder gives the contextual
vectors, the latent model predicts those that follow, a frozen decoder writes their sentences; cross-entropy, InfoNCE,
AdamW, float32, no dropout. All start from the same weights and read the same batches; first losses must agree to 1e-4.

    jaxlm            the recipe's own step: static shapes, the frozen encoder's vectors computed once, before training
    torch            transformers' Llama with sdpa, eager, on batches cut to what they hold; the vectors of a batch by
                     one pass in every step
    torch prefixes   the same with an encoder pass for every prefix, as the released code makes contextual vectors
    torch cached     the same with the vectors given, as jaxlm has them            (pip install 'jaxlm[parity]')
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.bench.interleave import interleave, medians
from jaxlm.models import decoder, hf
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.sentence_by_sentence import Config, LatentStage, StageConfig
from jaxlm.recipes.sentence_data import TaskConfig, make_batches, make_task
from jaxlm.recipes.sentence_stages import Stages
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.state import new_state
from jaxlm.train.step import make_train_step
from jaxlm.typing import Params

TOLERANCE, TEMPERATURE = 1e-4, 0.1
NUM_BATCHES = 8  # different ones, in turn
OPTIM = OptimConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.01, clip_norm=None)
Step = Callable[[], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench latent`."""
    parser.add_argument("--versus", choices=("torch", "none"), default="none", help="the rival (default: none)")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each (default 9)")
    parser.add_argument("--steps", type=int, default=10, help="training steps in a call (default 10)")
    parser.add_argument("--batch", type=int, default=32, help="samples in a batch (default 32)")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", metavar="OUT", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Measures, prints a line per contestant, and writes JSON if asked; ValueError if losses differ."""
    with tempfile.TemporaryDirectory() as folder:
        problem = make_problem(args, Path(folder))
        steps = {"jaxlm": jaxlm_step(problem)}
        if args.versus == "torch":
            steps |= {"torch": torch_step(problem), "torch prefixes": torch_step(problem, prefixes=True)}
            steps |= {"torch cached": torch_step(problem, cached=True)}
        first = {name: step() for name, step in steps.items()}
        for name, loss in first.items():
            if abs(loss - first["jaxlm"]) > TOLERANCE * abs(loss):
                raise ValueError(f"first losses differ: {first}; {name} does not compute the same")
        calls = {name: _repeated(step, args.steps) for name, step in steps.items()}
        times = interleave(calls, rounds=args.rounds)
    middle = {name: seconds / args.steps for name, seconds in medians(times).items()}
    for name, seconds in middle.items():
        print(f"{name:14} {args.batch / seconds:8,.0f} samples/s   {1e3 * seconds:.1f} ms a step")
    ratios = {name: seconds / middle["jaxlm"] for name, seconds in middle.items()}
    for name in list(middle)[1:]:
        print(f"jaxlm / {name}: {ratios[name]:.2f} times the samples per second ({os.cpu_count()} cores)")
    print(f"first loss: {first['jaxlm']:.5f}" + (", all within 1e-4" if len(first) > 1 else ""))
    if args.json:
        plain = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | None)}
        figures = {"arguments": plain, "seconds": times, "median_s_per_step": middle, "ratios": ratios, "loss": first}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _repeated(step: Step, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run


class Problem(NamedTuple):
    """What all contestants start from: the frozen network, the trained parameters, and host batches."""

    cfg: DecoderConfig
    stages: Stages
    stage: LatentStage
    network: Params
    trained: Params
    batches: list[dict[str, np.ndarray]]
    folder: Path


def make_problem(args: argparse.Namespace, folder: Path) -> Problem:
    """Random weights and eight batches of Blocksworld."""
    heads = max(1, args.width // 24)
    cfg = DecoderConfig(
        vocab_size=340, width=args.width, num_layers=args.layers, num_heads=heads, num_kv_heads=heads,
        head_dim=args.width // heads, mlp_width=args.width * 8 // 3 // 8 * 8, max_length=256, scan_layers=False,
    )  # fmt: skip
    task_config = TaskConfig(
        "blocksworld", "sentencepiece:340", num_blocks=4, max_steps=8, max_step_tokens=12, batch_size=args.batch
    )
    stage = LatentStage(NUM_BATCHES, weights={"nll": 1.0, "info_nce": 1.0}, unit_scale=True)
    once = StageConfig(1)
    config = Config(
        str(folder), task_config, {"cot": once, "contextual": once}, cfg, latents=(stage,), dropout=0.0,
        temperature=TEMPERATURE,
    )  # fmt: skip
    task = make_task(task_config, folder / "tokenizer")
    stages = Stages(config, task)
    network = specs.init(jax.random.key(0), decoder.spec(cfg))
    vectors = {"vectors": stages.precomputed("contextual", network, task.rows["train"])}
    loader = make_batches(task_config, task.rows["train"], task, num_steps=NUM_BATCHES, vectors=vectors).train
    trained = stages.latent(stage).initial({"cot": specs.init(jax.random.key(1), decoder.spec(cfg))})
    assert trained is not None
    hf.save(folder / "network", network, cfg, family="llama")
    hf.save(folder / "latent", trained["model"], cfg, family="llama")
    return Problem(cfg, stages, stage, network, trained, [loader.batch(i) for i in range(NUM_BATCHES)], folder)


def jaxlm_step(problem: Problem) -> Step:
    """A function that takes one step of the library's own train step and returns the loss."""
    way = problem.stages.latent(problem.stage)
    optimizer, schedule = make_optimizer(OPTIM, num_steps=1, decay_mask=specs.decay_mask(way.spec))
    step = jax.jit(make_train_step(way.loss, optimizer, seed=0, schedule=schedule), donate_argnums=0)
    copied = jax.tree.map(lambda x: x + 0, problem.trained)
    state = new_state(copied, optimizer).replace(frozen=problem.network)  # type: ignore[attr-defined]
    turns = itertools.cycle([jax.tree.map(jnp.asarray, batch) for batch in problem.batches])

    def run() -> float:
        nonlocal state
        state, metrics = step(state, next(turns))
        total, weight = metrics["loss"]
        return float(total / weight)

    return run


def torch_step(problem: Problem, *, prefixes: bool = False, cached: bool = False) -> Step:
    """The same step in PyTorch; ValueError if it is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError("--versus torch needs torch and transformers: pip install 'jaxlm[parity]'") from error
    torch.set_num_threads(os.cpu_count() or 1)
    load = transformers.LlamaForCausalLM.from_pretrained
    network = load(problem.folder / "network", attn_implementation="sdpa").requires_grad_(False)
    latent = load(problem.folder / "latent", attn_implementation="sdpa").model
    into, out = _torch_mapper(problem.trained["into"]), _torch_mapper(problem.trained["out"])
    trained = [p for module in (latent, into, out) for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), weight_decay=OPTIM.weight_decay, fused=True
    )
    whole = [{k: v if k == "vectors" else v.astype(np.int64) for k, v in batch.items()} for batch in problem.batches]
    batches = [{k: torch.tensor(v) for k, v in batch.items()} for batch in whole]
    turns = itertools.cycle(batches)
    functional = torch.nn.functional

    def vectors(batch: Any, there: Any) -> Any:
        """The contextual vectors [B, M, D]: as they are, by one pass over the texts, or by one over every prefix."""
        if cached:
            return batch["vectors"][:, : there.shape[1]]
        length = int(batch["ends"].max()) + 1
        tokens, ends = batch["text/tokens"][:, :length], batch["ends"][:, : there.shape[1]]
        if not prefixes:
            hidden = network.model(tokens).last_hidden_state
            return hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1]))
        rows, places = there.nonzero(as_tuple=True)
        end = ends[rows, places]
        hidden = network.model(tokens[rows, : int(end.max()) + 1]).last_hidden_state
        found = hidden.new_zeros(*there.shape, hidden.shape[-1])
        found[rows, places] = hidden[torch.arange(len(rows)), end]
        return found

    def loss_of(batch: Any) -> Any:
        there = batch["step_segments"][..., 0] != 0
        there = there[:, : int(there.sum(1).max())]
        with torch.no_grad():
            h = vectors(batch, there)
        keys = functional.layer_norm(into(h), h.shape[-1:], eps=problem.cfg.norm_eps)
        asked = batch["question/segments"].sum(1)
        width = int((asked + there.sum(1)).max())
        words = latent.embed_tokens(batch["question/tokens"])
        read = words.new_zeros(len(asked), width, words.shape[-1])
        read[:, : words.shape[1]] = words[:, :width]
        rows, places = there.nonzero(as_tuple=True)
        read[rows, asked[rows] + places] = keys[there]
        hidden = latent(inputs_embeds=read).last_hidden_state
        output = hidden[rows, asked[rows] + places - 1]
        steps, kept = batch["steps"][:, : there.shape[1]][there], batch["step_segments"][:, : there.shape[1]][there]
        longest = int(kept.sum(1).max())
        steps, kept = steps[:, :longest], kept[:, :longest]
        told = torch.cat([out(output)[:, None], network.model.embed_tokens(steps[:, :-1])], dim=1)
        states = network.model(inputs_embeds=told).last_hidden_state
        nll = functional.cross_entropy(network.lm_head(states[kept != 0]), steps[kept != 0])
        cosines = functional.normalize(output, dim=-1) @ functional.normalize(keys[there], dim=-1).T
        return nll + functional.cross_entropy(cosines / TEMPERATURE, torch.arange(len(cosines)))

    def run() -> float:
        loss = loss_of(next(turns))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def _torch_mapper(params: Params) -> Any:
    import torch

    def linear(p: Params) -> Any:
        layer = torch.nn.Linear(*p["kernel"].shape)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.array(p["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.array(p["bias"])))
        return layer

    return torch.nn.Sequential(linear(params["up"]), torch.nn.GELU(), linear(params["down"]))
