"""The two-way tables between an encoder's parameter paths and the tensor names of Hugging Face checkpoints."""

from __future__ import annotations

from typing import NamedTuple

from jaxlm.models.hf_names import Row, linear_rows, norm_rows

_EMBEDDINGS = [
    Row("embeddings.word_embeddings.weight", ("embed/table",), "plain"),
    Row("embeddings.position_embeddings.weight", ("positions/table",), "plain"),
    Row("embeddings.token_type_embeddings.weight", ("token_types/table",), "plain"),
    *norm_rows("embeddings.LayerNorm", "embed_norm"),
]
_B = "encoder.layer.{i}."
_BERT = [
    *_EMBEDDINGS,
    *linear_rows(_B + "attention.self.query", "layers/attn/q"),
    *linear_rows(_B + "attention.self.key", "layers/attn/k"),
    *linear_rows(_B + "attention.self.value", "layers/attn/v"),
    *linear_rows(_B + "attention.output.dense", "layers/attn/out"),
    *norm_rows(_B + "attention.output.LayerNorm", "layers/attn_norm"),
    *linear_rows(_B + "intermediate.dense", "layers/mlp/up"),
    *linear_rows(_B + "output.dense", "layers/mlp/down"),
    *norm_rows(_B + "output.LayerNorm", "layers/mlp_norm"),
    *linear_rows("pooler.dense", "head"),
]
_D = "transformer.layer.{i}."
_DISTILBERT = [
    *_EMBEDDINGS,
    *linear_rows(_D + "attention.q_lin", "layers/attn/q"),
    *linear_rows(_D + "attention.k_lin", "layers/attn/k"),
    *linear_rows(_D + "attention.v_lin", "layers/attn/v"),
    *linear_rows(_D + "attention.out_lin", "layers/attn/out"),
    *norm_rows(_D + "sa_layer_norm", "layers/attn_norm"),
    *linear_rows(_D + "ffn.lin1", "layers/mlp/up"),
    *linear_rows(_D + "ffn.lin2", "layers/mlp/down"),
    *norm_rows(_D + "output_layer_norm", "layers/mlp_norm"),
]


def _modern_block(tensor: str, path: str, first: int) -> list[Row]:
    rows = [
        *norm_rows(tensor + "attn_norm", f"{path}/attn_norm"),
        *linear_rows(tensor + "attn.Wqkv", f"{path}/attn/q", f"{path}/attn/k", f"{path}/attn/v"),
        *linear_rows(tensor + "attn.Wo", f"{path}/attn/out"),
        *norm_rows(tensor + "mlp_norm", f"{path}/mlp_norm"),
        *linear_rows(tensor + "mlp.Wi", f"{path}/mlp/gate", f"{path}/mlp/up"),
        *linear_rows(tensor + "mlp.Wo", f"{path}/mlp/down"),
    ]
    return [row._replace(first=first) for row in rows]


_MODERNBERT = [
    Row("embeddings.tok_embeddings.weight", ("embed/table",), "plain"),
    *norm_rows("embeddings.norm", "embed_norm"),
    *_modern_block("layers.0.", "first", 0),
    *_modern_block("layers.{i}.", "layers", 1),
    *norm_rows("final_norm", "final_norm"),
]
TABLE: dict[str, list[Row]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
}
# What stands before the encoder's names in the checkpoint of a model with a head.
PREFIX = {"bert": "bert.", "roberta": "roberta.", "distilbert": "distilbert.", "modernbert": "model."}


class MaskedLMNames(NamedTuple):
    """rows: of the head's parameters. copies: of tied tensors, which some files store too. prefixes: of all of them."""

    rows: list[Row]
    copies: dict[str, str]
    prefixes: tuple[str, ...]


def _masked_lm(dense: str, norm: str, projection: str, bias: str, *prefixes: str) -> MaskedLMNames:
    rows = [
        *linear_rows(dense, "masked_lm/dense"),
        *norm_rows(norm, "masked_lm/norm"),
        Row(bias, ("masked_lm/bias",), "plain"),
    ]
    copies = {f"{projection}.weight": "embed/table", f"{projection}.bias": "masked_lm/bias"}
    return MaskedLMNames(rows, {name: path for name, path in copies.items() if name != bias}, prefixes)


_T = "cls.predictions.transform."
MASKED_LM = {
    "bert": _masked_lm(
        _T + "dense", _T + "LayerNorm", "cls.predictions.decoder", "cls.predictions.bias", "cls.predictions."
    ),
    "roberta": _masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", "lm_head."),
    "distilbert": _masked_lm(
        "vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias", "vocab_"
    ),
    "modernbert": _masked_lm("head.dense", "head.norm", "decoder", "decoder.bias", "head.", "decoder."),
}
# Heads of other tasks, which checkpoints carry beside the encoder.
OTHER_HEADS = ("cls.seq_relationship.", "classifier.", "pre_classifier.", "qa_outputs.")
