"""FLOPs of answering a question, token by token or in the space of sentences, under both conventions for the head.

The published savings (Hwang et al. 2025, arXiv:2505.22202, tables 3 and 9) compare a language model that computes
logits at every position of the prompt with a latent model that does so nowhere in it. A language model that is used
well takes them at the last position alone, so every figure here is given both ways.

Counted are the matrix products of the forward pass with caches, two FLOPs for a multiplication and an addition; not the
attention over what is cached, which the published figures do not show either.
"""

from __future__ import annotations

import math
from typing import Literal

from jaxlm.models import decoder, latent
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig

HeadAt = Literal["every", "last"]
"""Where in a prompt the unembedding is computed."""


def body_flops(cfg: DecoderConfig) -> float:
    """FLOPs of all layers for a token: 2 for each entry of their matrices.

    >>> gpt2 = dict(vocab_size=50257, width=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64)
    >>> cfg = DecoderConfig(**gpt2, mlp_width=3072, mlp_gated=False, max_length=1024)
    >>> round(body_flops(cfg) / 1e9, 4), round(head_flops(cfg) / 1e9, 4)
    (0.1699, 0.0772)
    """
    layers = specs.flatten(decoder.spec(cfg)["layers"])
    return 2.0 * sum(math.prod(p.shape) for path, p in layers.items() if path.endswith("kernel"))


def head_flops(cfg: DecoderConfig) -> float:
    """FLOPs of the unembedding for a token."""
    return 2.0 * cfg.width * cfg.vocab_size


def mapper_flops(width_in: int, width_out: int) -> float:
    """FLOPs of a mapper for a vector."""
    shapes = specs.flatten(latent.mapper_spec(width_in, width_out))
    return 2.0 * sum(math.prod(p.shape) for path, p in shapes.items() if path.endswith("kernel"))


def classifier_flops(width: int) -> float:
    """FLOPs of the classifier that ends a roll, for a vector."""
    shapes = specs.flatten(latent.stop_spec(width))
    return 2.0 * sum(math.prod(p.shape) for path, p in shapes.items() if path.endswith("kernel"))


def token_by_token(cfg: DecoderConfig, question: float, written: float, *, head_at: HeadAt) -> float:
    """FLOPs of a language model that reads a question and writes its reasoning and answer.

        (question + written) body + written head  [ + question head, if the head is at every position ]

    question, written: tokens, ends of sentences included; means over questions do.
    """
    positions = written + (question if head_at == "every" else 0)
    return (question + written) * body_flops(cfg) + positions * head_flops(cfg)


def thoughts(cfg: DecoderConfig, question: float, number: float, answer: float, *, head_at: HeadAt = "last") -> float:
    """FLOPs of a language model that reads its own states, or pauses, between question and answer.

        (question + number + 1 + answer) body + answer head  [ + question head ]        1: the newline after them
    """
    return token_by_token(cfg, question, answer, head_at=head_at) + (number + 1) * body_flops(cfg)


def continuous(
    cfg: DecoderConfig, question: float, sentences: float, answer: float, *, classifier: bool = False,
    head_at: HeadAt = "last",
) -> float:  # fmt: skip
    """FLOPs of a latent model whose outputs are fed back, and whose last alone is written.

        question body + sentences (body + mapper) + answer (body + head)  [ + question head ]

    sentences: vectors that are predicted, the answer's included, of which the classifier reads each if there is one.
    answer: tokens of the answer's sentence. The published
    figures have no head in the question (head_at "last"); "every" is what it would cost there.
    """
    step = body_flops(cfg) + mapper_flops(cfg.width, cfg.width) + classifier * classifier_flops(cfg.width)
    written = answer * (body_flops(cfg) + head_flops(cfg))
    asked = question * (body_flops(cfg) + (head_flops(cfg) if head_at == "every" else 0))
    return asked + sentences * step + written


def discretized(
    cfg: DecoderConfig, question: float, sentences: float, written: float, *, contextual: bool,
    head_at: HeadAt = "last",
) -> float:  # fmt: skip
    """FLOPs of a latent model whose every output is written as text and read again.

        continuous  with all sentences written  + written body  [ + question body, for contextual vectors ]

    written: tokens of all sentences. contextual: the encoder reads the question too, and goes on from its cache.
    """
    read = written + (question if contextual else 0)
    mapped = sentences * mapper_flops(cfg.width, cfg.width)  # back into the latent model
    whole = continuous(cfg, question, sentences, written, head_at=head_at)
    return whole + read * body_flops(cfg) + mapped
