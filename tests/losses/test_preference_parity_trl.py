"""Preference losses against the code of TRL's trainers, on stub models in float64, and where they differ on purpose.

Nothing of TRL is retyped: its trainers' own loss methods run, on instances that skip `__init__` and a "model" that
returns given token log-probabilities. `bco` alone has no counterpart in TRL 1.16.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import warnings  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports; ours are errors in every other file
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.tpo import TPOTrainer
    from trl.trainer.callbacks import SyncRefModelCallback
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

from jaxlm import losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

B, T, BETA = 5, 9, 0.3
ALPHA = partial(losses.alpha_divergence, alpha=0.5)
# ours -> (our function, TRL's loss type, TRL's settings); the f-divergence only where both have one
PAIRED = {
    "dpo": (losses.dpo, "sigmoid", {}),
    "robust_dpo": (partial(losses.robust_dpo, label_smoothing=0.1), "robust", {"label_smoothing": 0.1}),
    "hinge": (losses.hinge, "hinge", {}),
    "ipo": (losses.ipo, "ipo", {}),
    "dpo_norm": (losses.dpo_norm, "sigmoid_norm", {}),
    "exo": (partial(losses.exo, label_smoothing=0.1), "exo_pair", {"label_smoothing": 0.1}),
    "discopop": (losses.discopop, "discopop", {}),
    "nca": (losses.nca, "nca_pair", {}),
    "bco_pair": (losses.bco_pair, "bco_pair", {}),
    "sppo_hard": (losses.sppo_hard, "sppo_hard", {}),
    "apo_zero": (losses.apo_zero, "apo_zero", {}),
    "apo_down": (losses.apo_down, "apo_down", {}),
    "aot": (losses.aot, "aot", {}),
    "aot, smoothed": (partial(losses.aot, label_smoothing=0.1), "aot", {"label_smoothing": 0.1}),
    "aot_unpaired": (losses.aot_unpaired, "aot_unpaired", {}),
}
MAPPED = ("dpo", "robust_dpo", "hinge", "ipo", "dpo_norm", "exo", "discopop")
DIVERGENCES = {
    "forward_kl": (losses.forward_kl, "forward_kl"),
    "js_divergence": (losses.js_divergence, "js_divergence"),
}
NORMALISED = {"ipo", "dpo_norm"}


class Batch(SimpleNamespace):
    """Token log-probabilities of the policy and the reference, [2B, T], chosen rows first, and their mask."""

    def lengths(self):
        n = self.mask.sum(1)
        return {"chosen_length": n[: len(n) // 2], "rejected_length": n[len(n) // 2 :]}

    def sums(self):
        rows = [x.sum(1) for x in (self.policy, self.reference)]
        return [half for x in rows for half in np.split(x, 2)]

    def row(self, i):
        pick = [i, i + len(self.mask) // 2]
        return Batch(**{name: x[pick] for name, x in vars(self).items()})


def batch(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, size=(2 * B, 1))
    policy = -rng.gamma(1.0, scale, size=(2 * B, T)) * mask
    reference = (policy + rng.normal(size=(2 * B, T)) * scale) * mask
    return Batch(policy=policy, reference=reference, mask=mask, log_sum_p2=-rng.random((2 * B, T)) * mask)


class Stub(torch.nn.Module):
    """A model as TRL's fused head shows it, which gives the next of some token log-probabilities at each call."""

    is_gradient_checkpointing = False

    def __init__(self, *logprobs, log_sum_p2=None):
        super().__init__()
        self.calls, self.log_sum_p2 = iter(logprobs), log_sum_p2

    def forward(self, **_):
        logprob = next(self.calls)
        zeros = torch.zeros_like(logprob)
        return SimpleNamespace(
            log_probs=logprob, log_sum_sq_probs=self.log_sum_p2, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )


