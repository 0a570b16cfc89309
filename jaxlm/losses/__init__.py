"""Loss functions: pure, unreduced, importable alone (this loads jax and nothing heavier)."""

from jaxlm.losses.lm import bits_per_byte, cross_entropy, next_token_nll, seq_logprob, z_loss
from jaxlm.losses.preference import cdpo, discopop, dpo, dpo_norm, exo, hinge, ipo, ipo_sum, robust_dpo
from jaxlm.losses.preference_free import alphapo, cpo, orpo, sft, simpo, tpo, tpo_l
from jaxlm.losses.preference_modifiers import length_desensitised_sums, mix_reference, weighted_sum, wpo_weight
from jaxlm.losses.preference_pointwise import aot, aot_unpaired, apo_down, apo_zero, bco_pair, nca, sppo_hard
from jaxlm.losses.preference_unpaired import (
    apo_zero_unpaired,
    bco,
    bco_baseline,
    bco_density_weight,
    kto,
    kto_baseline,
    mismatched_rows,
)
from jaxlm.losses.scores import alpha_divergence, forward_kl, js_divergence, reverse_kl

__all__ = [
    "alpha_divergence",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_baseline",
    "bco_density_weight",
    "bco_pair",
    "bits_per_byte",
    "cdpo",
    "cpo",
    "cross_entropy",
    "discopop",
    "dpo",
    "dpo_norm",
    "exo",
    "forward_kl",
    "hinge",
    "ipo",
    "ipo_sum",
    "js_divergence",
    "kto",
    "kto_baseline",
    "length_desensitised_sums",
    "mismatched_rows",
    "mix_reference",
    "nca",
    "next_token_nll",
    "orpo",
    "reverse_kl",
    "robust_dpo",
    "seq_logprob",
    "sft",
    "simpo",
    "sppo_hard",
    "tpo",
    "tpo_l",
    "weighted_sum",
    "wpo_weight",
    "z_loss",
]
