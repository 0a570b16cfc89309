"""Differential information on real text: experiment E11 of the DID recipe (Won et al. 2025, arXiv:2505.23761).

    jaxlm train --config configs/did/text.py:pairs.jsonl.gz

Per seed, from random weights: a model fine-tuned on the chosen replies (the reference), one on the rejected ones, and
DPO from the first. On the test pairs, which none of them saw, this measures what DPO did (rewards, accuracy,
log-probabilities), and what the theory says of it:

    displacement, beside the one-parameter curve's prediction          `train.preference`, metrics displacement_*
    DID entropy per token, exact                                        `analysis.did_entropy.token_did_entropy`
    DID entropy of the first tokens of sampled replies, refused below
    a floor of its effective sample size, with a bootstrap interval     `sequence_did_entropy`
    the power law: evidence of the two fine-tuned models against
    the reward, slope (an estimate of beta) and R^2                     `analysis.did.power_law`
    share of pairs whose three log-margins are ordered                  `ordered_share`

What is the paper's: the quantities. What is derived: the formulas. What is unknown: its data, models and sizes; no
number here is the paper's. Deviations: small models without pretraining, so that three seeds take minutes on a CPU;
they check the pipeline and the identities, and say nothing about the quality of large ones. The weights of the sampled
estimate are 1 / reference, whose tail is so long that every prompt is refused: of 64 replies of 8 tokens 1.4 count, and
of 256 replies of a single token 5. The exact entropy per token is the figure to use.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.config import DataConfig
from jaxlm.data.encode import text_of
from jaxlm.data.sources import SourceConfig, open_source
from jaxlm.data.tokenizer_train import train_sentencepiece
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes import dpo, lm
from jaxlm.recipes.did_text_measure import measure
from jaxlm.recipes.did_text_plots import plot
from jaxlm.recipes.preference_losses import LossTerm
from jaxlm.recipes.wiring import say
from jaxlm.train.config import TrainConfig
from jaxlm.train.optim import OptimConfig

MODEL = DecoderConfig(
    vocab_size=2048, width=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384, max_length=1024
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured. pairs: a jsonl of pairs, of which 80 % train, 10 % select, 10 % test.

    num_prompts, num_samples, max_new_tokens, min_ess: of the sequence DID entropy, which is one of the first
    max_new_tokens tokens. run_dir gets the three runs of every
    seed, results.json, table.md and did_text.png. Started again, it runs only what is missing.
    """

    run_dir: str
    pairs: str
    recipe: Literal["did_text"] = "did_text"
    seeds: tuple[int, ...] = (0, 1, 2)
    model: DecoderConfig = MODEL
    beta: float = 0.1
    sft_steps: int = 240
    sft_learning_rate: float = 3e-3
    dpo_steps: int = 80
    dpo_learning_rate: float = 2e-4
    batch_size: int = 8
    sequence_length: int = 512
    num_prompts: int = 16
    num_samples: int = 64
    max_new_tokens: int = 8
    min_ess: float = 10.0


def resolve(cfg: Config) -> Config:
    """Nothing is left open by a config of this recipe."""
    return cfg


def shrink(cfg: Config) -> Config:
    """The same path on a narrower model, one seed and few steps, in seconds."""
    model = dataclasses.replace(
        cfg.model, vocab_size=512, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64
    )
    small = dict(seeds=cfg.seeds[:1], sft_steps=4, dpo_steps=4, num_prompts=2, num_samples=16, max_new_tokens=2)
    return dataclasses.replace(cfg, run_dir=f"{cfg.run_dir}-shrunk", model=model, min_ess=2.0, **small)


def run(cfg: Config) -> dict[str, dict[str, float]]:
    """Trains what is missing, measures, draws, and prints the table: seed -> quantity -> value."""
    folder = Path(cfg.run_dir)
    tokenizer = _tokenizer(cfg, folder / "tokenizer")
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(cfg, run_dir="", seeds=()))))
    if results.get("settings", settings) != settings:
        raise ValueError(f"{path} holds results of another config: choose another run_dir, or delete that folder")
    for seed in cfg.seeds:
        if str(seed) in results:
            continue
        say(f"=== seed {seed}")
        runs = {side: sft_config(cfg, side, seed, tokenizer) for side in ("chosen", "rejected")}
        for config in runs.values():
            lm.run(config)
        policy = dpo_config(cfg, seed, tokenizer)
        trained = dpo.run(policy).metrics
        values = measure(
            policy, rejected=runs["rejected"].run_dir, beta=cfg.beta, num_prompts=cfg.num_prompts,
            num_samples=cfg.num_samples, max_new_tokens=cfg.max_new_tokens, min_ess=cfg.min_ess, seed=seed,
        )  # fmt: skip
        tested = {name.removeprefix("test/"): v for name, v in trained.items() if name.startswith("test/")}
        results |= {"settings": settings, str(seed): {**tested, **values}}
        _replace(path, json.dumps(results, indent=1))
    found = {str(seed): results[str(seed)] for seed in cfg.seeds}
    (folder / "table.md").write_text(table(found))
    say(table(found))
    say(f"plot: {plot({s: folder / f'seed_{s}' / 'dpo' for s in cfg.seeds}, found, folder / 'did_text.png')}")
    return found


