"""One DPO training step against TRL's DPOTrainer: pairs per second in one interleaved run, and the peak memory of each.

    jaxlm bench dpo --versus trl
    jaxlm bench dpo --versus trl --rounds 3 --no-memory --json out.json
    jaxlm bench dpo --versus trl --liger --dtype bfloat16 --width 2048 --layers 16 --heads 32 --kv-heads 8 \\
      --mlp-width 8192 --length 1024                                                       (on a GPU: 1.0B parameters)

A Llama (about 42M parameters by default), pairs of random tokens and ragged lengths, AdamW on float32 weights, beta
0.1; products in float32, or with --dtype bfloat16 in that (TRL by autocast). All start from the same weights and read
the same pairs; each first loss must be log 2, and all must agree, to 1e-4 in float32 and 2e-2 in bfloat16:

    jaxlm            as the recipe `dpo` does it: pairs packed into rows, the reference's log-probabilities cached
    jaxlm live       the reference computed in the step
    trl              trl.DPOTrainer's training_step and optimizer, no gradient checkpointing (pip install
                     'jaxlm[parity]'): padded to the longest, the reference computed in the step, its default
    trl precomputed  the same with precompute_ref_log_probs=True
    trl liger        in the place of trl with --liger: use_liger_kernel=True, its fused head and loss and fused layers,
                     which take the reference in the step only

Memory is taken in a fresh process per contestant. On a CPU (Linux): the peak resident set over its second step, less
the resident set before that step ("a step"), and less that after the imports ("in all": also weights, moments, compiled
programs). On a GPU: the peak of what its framework has allocated over two steps ("in all").
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.bench.interleave import interleave, medians
from jaxlm.data.batch import stack_rows
from jaxlm.data.corpus import TokenCorpus
from jaxlm.data.document import Document
from jaxlm.data.loader import Rows
from jaxlm.data.packing import pack, padding_share
from jaxlm.models import decoder, hf
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.preference_losses import LossTerm, make_pair_values, make_rewards
from jaxlm.recipes.wiring import make_apply
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.preference import frozen_alone, make_pair_objective, make_preference_loss, make_scorer
from jaxlm.train.reference import make_score_step
from jaxlm.train.state import new_state
from jaxlm.train.step import make_train_step

BETA, TOLERANCE = 0.1, {"float32": 1e-4, "bfloat16": 2e-2}
OPTIM = OptimConfig(learning_rate=1e-6, b2=0.999, schedule="constant", weight_decay=0.0, clip_norm=None)
PACKAGES = ("jax", "torch", "transformers", "trl", "liger_kernel")

Step = Callable[[], float]
"""Takes a training step and returns its loss."""


class Problem(NamedTuple):
    """What all are given. pairs: tokens of prompt, chosen and rejected; weights: a Hugging Face folder."""

    cfg: DecoderConfig
    pairs: list[list[list[int]]]
    row_length: int | None
    weights: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `jaxlm bench dpo`."""
    parser.add_argument("--versus", choices=("trl", "none"), default="none", help="the rival (default: none)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="of the contestants, these")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it (default)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step (default 8)")
    parser.add_argument("--length", type=int, default=512, help="most tokens of a response with its prompt (512)")
    parser.add_argument("--row-length", type=int, help="tokens of a packed row (default: what pads these pairs least)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="of products (default float32)")
    parser.add_argument("--liger", action="store_true", help="TRL's live row with Liger's kernels (needs a GPU)")
    for name, size in (("vocab", 32_000), ("width", 512), ("layers", 8), ("heads", 8), ("mlp-width", 1376)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the model (default {size:,})")
    parser.add_argument("--kv-heads", type=int, help="of the model (default: --heads)")
    parser.add_argument("--json", metavar="OUT", help="write the figures there")


def main(args: argparse.Namespace) -> int:
    """Measures, checks, prints a line per contestant and per comparison, and writes JSON if asked."""
    names = contestants(args)
    losses: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        problem = make_problem(args, Path(folder))
        print(layout(problem), flush=True)
        memory = {name: alone(peak_memory, problem, name) for name in names if args.memory}
        steps = {name: recorded(CONTESTANTS[name](problem), losses[name]) for name in names}
        times = interleave(steps, rounds=args.rounds)
    print(report(times, memory, args.pairs))
    print(check(losses, TOLERANCE[args.dtype]))
    if args.json:
        versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
        figures = {"arguments": {k: v for k, v in vars(args).items() if k != "main"}, "layout": layout(problem)}
        figures |= {"seconds": times, "median_s": medians(times), "memory_bytes": memory, "losses": losses}
        Path(args.json).write_text(json.dumps(figures | {"versions": versions}, indent=2) + "\n")
    return 0


def contestants(args: argparse.Namespace) -> list[str]:
    """The names of those that run; ValueError for an unknown one, and for Liger's kernels where they cannot run."""
    if args.liger and (args.versus != "trl" or jax.default_backend() != "gpu"):
        raise ValueError(
            f"--liger needs --versus trl and a GPU, found --versus {args.versus} on {jax.default_backend()}: Liger's "
            "kernels are Triton's"
        )
    ours = [name for name in CONTESTANTS if name.startswith("jaxlm")]
    theirs = ["trl liger" if args.liger else "trl", "trl precomputed"]
    names = ours + (theirs if args.versus == "trl" else [])
    unknown = [name for name in args.only if name not in names]
    if unknown or "jaxlm" not in (args.only or names):
        raise ValueError(f"--only: expected jaxlm and some of {', '.join(names[1:])}; found {', '.join(args.only)}")
    return [name for name in names if not args.only or name in args.only]


def report(times: dict[str, list[float]], memory: dict[str, dict[str, int]], pairs: int) -> str:
    """A line per contestant and a line per comparison."""
    middle, lines = medians(times), []
    for name, seconds in times.items():
        peaks = "".join(f"   {size / 1e6:,.0f} MB {what}" for what, size in memory.get(name, {}).items())
        span = f"{middle[name]:.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f})"
        lines.append(f"{name:15} {pairs / middle[name]:6.2f} pairs/s   {span}{peaks}")
    rivals = [name for name in times if name.startswith("trl")]
    live = [name for name in rivals if name != "trl precomputed"]
    for ours, theirs in (*(("jaxlm", name) for name in rivals), *(("jaxlm live", name) for name in live)):
        if ours in times:
            ratios = {what: size / memory[theirs][what] for what, size in memory.get(ours, {}).items()}
            peaks = "".join(f", {ratio:.2f} times the MB {what}" for what, ratio in ratios.items())
            lines.append(f"{ours} / {theirs}: {middle[theirs] / middle[ours]:.2f} times the pairs per second{peaks}")
    return "\n".join(lines)


def make_problem(args: argparse.Namespace, folder: Path) -> Problem:
    """Random weights in the folder, and random pairs: prompts of 1/32 to 3/8 of the length, completions 1/64 to 5/8."""
    cfg = DecoderConfig(
        vocab_size=args.vocab, width=args.width, num_layers=args.layers, num_heads=args.heads,
        num_kv_heads=args.kv_heads or args.heads, head_dim=args.width // args.heads,
        mlp_width=args.mlp_width, max_length=args.length, scan_layers=False, dtype=args.dtype,
    )  # fmt: skip
    params = jax.jit(partial(specs.init, spec=decoder.spec(cfg)))(jax.random.key(0))
    hf.save(folder / "weights", params, cfg, family="llama")
    rng, n = np.random.default_rng(0), args.length
    spans = [(n // 32, n * 3 // 8), (n // 64, n * 5 // 8), (n // 64, n * 5 // 8)]
    pairs = [
        [rng.integers(0, args.vocab, rng.integers(low, high + 1)).tolist() for low, high in spans]
        for _ in range(args.pairs)
    ]
    return Problem(cfg, pairs, args.row_length, folder / "weights")


def packed(problem: Problem) -> Rows:
    """The pairs in rows. Where no length is given it is the multiple of 128, up to four times the longest pair, that
    pads least: a run packs thousands of pairs, and then any length is about as good."""

    def document(prompt: list[int], completion: list[int]) -> Document:
        tokens = np.array(prompt + completion, np.int32)
        return Document(tokens, np.arange(len(tokens)) >= len(prompt), np.zeros_like(tokens), "random")

    corpus = TokenCorpus.from_documents(document(prompt, c) for prompt, *both in problem.pairs for c in both)
    lengths = corpus.num_targets().reshape(-1, 2).sum(axis=1)
    longest = -(-int(lengths.max()) // 128) * 128
    choices = [problem.row_length] if problem.row_length else range(longest, 4 * longest + 1, 128)
    length = min(choices, key=lambda length: len(pack(lengths, length)) * length)
    return Rows(corpus, pack(lengths, length), length, group=2)


def layout(problem: Problem) -> str:
    """How the pairs lie in the batches of both, and the shares of padding."""
    rows, sizes = packed(problem), [len(prompt) + len(c) for prompt, *both in problem.pairs for c in both]
    ours = padding_share(rows.plan, rows.corpus.num_targets(), rows.length)
    theirs = 1 - sum(sizes) / (max(sizes) * len(sizes))
    return (
        f"{len(problem.pairs)} pairs, {sum(sizes):,} tokens: in jaxlm {len(rows.plan)} rows of {rows.length} "
        f"({ours:.1%} padding), in trl {len(sizes)} rows of {max(sizes)} ({theirs:.1%} padding)"
    )


def jaxlm_step(problem: Problem, *, live: bool) -> Step:
    """A function that takes one step of the library's own train step and returns the loss."""
    cfg, rows, terms = problem.cfg, packed(problem), [LossTerm("dpo", options={"beta": BETA})]
    capacity = -(-rows.most_targets() // 64) * 64  # as `Datasets.capacity`
    score = make_hidden_scorer(make_apply(cfg, decoder.identity), partial(decoder.head, cfg=cfg), capacity=capacity)
    scorer = make_scorer(score, slots=rows.most_segments())
    objective = make_pair_objective(make_pair_values(terms), rewards=make_rewards(terms), beta=BETA)
    loss = make_preference_loss(scorer, objective, reference=frozen_alone if live else None)
    optimizer, schedule = make_optimizer(OPTIM, num_steps=1, decay_mask=specs.decay_mask(decoder.spec(cfg)))
    step = jax.jit(make_train_step(loss, optimizer, seed=0, schedule=schedule), donate_argnums=0)
    batch = jax.tree.map(jnp.asarray, stack_rows([rows.row(i) for i in range(len(rows.plan))]))
    state = new_state(hf.load(problem.weights)[1], optimizer)
    if live:
        state = state.replace(frozen=hf.load(problem.weights)[1])  # type: ignore[attr-defined]
    else:
        reference = make_score_step(scorer, make_mesh(MeshConfig()))(state.params, batch).logprob
        batch["reference"] = jnp.asarray(np.asarray(reference))  # on the mesh it would make the second step compile

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        total, weight = metrics["loss"]
        return float(total / weight)

    return run


def trl_step(problem: Problem, *, precompute: bool = False, liger: bool = False) -> Step:
    """The same by the trainer's `training_step` and its optimizer; ValueError if TRL is not installed."""
    try:
        import datasets
        import tokenizers
        import torch
        import transformers
        import trl
    except ImportError as error:
        raise ValueError("--versus trl needs torch, transformers and trl: pip install 'jaxlm[parity]'") from error
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()

    class Trainer(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # tokens already

    settings: dict[str, Any] = dict(
        output_dir=str(problem.weights.with_name("trl")), use_cpu=jax.default_backend() == "cpu",
        bf16=problem.cfg.dtype == "bfloat16", gradient_checkpointing=False, use_liger_kernel=liger,
        report_to="none", save_strategy="no", disable_tqdm=True, per_device_train_batch_size=len(problem.pairs),
        beta=BETA, precompute_ref_log_probs=precompute, optim="adamw_torch_fused", learning_rate=OPTIM.learning_rate,
        adam_beta1=OPTIM.b1, adam_beta2=OPTIM.b2, adam_epsilon=OPTIM.eps, weight_decay=OPTIM.weight_decay,
    )  # fmt: skip
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}))  # to say what pads, and no more
    trainer = Trainer(
        transformers.LlamaForCausalLM.from_pretrained(
            problem.weights, attn_implementation="sdpa", dtype=torch.float32
        ),
        args=trl.DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list([dict(zip(fields, pair)) for pair in problem.pairs]),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
    )
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it, and as it lets products be in bfloat16:
    trainer.accelerator.prepare_model(trainer.model)
    batch, optimizer = trainer.data_collator(list(trainer.train_dataset)), trainer.create_optimizer()

    def run() -> float:
        loss = trainer.training_step(trainer.model, dict(batch))
        optimizer.step()
        trainer.model.zero_grad()
        return float(loss)

    return run


CONTESTANTS: dict[str, Callable[[Problem], Step]] = {
    "jaxlm": partial(jaxlm_step, live=False),
    "jaxlm live": partial(jaxlm_step, live=True),
    "trl": trl_step,
    "trl liger": partial(trl_step, liger=True),
    "trl precomputed": partial(trl_step, precompute=True),
}


def recorded(step: Step, losses: list[float]) -> Callable[[], None]:
    """The step, which appends its loss."""
    return lambda: losses.append(step())


def check(losses: dict[str, list[float]], tolerance: float) -> str:
    """Says how well the losses agree; ValueError if a first one is not log 2 or any differ."""
    table = np.array(list(losses.values()))
    first, apart = np.abs(table[:, 0] - math.log(2)).max(), np.ptp(table, axis=0).max()
    text = f"first losses within {first:.1e} of log 2, those of {len(losses['jaxlm'])} steps within {apart:.1e}"
    if not (first < tolerance and apart < tolerance):  # so that NaN fails
        raise ValueError(f"expected losses that agree to {tolerance}, found {text}: {losses}")
    return f"{text} of each other (the last is {losses['jaxlm'][-1]:.4f})"


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(problem: Problem, name: str) -> dict[str, int]:
    """Peak bytes of a contestant that has this process to itself."""
    jnp.zeros(()).block_until_ready()  # the backend
    if jax.default_backend() != "cpu":
        step = CONTESTANTS[name](problem)
        step(), step()
        return {"in all": allocated_peak(name)}
    if name.startswith("trl"):
        importlib.import_module("trl.trainer.dpo_trainer")
    imported = resident("VmRSS")
    step = CONTESTANTS[name](problem)
    step()  # compiles, and makes torch's moments
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    peak = resident("VmHWM")
    return {"a step": peak - before, "in all": peak - imported}


def allocated_peak(name: str) -> int:
    """Peak bytes of the accelerator's memory that the contestant's framework has allocated."""
    if name.startswith("trl"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    return int(jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])


def resident(field: str) -> int:
    """Bytes: VmRSS is the resident set now, VmHWM its peak; ValueError where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("memory is read from /proc, which this system lacks: add --no-memory")
    return next(int(row.split()[1]) * 1024 for row in status.read_text().splitlines() if row.startswith(field))
