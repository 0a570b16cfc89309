"""What the preference recipe refuses: combinations, losses over micro-batches, terms, a run without a model."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from jaxlm.recipes import dpo
from jaxlm.recipes.config import to_dataclass
from jaxlm.recipes.preference_losses import OVER_BATCH, LossTerm

SETUP = runpy.run_path(str(Path(__file__).with_name("dpo_setup.py")))
LORA, config, one_device = (SETUP[name] for name in ("LORA", "config", "one_device"))


def terms(*names: str, **options: float) -> dict[str, Any]:
    return dict(losses=tuple(LossTerm(name, options=options or dict(beta=0.1)) for name in names))


REFUSED = {
    "no loss": (dict(losses=()), "expected at least one"),
    "kto on pairs": (terms("kto"), "kto needs data.examples='responses_mismatched', found 'pairs'"),
    "kto without mismatches": (
        terms("kto") | dict(data=dict(examples="responses")),
        "kto needs data.examples='responses_mismatched', found 'responses'",
    ),
    "bco with mismatches": (
        terms("bco") | dict(data=dict(examples="responses_mismatched")),
        "bco needs data.examples='responses', found 'responses_mismatched'",
    ),
    "dpo on responses": (dict(data=dict(examples="responses")), "dpo needs data.examples='pairs', found 'responses'"),
    "dpo on documents": (dict(data=dict(examples="documents")), "dpo needs data.examples='pairs', found 'documents'"),
    "kto beside dpo": (terms("dpo", "kto"), r"kto is of single responses and is never summed.*\['dpo', 'kto'\]"),
    "sync of a cache": (dict(sync_every=2), "sync_every moves the reference: it needs reference='live' and no lora"),
    "sync of adapters": (
        dict(sync_every=2, reference="live", lora=LORA),
        "sync_every moves the reference: it needs reference='live' and no lora",
    ),
    "ld_alpha of responses": (
        terms("kto") | dict(data=dict(examples="responses_mismatched"), ld_alpha=0.5),
        "ld_alpha compares the two responses of a pair, found data.examples='responses_mismatched'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_that_cannot_be_are_refused(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("name", OVER_BATCH)
def test_losses_over_the_batch_refuse_micro_batches(tmp_path, name):
    examples = {"kto": "responses_mismatched", "bco": "responses"}.get(name, "pairs")
    changes = terms(name) | dict(data=dict(examples=examples))
    config(tmp_path, **changes)
    message = f"{name} depends on the whole batch.*set train.num_microbatches=1, found 2"
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes, train=dict(num_microbatches=2))
    if examples == "pairs":  # also as the second of a sum
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **terms("dpo", name), train=dict(num_microbatches=2))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (dict(name="dop"), "'dop' is none of them; did you mean dpo"),
        (dict(name="dpo", options=dict(bta=0.1)), "losses.dpo: expected the options beta, found bta; missing: beta"),
        (dict(name="dpo", options=dict(beta=0.1, label_smoothing=0.1)), "expected the options beta, found beta, label"),
        (dict(name="cdpo"), "expected the options beta, label_smoothing, found beta; missing: label_smoothing"),
        (dict(name="simpo", options=dict(beta=2.0)), "expected the options beta, gamma, found beta; missing: gamma"),
        (dict(name="simpo", options=dict(beta=2.0, gamma=1.0), divergence="forward_kl"), "simpo takes no divergence"),
        (dict(name="kto", divergence="js_divergence"), "losses.kto takes no divergence, found 'js_divergence'"),
        (dict(name="apo_zero", divergence="js_divergence"), "losses.apo_zero takes no divergence"),
    ],
)
def test_terms_that_cannot_be_are_refused(term, message):
    with pytest.raises(ValueError, match=message):
        LossTerm(**term)


def test_a_config_of_plain_values_is_the_same():
    given = dict(name="dpo", options=dict(beta=1), divergence="alpha_divergence", alpha=0.3)
    term = to_dataclass(LossTerm, given)
    assert term == LossTerm("dpo", 1.0, {"beta": 1.0}, "alpha_divergence", 0.3)
    assert type(term.options["beta"]) is float
    with pytest.raises(ValueError, match="expected one of 'reverse_kl', "):
        to_dataclass(LossTerm, given | dict(divergence="kl"))


def test_a_run_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give model .* or init_from"):
        dpo.run(config(tmp_path, model=None))


def test_a_loss_without_options_needs_none():
    assert to_dataclass(LossTerm, dict(name="sft")).options == {}


def test_ld_alpha_outside_its_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ld_alpha"):
        config(tmp_path, ld_alpha=1.5)


def test_a_moving_reference_that_nothing_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sync_every"):
        config(tmp_path, **terms("cpo"), sync_every=2, reference="live")


def test_a_z_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="z_loss"):
        config(tmp_path, train=dict(z_loss=1e-4))
