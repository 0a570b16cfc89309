"""What a decoder or an encoder is, each as one frozen record: every family that jaxlm knows is a setting of it."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, rotated share of the head, and the published rescalings.

    `factor`, `original_length` and the fields below belong to `scaling`:
    linear (factor), llama3 (factor, low_freq_factor, high_freq_factor, original_length), yarn (factor, beta_fast,
    beta_slow, original_length, attention_factor), longrope (short_factor, long_factor, original_length,
    attention_factor).
    """

    theta: float = 10_000.0
    rotary_fraction: float = 1.0
    scaling: Literal["linear", "llama3", "yarn", "longrope"] | None = None
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Widths are in units, lengths in tokens.

    norm_placement: "pre" normalises the input of each block (Llama), "post" its output (OLMo 2), "sandwich" both
    (Gemma 2 and 3). qk_norm: "head" normalises each head's H entries (Qwen 3, Gemma 3), "full" all heads together
    (OLMo 2). layer_pattern repeats over the layers; "local" layers attend within `window` tokens and use `rope_local`.
    norm_offset is added to the norm's scale (Gemma: 1.0, with the scale initialised to 0). attention_scale None means
    1/sqrt(head_dim). embed_scale multiplies the token embeddings. mlp_gated False is fc -> activation -> proj.
    rope None with learned_positions True is GPT-2. dtype is that of activations and matrix products; parameters are
    float32 unless the caller stores them otherwise. remat and scan_layers change memory and compile time, never values.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int = 2048

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: Literal["head", "full"] | None = None

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    mlp_gated: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    embed_scale: float | None = None

    rope: RopeConfig | None = RopeConfig()
    rope_local: RopeConfig | None = None
    learned_positions: bool = False
    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    window: int | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None

    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if not self.layer_pattern:
            problems.append("layer_pattern must name at least one layer")
        if "local" in self.layer_pattern and self.window is None:
            problems.append("local layers need a window")
        if (self.rope is None) == (not self.learned_positions):
            problems.append("give either a rope or learned_positions=True, and not both")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), found {self.dropout}")
        for name in ("rope", "rope_local"):
            problems += _rope_problems(name, getattr(self, name), self.head_dim)
        if problems:
            raise ValueError("model config: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class MaskedLMConfig:
    """The head of a masked language model; see `jaxlm.models.masked_lm`. vocab_bias: added to the logits."""

    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    dense_bias: bool = True
    vocab_bias: bool = True


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional transformer (BERT, RoBERTa, DistilBERT, ModernBERT). Widths are in units, lengths in tokens.

    norm_placement: "post" normalises the stream after each addition (BERT); "pre" the input of each half of a block,
    and the stream once more at the end (ModernBERT): the first block then has no norm before its attention, because the
    embeddings' own stands there. max_length: the longest row that the model was made for. rope None: max_length learned
    positions, in a table with position_offset rows before the first (RoBERTa: 2). Fields of rope, rope_local,
    layer_pattern, window and mlp_gated as in `DecoderConfig`; a local layer sees window - 1 tokens on either side.
    num_token_types: of the sentence-number embedding (0: none). head: the dense layer and tanh over the first token's
    state. masked_lm: the head that guesses masked tokens (None: there is none). dropout: of embeddings, attention
    weights and both halves of a block.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_length: int = 512
    position_offset: int = 0
    num_token_types: int = 2
    head: bool = False
    masked_lm: MaskedLMConfig | None = None

    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    norm_eps: float = 1e-12
    norm_placement: Literal["post", "pre"] = "post"
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    mlp_gated: bool = False

    rope: RopeConfig | None = None
    rope_local: RopeConfig | None = None
    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    window: int | None = None

    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.width % self.num_heads:
            problems.append(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if not self.layer_pattern:
            problems.append("layer_pattern must name at least one layer")
        if "local" in self.layer_pattern and self.window is None:
            problems.append("local layers need a window")
        if self.norm_placement == "pre" and self.num_layers < 2:
            problems.append(f"norm_placement='pre' needs num_layers of at least 2, found {self.num_layers}")
        if self.rope is not None and self.position_offset:
            problems.append(f"position_offset={self.position_offset} is of learned positions, which a rope replaces: 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), found {self.dropout}")
        for name in ("rope", "rope_local"):
            problems += _rope_problems(name, getattr(self, name), self.head_dim)
        if problems:
            raise ValueError("encoder config: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Entries of one attention head."""
        return self.width // self.num_heads


def _rope_problems(name: str, rope: RopeConfig | None, head_dim: int) -> list[str]:
    if rope is None:
        return []
    rotary_dim = int(head_dim * rope.rotary_fraction)
    problems = []
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        problems.append(f"{name} rotates {rotary_dim} of {head_dim} entries: it must be even and within the head")
    if rope.scaling == "longrope" and {len(rope.short_factor), len(rope.long_factor)} != {rotary_dim // 2}:
        problems.append(
            f"{name}.short_factor and long_factor need {rotary_dim // 2} entries each, "
            f"found {len(rope.short_factor)} and {len(rope.long_factor)}"
        )
    if rope.scaling in ("llama3", "yarn", "longrope") and rope.original_length is None:
        problems.append(f"{name}.scaling={rope.scaling!r} needs original_length")
    return problems