def trainer(kind, **attributes):
    made = object.__new__(kind)
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    attributes = {
        "accelerator": same, "aux_loss_enabled": False, "beta": BETA, "label_smoothing": 0.0, "ref_model": None,
        "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "_tp_size": 1,
        "precompute_ref_logps": False, "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    } | attributes  # fmt: skip
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def trl_dpo(data, loss_types, loss_weights=(1.0,), divergence="reverse_kl", dtype=torch.float64, **settings):
    """TRL's loss, which is a mean over the batch, and its gradient with respect to the policy's sums, [2B]."""
    logprob = torch.tensor(data.policy, dtype=dtype, requires_grad=True)
    model = Stub(logprob, log_sum_p2=torch.tensor(data.log_sum_p2, dtype=dtype))
    made = trainer(DPOTrainer, model=model, ref_model=Stub(torch.tensor(data.reference, dtype=dtype)), **{
        "ld_alpha": None, "f_divergence_type": divergence, "f_alpha_divergence_coef": 0.5, "use_weighting": False,
        "loss_types": list(loss_types), "loss_weights": list(loss_weights),
    } | settings)  # fmt: skip
    # one prompt token, whose target is none
    mask = torch.tensor(np.pad(data.mask, ((0, 0), (1, 0))), dtype=torch.long)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = made._compute_loss(model, inputs, return_outputs=False)
    loss.backward()
    return loss.item(), logprob.grad[:, 0].numpy()


def ours(data, name, **changes):
    lengths = data.lengths() if name in NORMALISED else {}
    fn = partial(PAIRED[name][0], beta=BETA, **lengths, **changes)
    loss = fn(*map(jnp.asarray, data.sums()))
    grads = jax.grad(lambda *args: fn(*args).mean(), (0, 1))(*map(jnp.asarray, data.sums()))
    return np.asarray(loss), np.concatenate(grads)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_paired_losses_and_their_gradients(name):
    data = batch()
    _, loss_type, settings = PAIRED[name]
    loss, grad = ours(data, name)
    want, want_grad = trl_dpo(data, [loss_type], **settings)
    close(loss.mean(), want)
    close(grad, want_grad)
    if not name.startswith("aot"):
        close(loss, [trl_dpo(data.row(i), [loss_type], **settings)[0] for i in range(B)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", MAPPED)
def test_divergences(name, divergence):
    data = batch(seed=1, scale=0.4)
    _, loss_type, settings = PAIRED[name]
    fn, trl_name = DIVERGENCES[divergence]
    loss, grad = ours(data, name, divergence=fn)
    want, want_grad = trl_dpo(data, [loss_type], divergence=trl_name, **settings)
    close(loss.mean(), want)
    close(grad, want_grad)


def test_weighted_sums_of_losses():
    data = batch(seed=2)
    parts = [ours(data, name)[0] for name in ("dpo", "bco_pair")]
    sft = -data.sums()[0].sum() / data.lengths()["chosen_length"].sum()  # TRL's is one mean over the batch
    got = losses.weighted_sum([*map(jnp.asarray, parts), jnp.full(B, sft)], (0.8, 0.2, 1.0))
    close(got.mean(), trl_dpo(data, ["sigmoid", "bco_pair", "sft"], (0.8, 0.2, 1.0))[0])


def test_length_desensitised_sums():
    data = batch(seed=3)
    masks = dict(zip(("chosen_mask", "rejected_mask"), np.split(data.mask, 2)))
    pairs = [
        losses.length_desensitised_sums(*map(jnp.asarray, np.split(x, 2)), **masks, ld_alpha=0.4)
        for x in (data.policy, data.reference)
    ]
    got = losses.dpo(*pairs[0], *pairs[1], beta=BETA)
    close(got, [trl_dpo(data.row(i), ["sigmoid"], ld_alpha=0.4)[0] for i in range(B)])


def test_wpo_weights():
    data = batch(seed=4)
    weights = losses.wpo_weight(*map(jnp.asarray, (data.policy, data.log_sum_p2, data.mask)))
    got = ours(data, "dpo")[0] * weights[:B] * weights[B:]
    close(got, [trl_dpo(data.row(i), ["sigmoid"], use_weighting=True)[0] for i in range(B)])


def test_mix_reference():
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 3, 4))
    modules = [torch.nn.Linear(4, 3, bias=False, dtype=torch.float64) for _ in range(2)]
    for module, weight in zip(modules, (policy, reference)):
        module.weight.data = torch.tensor(weight)
    SyncRefModelCallback._sync_target_model(*modules, alpha=0.6)
    got = losses.mix_reference({"w": jnp.asarray(policy)}, {"w": jnp.asarray(reference)}, policy_weight=0.6)
    close(got["w"], modules[1].weight.data.numpy())


def trl_cpo(chosen, rejected, loss_type, **settings):
    made = trainer(CPOTrainer, loss_type=loss_type, **{"alpha": 0.0, "simpo_gamma": 0.5} | settings)
    return made.cpo_loss(torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


def test_reference_free_losses():
    data = batch(seed=5)
    chosen, rejected, *reference = data.sums()
    lengths = data.lengths()
    means = chosen / lengths["chosen_length"], rejected / lengths["rejected_length"]
    close(losses.cpo(chosen, rejected, beta=BETA), trl_cpo(chosen, rejected, "sigmoid"))
    given = {"beta": BETA, "gamma": 0.5, **lengths}
    close(losses.simpo(chosen, rejected, **given), trl_cpo(*means, "simpo"))
    for alpha in (0.25, -0.5):
        close(losses.alphapo(chosen, rejected, alpha=alpha, **given), trl_cpo(*means, "simpo", alpha=alpha))
    # TRL's CPO loss on log-ratios is the summed IPO, and, smoothed, cDPO, both absent from its DPO trainer
    a, b = chosen - reference[0], rejected - reference[1]
    close(losses.ipo_sum(chosen, rejected, *reference, beta=BETA), trl_cpo(a, b, "ipo"))
    got = losses.cdpo(chosen, rejected, *reference, beta=BETA, label_smoothing=0.1)
    close(got, trl_cpo(a, b, "sigmoid", label_smoothing=0.1))


def trl_orpo(chosen, rejected):
    # in float32, whatever the inputs are
    return -trainer(ORPOTrainer).odds_ratio_loss(torch.tensor(chosen), torch.tensor(rejected))[0]


def test_orpo():
    data = batch(seed=6)
    chosen, rejected, *_ = data.sums()
    lengths = data.lengths()
    want = trl_orpo(chosen / lengths["chosen_length"], rejected / lengths["rejected_length"])
    close(losses.orpo(chosen, rejected, beta=BETA, **lengths), want)


def trl_tpo(logits, ids, mask, loss_type):
    class Model:
        training = True

        def __call__(self, **_):
            return SimpleNamespace(logits=torch.tensor(logits))

    made = trainer(TPOTrainer, model=Model(), loss_type=loss_type, tpo_alpha=0.7, tpo_l_gamma=0.5)
    inputs = {"input_ids": torch.tensor(ids), "completion_mask": torch.tensor(mask, dtype=torch.long)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return made._compute_loss(made.model, inputs, return_outputs=False).item()


def triple():
    rng = np.random.default_rng(7)
    logits, ids = rng.normal(size=(3, T, 11)), rng.integers(0, 11, size=(3, T))
    mask = np.arange(T) < np.array([[5], [T], [7]])
    mask[:, :2] = False  # the prompt
    logprob = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    logprob = np.take_along_axis(logprob, ids[:, 1:, None], -1)[..., 0]
    sums, lengths = (logprob * mask[:, 1:]).sum(1, keepdims=True), mask[:, 1:].sum(1, keepdims=True)
    return logits, ids, mask, sums, dict(zip(("chosen_length", "rejected_length", "gold_length"), lengths))


def test_tpo():
    *inputs, sums, lengths = triple()
    got = losses.tpo(*sums, beta=BETA, alpha=0.7, gold_length=lengths["gold_length"])
    close(got[0], trl_tpo(*inputs, "sigmoid"))
    close(losses.tpo_l(*sums, beta=BETA, gamma=0.5, alpha=0.7, **lengths)[0], trl_tpo(*inputs, "tpo-l"))


def trl_kto(data, labels, loss_type, mismatched=(), **weights):
    """TRL's mean over the batch, and its baseline; `mismatched` holds both models' sums on borrowed completions."""
    # each model is asked for the borrowed completions first, if there are any, and then for the rows' own
    borrowed = [torch.tensor(x)[:, None] / T * torch.ones(T) for x in mismatched]
    model, ref_model = (
        Stub(*borrowed[k : k + 1], torch.tensor(x)) for k, x in enumerate((data.policy, data.reference))
    )
    settings = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "calculate_KL": bool(mismatched)} | weights
    made = trainer(KTOTrainer, model=model, ref_model=ref_model, loss_type=loss_type, **settings)
    mask = torch.tensor(np.pad(data.mask, ((0, 0), (1, 0))), dtype=torch.long)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {f"KL_{name}": x for name, x in inputs.items()} | {"label": torch.tensor(labels)}
    loss = made._compute_loss(model, inputs, return_outputs=False)
    return loss.item(), made._metrics["train"]["kl"][0]


@pytest.mark.parametrize("sign", [1, -1])
def test_kto(sign):
    data, rng = batch(seed=8), np.random.default_rng(8)
    policy, reference = data.policy.sum(1), data.reference.sum(1)
    labels = np.arange(2 * B) % 3 == 0
    mismatched = -rng.uniform(5, 9, 2 * B)
    mismatched = mismatched, mismatched - sign * rng.random(2 * B)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    want, want_baseline = trl_kto(data, labels, "kto", mismatched, **weights)
    baseline = losses.kto_baseline(*map(jnp.asarray, mismatched))
    close(baseline, want_baseline)
    assert (baseline > 0) == (sign > 0)
    close(losses.kto(policy, reference, labels, beta=BETA, baseline=baseline, **weights).mean(), want)


def test_apo_zero_unpaired():
    data = batch(seed=9)
    labels = np.arange(2 * B) % 3 == 0
    got = losses.apo_zero_unpaired(data.policy.sum(1), data.reference.sum(1), labels, beta=BETA)
    close(got.mean(), trl_kto(data, labels, "apo_zero_unpaired")[0])


def smoothing_of_dpo():
    data = batch()
    plain = trl_dpo(data, ["sigmoid"])[0]
    assert trl_dpo(data, ["sigmoid"], label_smoothing=0.1)[0] == plain
    smoothed = losses.cdpo(*data.sums(), beta=BETA, label_smoothing=0.1).mean()
    assert abs(smoothed - plain) > 1e-3


def alpha_in_float32():
    data = batch(seed=1, scale=0.4)
    with pytest.raises(KeyError):
        trl_dpo(data, ["sigmoid"], divergence="alpha_divergence")
    for name in MAPPED:
        _, loss_type, settings = PAIRED[name]
        want = trl_dpo(data, [loss_type], divergence="alpha_divergence", dtype=torch.float32, **settings)[0]
        np.testing.assert_allclose(ours(data, name, divergence=ALPHA)[0].mean(), want, rtol=1e-5)


def one_pair(chosen, rejected):
    """A pair of one token each, against a reference that is certain."""
    policy = np.array([[chosen], [rejected]])
    return Batch(policy=policy, reference=0 * policy, mask=np.ones((2, 1), bool), log_sum_p2=0 * policy)


def forward_kl_far_below():
    data = one_pair(-40.0, 0.0)
    with jax.enable_x64(False):
        got, grad = ours(data, "dpo", divergence=losses.forward_kl)
    want, want_grad = trl_dpo(data, ["sigmoid"], divergence="forward_kl")
    close(want, BETA * np.expm1(40.0))
    np.testing.assert_allclose(got[0], BETA * np.exp(30.0) * 11, rtol=1e-5)
    np.testing.assert_allclose((grad[0], want_grad[0]), (-BETA * np.exp(30.0), -BETA * np.exp(40.0)), rtol=1e-5)
    assert np.isinf(trl_dpo(one_pair(-90.0, 0.0), ["sigmoid"], divergence="forward_kl", dtype=torch.float32)[0])


def alpha_far_below():
    data = one_pair(-200.0, 0.0)  # an exponent of 100
    with jax.enable_x64(False):
        got, grad = ours(data, "dpo", divergence=ALPHA)
    want, want_grad = trl_dpo(data, ["sigmoid"], divergence="alpha_divergence", dtype=torch.float32)
    np.testing.assert_allclose(want, 2 * BETA * np.exp(80.0), rtol=1e-4)
    np.testing.assert_allclose(got[0], 2 * BETA * np.exp(30.0) * 71, rtol=1e-4)
    assert want_grad[0] == 0
    np.testing.assert_allclose(grad[0], -BETA * np.exp(30.0), rtol=1e-4)


def discopop_far_below():
    data = one_pair(-5e3, 0.0)
    assert np.isnan(trl_dpo(data, ["discopop"])[0])
    got, grad = ours(data, "discopop")
    close(got[0], BETA * 5e3)
    close(grad, [-BETA, BETA])


def exo_without_smoothing():
    assert not np.isfinite(trl_dpo(batch(), ["exo_pair"])[0])  # its constructor refuses it as well
    with pytest.raises(ValueError, match="so 0 is refused"):
        losses.exo(*batch().sums(), beta=BETA, label_smoothing=0.0)


def sft_mean():
    data = batch()
    chosen, length = data.sums()[0], data.lengths()["chosen_length"]
    want = trl_dpo(data, ["sft"])[0]
    close(-chosen.sum() / length.sum(), want)
    got = losses.sft(chosen, chosen_length=length).mean()
    close(got, (-chosen / length).mean())
    assert abs(got - want) > 1e-3


def tpo_mean():
    logits, ids, mask, sums, lengths = triple()
    order = [0, 0, 1, 1, 2, 0]  # two pairs, with gold responses of two lengths
    sums = [np.concatenate(x) for x in ((sums[0], sums[0]), (sums[1], sums[1]), (sums[2], sums[0]))]
    gold_length = np.concatenate([lengths["gold_length"], lengths["chosen_length"]])
    want = trl_tpo(logits[order], ids[order], mask[order], "sigmoid")
    pair = losses.cpo(sums[0], sums[1], beta=BETA).mean()
    close(pair - 0.7 * sums[2].sum() / gold_length.sum(), want)
    got = losses.tpo(*sums, beta=BETA, alpha=0.7, gold_length=gold_length).mean()
    close(got, pair - 0.7 * (sums[2] / gold_length).mean())
    assert abs(got - want) > 1e-3


def orpo_of_certain_response():
    zero, other = np.zeros(1), np.full(1, -2.0)
    one = np.ones(1, int)
    given = {"beta": BETA, "chosen_length": one, "rejected_length": one}
    assert np.isnan(trl_orpo(zero, zero)).all() and np.isinf(trl_orpo(other, zero)).all()
    assert np.isfinite(losses.orpo(zero, zero, **given)).all() and np.isfinite(losses.orpo(other, zero, **given)).all()


def empty_completion():
    logits, none = torch.zeros((1, 3, 5), dtype=torch.float64), torch.full((1, 3), -100)
    assert torch.isnan(CPOTrainer.get_batch_logps(logits, none, average_log_prob=True)).all()
    lengths = {"chosen_length": np.zeros(1, int), "rejected_length": np.ones(1, int)}
    assert np.isfinite(losses.simpo(np.zeros(1), np.full(1, -2.0), beta=BETA, gamma=0.5, **lengths)).all()


def alphapo_of_unlikely_response():
    chosen, rejected = (np.full(1, x, np.float32) for x in (-400.0, -1.0))  # an exponent of 100
    one = np.ones(1, int)
    given = {"beta": BETA, "gamma": 0.5, "alpha": 0.25, "chosen_length": one, "rejected_length": one}
    assert np.isinf(trl_cpo(chosen, rejected, "simpo", alpha=0.25)).all()
    np.testing.assert_allclose(losses.alphapo(chosen, rejected, **given), BETA * 4 * np.exp(30.0) * 71, rtol=1e-4)


# name -> (why ours differs, the check that asserts both values)
DIFFERENCES = {
    "dpo's label smoothing": ("TRL accepts it and ignores it; ours are cdpo and robust_dpo", smoothing_of_dpo),
    "alpha divergence, float64": ("TRL has no float64 entry in its clamp table, so it is compared in float32",
                                  alpha_in_float32),
    "forward_kl below -30": ("a tangent keeps value and gradient in float32; TRL's is infinite below -88",
                             forward_kl_far_below),
    "alpha divergence past 30": ("a tangent keeps the gradient alive; TRL's clamp at 80 makes it 0", alpha_far_below),
    "discopop far below": ("computed in log space; TRL multiplies 0 by infinity", discopop_far_below),
    "exo, e = 0": ("the loss is infinite there, so it is refused in the function", exo_without_smoothing),
    "sft": ("every response weighs the same; TRL's is one mean over all tokens of the batch", sft_mean),
    "tpo": ("as sft, for the gold responses", tpo_mean),
    "orpo of a certain response": ("the mean is held at -2^-24; TRL gives NaN or infinity", orpo_of_certain_response),
    "empty completion": ("its mean is 0; TRL divides by 0", empty_completion),
    "alphapo past 30": ("a tangent, as for forward_kl", alphapo_of_unlikely_response),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_deliberate_differences(name):
    reason, check = DIFFERENCES[name]
    assert reason
    check()
