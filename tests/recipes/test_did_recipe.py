"""The DID recipe: its experiments, small in the default suite and at the reference settings as slow tests."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.analysis import did as analysis
from jaxlm.recipes import did, did_exact, did_fit, did_sampled
from jaxlm.recipes.did_checks import Check, Result, Settings
from jaxlm.recipes.train import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def report(result):
    return "\n".join(f"{c.name}: {c.value:.6g} not in [{c.low}, {c.high}]" for c in result.checks if not c.passed)


@pytest.mark.parametrize("name", ["e4", "e5"])
def test_exact_experiments_at_the_reference_settings(name):
    result = did.run_experiment(name, Settings())
    assert result.passed, report(result)


@pytest.mark.slow
def test_long_experiments_at_the_reference_settings(tmp_path):
    names = ("e1", "e2", "e3", "e6", "e7", "e8", "e9", "e10")
    command = [sys.executable, "-m", "jaxlm.cli", "train", "--config", str(ROOT / "configs/did/exact.py")]
    command += [f"--config.run_dir={tmp_path / 'did'}", f"--config.experiments={names}"]
    # Unlike other tests these compute for long: compiled as users' programs are, they take an eighth of the time.
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "did" / "results.json").read_text())["experiments"].keys() == set(names)


def test_e1_on_one_seed_only_dpo_recovers_the_target(float64):
    beta = 1.0
    problem = did_fit.power_law_problem(0, beta=beta)
    fits = {n: did_fit.minimize(n, problem, beta=beta) for n in ("dpo", "cpo", "ipo_sum", "sppo_hard", "nca", "orpo")}
    jsds = {name: float(analysis.jsd(problem.target, fit)) for name, fit in fits.items()}
    assert jsds.pop("dpo") < 1e-9
    assert min(jsds.values()) > 0.03
    assert analysis.jsd(analysis.did(problem.target, problem.reference), fits["cpo"]) < 1e-10


def test_the_linear_program_is_the_minimum_of_the_librarys_hinge_loss(float64):
    problem = did_fit.power_law_problem(0, beta=0.5, num_responses=8)
    weights, loss = did_fit.pair_weights(problem), did_fit.OBJECTIVES["hinge"](0.5)

    def value(log_policy):
        return float(did_fit.population_loss(log_policy, problem.reference, weights, loss=loss))

    exact = did_fit.minimize_hinge(problem, beta=0.5)
    least = value(exact)
    assert least <= value(did_fit.minimize("hinge", problem, beta=0.5, max_steps=300)) < least + 0.01
    rng = np.random.default_rng(0)
    around = [value(jax.nn.log_softmax(exact + 0.1 * rng.normal(size=8))) for _ in range(50)]
    assert min(around) > least


def test_e2_a_fit_goes_where_the_closed_form_says(float64):
    reference, target, other = did_fit.draw_policies(1)
    jsds = {}
    for name, rejected in (("optimal", analysis.optimal_rejected(target, reference, beta=0.5)), ("other", other)):
        fit = did_fit.minimize("dpo", did_fit.Problem(reference, target, reference, rejected), beta=0.5)
        assert analysis.jsd(analysis.dpo_optimum(reference, rejected, reference, beta=0.5), fit) < 1e-9
        jsds[name] = analysis.jsd(target, fit)
    assert jsds["optimal"] < 1e-10 and jsds["other"] > analysis.jsd(target, reference)


def test_e6_entropies_order_and_condition(float64):
    for (name, figures), exponent in zip(did_sampled.E6_FIGURES.items(), (1.0, 1.5)):
        reference = did_sampled.zipf(exponent, num_responses=1000)
        pair = did_sampled.controlled_pair(reference)
        found = [analysis.entropy(reference)]
        for kind in ("sharpen", "smooth"):
            found += [analysis.did_entropy(pair[kind].target, reference), analysis.entropy(pair[kind].target)]
        np.testing.assert_allclose(found, figures, atol=0.006, err_msg=name)
        assert found[1] < found[3] and found[2] < found[0] < found[4]
    mirrored = jax.nn.log_softmax(-reference)  # few unlikely responses: the claim is reversed
    pair = did_sampled.controlled_pair(mirrored)
    sharp, smooth = (analysis.did_entropy(pair[kind].target, mirrored) for kind in ("sharpen", "smooth"))
    assert sharp > smooth


def test_e6_the_third_cumulant_decides_the_order(float64):
    reference = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(3).normal(size=1000)))
    t = 0.02
    sharp, smooth = (analysis.did_entropy(analysis.tilt(reference, reference, s), reference) for s in (t, -t))
    third = jnp.mean((reference - reference.mean()) ** 3)
    np.testing.assert_allclose(sharp - smooth, -2 / 3 * third * t**3, rtol=0.01)


def test_the_population_loss_is_the_mean_over_the_pairs_that_are_drawn(float64):
    problem = did_fit.power_law_problem(0, beta=0.5, num_responses=6)
    policy = did_fit.draw_policies(7, num_responses=6)[0]
    loss = did_fit.OBJECTIVES["dpo"](0.5)
    exact = did_fit.population_loss(policy, problem.reference, did_fit.pair_weights(problem), loss=loss)
    keys = jax.random.split(jax.random.key(0), 2)
    w, r = (did_fit.sample(k, p, 200_000) for k, p in zip(keys, (problem.chosen, problem.rejected)))
    drawn = loss(policy[w], policy[r], problem.reference[w], problem.reference[r])
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / np.sqrt(len(drawn))
    by_hand = sum(
        np.exp(problem.chosen[a] + problem.rejected[b])
        * np.log1p(np.exp(-0.5 * ((policy - problem.reference)[a] - (policy - problem.reference)[b])))
        for a in range(6)
        for b in range(6)
    )
    np.testing.assert_allclose(exact, by_hand, rtol=1e-12)
    fixed = did_fit.sampled_weights(problem, num_pairs=100_000, seed=0)
    np.testing.assert_allclose(fixed, did_fit.pair_weights(problem), atol=0.006)
    np.testing.assert_allclose(fixed.sum(), 1)


def test_samples_follow_the_distribution(float64):
    log_p = jnp.log(jnp.array([0.5, 0.0, 0.2, 0.3]))
    counts = np.bincount(did_fit.sample(jax.random.key(0), log_p, 100_000), minlength=4)
    np.testing.assert_allclose(counts / 100_000, [0.5, 0.0, 0.2, 0.3], atol=0.006)
    assert counts[1] == 0


@pytest.mark.slow
def test_e8_on_a_short_stream_dpo_leads(float64):
    problem = jax.tree.map(lambda x: x[None], did_fit.power_law_problem(0, beta=1.0, num_responses=8))
    keys = jax.random.split(jax.random.key(0), 1)
    final = {
        name: float(did_fit.train_on_stream(problem, keys, name=name, beta=1.0, num_steps=400)[0, -1])
        for name in ("dpo", "ipo_sum", "orpo")
    }
    assert final["dpo"] < 0.01 and final["dpo"] < min(final["ipo_sum"], final["orpo"]) / 5


@pytest.fixture
def config(tmp_path):
    _, cfg = load_recipe(str(ROOT / "configs/did/exact.py"), [f"run_dir={tmp_path / 'did'}"])
    return cfg


def test_the_config_names_every_experiment(config):
    assert config.recipe == "did" and config.settings == Settings()
    assert set(config.experiments) == set(did.EXPERIMENTS) and did.resolve(config) == config


def test_a_run_writes_a_table_and_plots_and_resumes(config, capsys):
    small = did.shrink(dataclasses.replace(config, experiments=("e5",)))
    first = did.run(small)
    folder = Path(small.run_dir)
    assert folder.name == "did-shrunk"
    assert (folder / "e5.png").read_bytes().startswith(b"\x89PNG")
    assert "| **E5** |" in (folder / "table.md").read_text()
    stored = json.loads((folder / "results.json").read_text())
    assert stored["versions"]["jax"] and stored["experiments"]["e5"]["settings"]["num_responses"] == 8
    assert "done before" not in capsys.readouterr().out
    assert did.run(small) == first
    assert capsys.readouterr().out.count("done before") == 1
    did.run(dataclasses.replace(small, settings=dataclasses.replace(small.settings, num_seeds=2)))
    assert "done before" not in capsys.readouterr().out


@pytest.mark.slow
def test_every_experiment_runs_shrunk_and_is_drawn(config):
    did.run(did.shrink(config))
    assert {path.stem for path in Path(f"{config.run_dir}-shrunk").glob("e*.png")} == set(did.EXPERIMENTS)


def test_a_failed_check_is_an_error_with_its_numbers(config, monkeypatch):
    monkeypatch.setitem(did.EXPERIMENTS, "e5", lambda settings: failing())
    monkeypatch.setattr(did, "plot", lambda *_: None)
    with pytest.raises(ValueError, match=r"1 checks failed:\n  e5: share: measured 0.5, expected at least 1"):
        did.run(dataclasses.replace(config, experiments=("e5",)))
    assert "| share | 0.5 | at least 1 | **FAIL** |" in Path(config.run_dir, "table.md").read_text()


def failing():
    return Result("e5", "t", (Check("share", 0.5, low=1.0), Check("free", float("nan"))), {})


def test_figures_are_judged_at_the_reference_settings_only(monkeypatch):
    result = Result("e5", "t", (Check("a", 2.0, 0.0, 1.0, True), Check("b", 2.0, 0.0, 1.0)), {})
    monkeypatch.setitem(did.EXPERIMENTS, "e5", lambda settings: result)
    assert [c.passed for c in did.run_experiment("e5", Settings()).checks] == [False, False]
    assert [c.passed for c in did.run_experiment("e5", Settings(num_seeds=4)).checks] == [True, False]
    assert not Check("nan", float("nan"), low=0.0).passed


def test_e1_tables_name_every_objective():
    assert set(did_exact.E1_FIGURES) | {"dpo"} == set(did_fit.OBJECTIVES) == set(did_fit.LABELS)