def sft_config(cfg: Config, side: Literal["chosen", "rejected"], seed: int, tokenizer: str) -> lm.Config:
    """Fine-tuning on one side of the pairs, prompts included: nothing is pretrained below."""
    data = dataclasses.replace(_data(cfg, tokenizer, seed), examples=side, completion_only=False, epochs=1000)
    return lm.Config(
        run_dir=str(Path(cfg.run_dir) / f"seed_{seed}" / side),
        data=data,
        train=_train(cfg.sft_steps, seed),
        optim=OptimConfig(learning_rate=cfg.sft_learning_rate, warmup_steps=cfg.sft_steps // 10),
        model=cfg.model,
    )


def dpo_config(cfg: Config, seed: int, tokenizer: str) -> dpo.Config:
    """DPO from the model of the chosen side, which is also the reference."""
    data = dataclasses.replace(_data(cfg, tokenizer, seed), sequence_length=2 * cfg.sequence_length, epochs=1000)
    return dpo.Config(
        run_dir=str(Path(cfg.run_dir) / f"seed_{seed}" / "dpo"),
        data=data,
        train=dataclasses.replace(_train(cfg.dpo_steps, seed), eval_every=max(1, cfg.dpo_steps // 8)),
        optim=OptimConfig(learning_rate=cfg.dpo_learning_rate, warmup_steps=cfg.dpo_steps // 10, weight_decay=0.0),
        init_from=str(Path(cfg.run_dir) / f"seed_{seed}" / "chosen"),
        losses=(LossTerm("dpo", options={"beta": cfg.beta}),),
    )


def _data(cfg: Config, tokenizer: str, seed: int) -> DataConfig:
    def part(name: Literal["train", "heldout", "test"]) -> SourceConfig:
        return SourceConfig("jsonl", path=cfg.pairs, part=name, heldout_share=0.1, test_share=0.1, name=name)

    return DataConfig(
        train=(part("train"),),
        heldout=(part("heldout"), part("test")),
        tokenizer=tokenizer,
        examples="pairs",
        packing="pack",
        sequence_length=cfg.sequence_length,
        batch_size=cfg.batch_size,
        seed=seed,
        bad_rows="skip",
        overlong="truncate",
    )


def _train(num_steps: int, seed: int) -> TrainConfig:
    return TrainConfig(num_steps, log_every=10, eval_every=None, checkpoint_every=None, keep_last=1, seed=seed)


def _tokenizer(cfg: Config, folder: Path) -> str:
    """A sentencepiece model of the chosen side's training part, trained once."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        source = open_source(SourceConfig("jsonl", path=cfg.pairs, part="train", heldout_share=0.1, test_share=0.1))
        texts = (text_of(source[i], source.origin(i), field="chosen") for i in range(len(source)))
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train_sentencepiece(texts, vocab_size=cfg.model.vocab_size))
    return str(path)


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


ROWS = {
    "first_loss": "loss before the first update, exactly log 2 = 0.693147…",
    "loss": "DPO loss",
    "accuracies": "share of pairs with the higher reward on the chosen reply",
    "rewards_chosen": "reward of the chosen reply",
    "rewards_rejected": "reward of the rejected reply",
    "margins": "margin of the rewards",
    "logprob_chosen": "log-probability of the chosen reply, nats",
    "logprob_rejected": "log-probability of the rejected reply, nats",
    "entropy": "entropy of the predictions, nats per token",
    "displacement_chosen": "displacement of the chosen reply, nats, observed",
    "displacement_chosen_predicted": "the same, predicted from the rejected ones by the curve",
    "displacement_rejected": "displacement of the rejected reply, nats, observed",
    "displacement_rejected_predicted": "the same, predicted from the chosen ones by the curve",
    "token_did_entropy": "DID entropy per token, nats (exact)",
    "token_did_entropy_share": "the same as a share of log V, its maximum",
    "sequence_did_entropy": "DID entropy of the first tokens of sampled replies, nats, mean of the prompts not refused",
    "sequence_did_low": "lower end of its bootstrap interval, mean",
    "sequence_did_high": "upper end of its bootstrap interval, mean",
    "sequence_did_ess": "effective sample size, median over prompts",
    "sequence_did_refused": "share of prompts refused below the floor",
    "power_law_slope": "slope of the power law, an estimate of beta",
    "power_law_r2": "R^2 of the power law",
    "ordered_share": "share of pairs with ordered log-margins (independent models: 1/3)",
}
"""Quantity -> its line in the table."""


def table(results: dict[str, dict[str, float]]) -> str:
    """Every quantity on the test pairs: mean over seeds, and each seed, as Markdown."""
    seeds = list(results)
    lines = [f"| test pairs | mean | {' | '.join(f'seed {s}' for s in seeds)} |", "|---" * (len(seeds) + 2) + "|"]
    for name, title in ROWS.items():
        values = [results[s].get(name, float("nan")) for s in seeds]
        cells = " | ".join(f"{v:.4g}" for v in [float(np.mean(values)), *values])
        lines.append(f"| {title} | {cells} |")
    return "\n".join(lines) + "\n"
