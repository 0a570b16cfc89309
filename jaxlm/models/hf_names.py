"""The one two-way table between jaxlm's parameter paths and the tensor names of Hugging Face checkpoints.

A row says: this tensor is these parameters, side by side along the output axis. It is read in both directions, so what
is imported is what is exported, bit for bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from jaxlm.models.config import DecoderConfig
from jaxlm.models.decoder import spec
from jaxlm.models.spec import flatten

Kind = Literal["linear", "conv1d", "plain"]
Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt2", "phi3"]


class Row(NamedTuple):
    """tensor: the name, with {i} for the layer. paths: our parameters (one, or several that are stored fused). kind:
    linear is stored [out, in], conv1d [in, out], plain as it is. first: the layer of the first tensor in the stack."""

    tensor: str
    paths: tuple[str, ...]
    kind: Kind
    first: int = 0

    def names(self, num_layers: int) -> list[str]:
        """The names of the row's tensors: one, or one per layer of a model of num_layers."""
        layers = range(self.first, num_layers) if "{i}" in self.tensor else range(1)
        return [self.tensor.format(i=i) for i in layers]


def norm_rows(tensor: str, path: str) -> list[Row]:
    """The rows of a norm: its scale, and its bias if the model has one."""
    return [Row(f"{tensor}.weight", (f"{path}/scale",), "plain"), Row(f"{tensor}.bias", (f"{path}/bias",), "plain")]


def linear_rows(tensor: str, *paths: str, kind: Kind = "linear") -> list[Row]:
    """The rows of a linear layer, or of several that are stored fused."""
    return [
        Row(f"{tensor}.weight", tuple(f"{p}/kernel" for p in paths), kind),
        Row(f"{tensor}.bias", tuple(f"{p}/bias" for p in paths), "plain"),
    ]


_L = "model.layers.{i}."
_TOP = [
    Row("model.embed_tokens.weight", ("embed/table",), "plain"),
    *norm_rows("model.norm", "final_norm"),
    Row("lm_head.weight", ("unembed/table",), "plain"),
]
_SPLIT_ATTENTION = [
    *linear_rows(_L + "self_attn.q_proj", "layers/attn/q"),
    *linear_rows(_L + "self_attn.k_proj", "layers/attn/k"),
    *linear_rows(_L + "self_attn.v_proj", "layers/attn/v"),
    *linear_rows(_L + "self_attn.o_proj", "layers/attn/out"),
    *norm_rows(_L + "self_attn.q_norm", "layers/attn/q_norm"),
    *norm_rows(_L + "self_attn.k_norm", "layers/attn/k_norm"),
]
_SPLIT_MLP = [
    *linear_rows(_L + "mlp.gate_proj", "layers/mlp/gate"),
    *linear_rows(_L + "mlp.up_proj", "layers/mlp/up"),
    *linear_rows(_L + "mlp.down_proj", "layers/mlp/down"),
]
_PRE_NORMS = [
    *norm_rows(_L + "input_layernorm", "layers/attn_norm"),
    *norm_rows(_L + "post_attention_layernorm", "layers/mlp_norm"),
]
_SANDWICH_NORMS = [
    *norm_rows(_L + "input_layernorm", "layers/attn_norm"),
    *norm_rows(_L + "post_attention_layernorm", "layers/attn_post_norm"),
    *norm_rows(_L + "pre_feedforward_layernorm", "layers/mlp_norm"),
    *norm_rows(_L + "post_feedforward_layernorm", "layers/mlp_post_norm"),
]
_LLAMA = [*_TOP, *_SPLIT_ATTENTION, *_SPLIT_MLP, *_PRE_NORMS]
_GEMMA = [*_TOP, *_SPLIT_ATTENTION, *_SPLIT_MLP, *_SANDWICH_NORMS]
_OLMO2 = [*_TOP, *_SPLIT_ATTENTION, *_SPLIT_MLP, *_SANDWICH_NORMS]
_PHI3 = [
    *_TOP,
    *linear_rows(_L + "self_attn.qkv_proj", "layers/attn/q", "layers/attn/k", "layers/attn/v"),
    *linear_rows(_L + "self_attn.o_proj", "layers/attn/out"),
    *linear_rows(_L + "mlp.gate_up_proj", "layers/mlp/gate", "layers/mlp/up"),
    *linear_rows(_L + "mlp.down_proj", "layers/mlp/down"),
    *_PRE_NORMS,
]
_H = "transformer.h.{i}."
_GPT2 = [
    Row("transformer.wte.weight", ("embed/table",), "plain"),
    Row("transformer.wpe.weight", ("positions/table",), "plain"),
    *norm_rows("transformer.ln_f", "final_norm"),
    Row("lm_head.weight", ("unembed/table",), "plain"),
    *norm_rows(_H + "ln_1", "layers/attn_norm"),
    *norm_rows(_H + "ln_2", "layers/mlp_norm"),
    *linear_rows(_H + "attn.c_attn", "layers/attn/q", "layers/attn/k", "layers/attn/v", kind="conv1d"),
    *linear_rows(_H + "attn.c_proj", "layers/attn/out", kind="conv1d"),
    *linear_rows(_H + "mlp.c_fc", "layers/mlp/up", kind="conv1d"),
    *linear_rows(_H + "mlp.c_proj", "layers/mlp/down", kind="conv1d"),
]
TABLE: dict[str, list[Row]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _OLMO2,
    "gpt2": _GPT2,
    "phi3": _PHI3,
}
# Tensors of some checkpoints that are no parameters: rotation tables and masks that old versions stored.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def rows(family: str, cfg: DecoderConfig) -> list[Row]:
    """The rows of a family whose parameters this config has."""
    have = flatten(spec(cfg))
    found = [row for row in TABLE[family] if all(path in have for path in row.paths)]
    missing = have.keys() - {path for row in found for path in row.paths}
    if missing:
        raise ValueError(
            f"the family {family!r} has no tensors for {', '.join(sorted(missing))}: choose another family"
        )
    return found


