"""SentenceLens: what every layer of a latent model would say at every latent step, as sentences on a page.

The logit lens reads a layer's state as a token; here the state of each layer at the last place is mapped to the
sentence decoder and written out. Intermediate states are read as they are, as in the paper, or through the final norm
first, as the logit lens does: the page shows both.

Source: Hwang et al. 2025, arXiv:2505.22202, section 5.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import decoder, latent, layers
from jaxlm.models.latent import LatentConfig
from jaxlm.typing import Array, Float, Int, Params

PAGE = Path(__file__).with_name("sentence_lens.html")


class Reading(NamedTuple):
    """A state as the decoder writes it. probability: per token, the geometric mean; entropy: nats per token."""

    text: str
    probability: float
    entropy: float


Read = Callable[[Float[Array, "N D"]], Sequence[Reading]]
"""Vectors in the decoder's space to what it writes from them."""


class Lens(NamedTuple):
    """One question under the lens. plain, normed: [steps][layers], the last layer under the final norm in both."""

    question: str
    steps: tuple[str, ...]
    plain: list[list[Reading]]
    normed: list[list[Reading]]


def layer_states(
    params: Params, question: Int[Array, "T"], *, cfg: LatentConfig, num_steps: int
) -> tuple[Float[Array, "R L Z"], Float[Array, "R L Z"]]:
    """States of all layers at the last place, at every step of the continuous roll: as they are, and after the norm.

    question: the tokens of one question. The last layer's state is that after the final norm in both: it is the output,
    which is fed back.
    """
    words = decoder.embed_tokens(params["model"], question[None], cfg=cfg.model)
    plain, normed = [], []
    for _ in range(num_steps):
        out = decoder.forward(params["model"], None, embeddings=words, cfg=cfg.model, collect=("residual",))
        states = out.collected["residual"][:, 0, -1]
        under = layers.norm(params["model"]["final_norm"], states, cfg=cfg.model)
        plain.append(jnp.concatenate([states[:-1], under[-1:]]))
        normed.append(under)
        words = jnp.concatenate([words, out.hidden[:, -1:]], axis=1)
    return jnp.stack(plain), jnp.stack(normed)


def look(
    params: Params, question: Int[Array, "T"], read: Read, *, cfg: LatentConfig, num_steps: int, text: str,
    steps: Sequence[str],
) -> Lens:  # fmt: skip
    """One question under the lens. text, steps: the question and its reasoning in words, to be shown beside."""
    grids = []
    for states in layer_states(params, question, cfg=cfg, num_steps=num_steps):
        vectors = latent.map_vectors(params["out"], states)
        found = read(vectors.reshape(-1, vectors.shape[-1]))
        number = states.shape[1]
        grids.append([list(found[i : i + number]) for i in range(0, len(found), number)])
    return Lens(text, tuple(steps), *grids)


def as_json(found: Sequence[Lens]) -> list[dict[str, Any]]:
    """The lenses as plain values: question, steps, and the two grids of {text, probability, entropy}."""
    return [
        {
            "question": one.question,
            "steps": list(one.steps),
            **{name: [[r._asdict() for r in row] for row in getattr(one, name)] for name in ("plain", "normed")},
        }
        for one in found
    ]


def page(found: Sequence[Lens], *, title: str) -> str:
    """One HTML page, whole in itself: a grid of steps by layers for each question, to be walked with arrow keys."""
    # Inside a script only "</" could end it, and "<!--" open a comment; text goes to the page as text, never as HTML.
    data = json.dumps(as_json(found), ensure_ascii=False).replace("<", "\\u003c")
    template = PAGE.read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", data)


def write(found: Sequence[Lens], folder: Path, *, title: str) -> Path:
    """Writes lens.json and lens.html to the folder, and gives the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lens.json").write_text(json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "lens.html"
    path.write_text(page(found, title=title), encoding="utf-8")
    return path


def readings(
    tokens: Int[Array, "N S"], segments: Int[Array, "N S"], logprob: Float[Array, "N S"], entropy: Float[Array, "N S"],
    decode: Callable[[Sequence[int]], str],
) -> list[Reading]:  # fmt: skip
    """Readings from what was written, and the log-probability and entropy of each of its tokens."""
    count = np.maximum(np.asarray(segments).sum(axis=1), 1)
    there = np.asarray(segments) != 0
    mean = [np.where(there, np.asarray(x), 0).sum(axis=1) / count for x in (logprob, entropy)]
    texts = [decode(row[keep]).strip("\n") for row, keep in zip(np.asarray(jax.device_get(tokens)), there)]
    return [Reading(t, float(np.exp(lp)), float(h)) for t, lp, h in zip(texts, *mean)]