def _in_dims(path: str) -> int:
    return 2 if path.endswith("attn/out/kernel") else 1


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    n = _in_dims(path)
    return int(np.prod(shape[:n])), int(np.prod(shape[n:]))


def tensor_shape(row: Row, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The stored shape of a row's tensor, from its parameters' shapes (of one layer)."""
    if row.kind == "plain":
        return shapes[0] if len(shapes) == 1 and len(shapes[0]) == 2 and row.paths[0].endswith("table") else (
            sum(int(np.prod(s)) for s in shapes),
        )  # fmt: skip
    matrices = [_matrix_shape(p, s) for p, s in zip(row.paths, shapes)]
    size_in, size_out = matrices[0][0], sum(m[1] for m in matrices)
    return (size_out, size_in) if row.kind == "linear" else (size_in, size_out)


def from_tensor(row: Row, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """A stored tensor as the row's parameters (of one layer)."""
    flat = tensor.T if row.kind == "linear" else tensor
    if len(shapes) == 1:
        return [flat.reshape(shapes[0])]
    sizes = [int(np.prod(s)) if row.kind == "plain" else _matrix_shape(p, s)[1] for p, s in zip(row.paths, shapes)]
    parts = np.split(flat, np.cumsum(sizes)[:-1], axis=-1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


def to_tensor(row: Row, params: list[np.ndarray]) -> np.ndarray:
    """The row's parameters (of one layer) as the stored tensor: the inverse of `from_tensor`."""
    if row.kind == "plain":
        return params[0] if row.paths[0].endswith("table") else np.concatenate([p.reshape(-1) for p in params])
    flat = np.concatenate([p.reshape(_matrix_shape(path, p.shape)) for path, p in zip(row.paths, params)], axis=1)
    return np.ascontiguousarray(flat.T if row.kind == "linear" else flat)
