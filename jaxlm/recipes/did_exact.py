"""The experiments E1 to E5 of the DID recipe: DPO and its rivals fully minimised over the population of pairs.

The figures beside the measurements were computed with other code (numpy and scipy) from the same seeds; none of them is
the paper's. Those of hinge are this code's own: L-BFGS elsewhere stopped at 0.074 and 0.147, short of the minimum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.analysis import did
from jaxlm.recipes.did_checks import Check, Result, Settings, above, below, near
from jaxlm.recipes.did_fit import LABELS, Problem, draw_policies, minimize, minimize_hinge, power_law_problem
from jaxlm.typing import Array

E1_FIGURES = {
    "cpo": (0.110, 0.110), "hinge": (0.060, 0.155), "bco_pair": (0.118, 0.053), "apo_zero": (0.113, 0.067),
    "orpo": (0.125, 0.145), "orpo_weak": (0.184, 0.190), "nca": (0.145, 0.091), "ipo_sum": (0.162, 0.127),
    "sppo_hard": (0.166, 0.132),
}  # fmt: skip
BETAS = (1.0, 0.1)


def e1(settings: Settings) -> Result:
    """Uniqueness: of all objectives, only DPO's log-ratio reward recovers the target from power-law data."""
    checks, fits = [], {}
    num = settings.num_responses
    for i, beta in enumerate(BETAS):
        problems = [power_law_problem(s, beta=beta, num_responses=num) for s in range(settings.num_seeds)]
        for name in LABELS:
            policies = [_fit(name, problem, beta) for problem in problems]
            fits[name, beta] = [float(did.jsd(p.target, fit)) for p, fit in zip(problems, policies)]
            if name == "cpo":
                off = [did.jsd(did.did(p.target, p.reference), fit) for p, fit in zip(problems, policies)]
                checks.append(below(f"JSD(DID, CPO's fit), beta {beta:g}, worst seed", max(off), 1e-10))
            if name in E1_FIGURES:
                mean = np.mean(fits[name, beta])
                checks.append(near(f"JSD(target, {LABELS[name]}), beta {beta:g}", mean, E1_FIGURES[name][i], 0.001))
            else:
                worst = max(fits[name, beta])
                checks.append(below(f"JSD(target, {LABELS[name]}), beta {beta:g}, worst seed", worst, 1e-9))
    others = min(np.mean(values) for (name, _), values in fits.items() if name != "dpo")
    start = np.mean([float(did.jsd(p.target, p.reference)) for p in problems])
    checks.append(above("smallest mean JSD of the other objectives", others, 0.03, at_reference_only=True))
    checks.append(near("JSD(target, reference), the start", start, 0.198, 0.001))
    series = {f"{name} {beta:g}": values for (name, beta), values in fits.items()}
    return Result("e1", "Uniqueness: only DPO recovers the target", tuple(checks), {**series, "start": float(start)})


def _fit(name: str, problem: Problem, beta: float) -> Array:
    """The exact minimiser, by the method that the objective's smoothness allows."""
    return minimize_hinge(problem, beta=beta) if name == "hinge" else minimize(name, problem, beta=beta)


E2_FIGURES = {0.0: 0.198, 0.1: 0.140, 0.25: 0.061, 1.0: 0.166, 2.0: 0.4075}
E2_OTHERS = {"uniform": 0.490, "target": 0.557, "independent": 0.487, "reference squared": 0.151}


def e2(settings: Settings) -> Result:
    """Choice of rejected distribution: only the optimal one serves, and a wrong one can be worse than no training."""
    beta, grid = 0.5, np.linspace(0, 2, 81)
    checks, measured = [], {}
    drawn = [draw_policies(s, num_responses=settings.num_responses) for s in range(settings.num_seeds)]
    curve = np.mean([[did.jsd(t, did.tilt(r, t - r, g / beta)) for g in grid] for r, t, _ in drawn], axis=0)
    for g in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0):
        jsds, off = zip(*[_fit_rejected(r, t, did.tilt(r, t - r, -g), beta) for r, t, _ in drawn])
        measured[g] = float(np.mean(jsds))
        if g == beta:
            checks.append(below(f"JSD(target, fit), g {g:g} = beta, worst seed", max(jsds), 1e-9))
        else:
            tolerance = 0.0015 if g == 2 else 0.001  # 0.408 fitted and 0.407 in closed form: between the two
            checks.append(near(f"JSD(target, fit), g {g:g}", measured[g], E2_FIGURES[g], tolerance))
        if g <= 1:
            checks.append(below(f"JSD(closed form, fit), g {g:g}, worst seed", max(off), 1e-10))
    others = {}
    for name, figure in E2_OTHERS.items():
        pairs = [_fit_rejected(r, t, _other_rejected(name, r, t, o), beta) for r, t, o in drawn]
        others[name] = float(np.mean([jsd for jsd, _ in pairs]))
        checks.append(near(f"JSD(target, fit), rejected: {name}", others[name], figure, 0.001))
    series = dict(g=list(measured), measured=list(measured.values()), grid=grid.tolist(), curve=curve.tolist())
    return Result(
        "e2", "Only the optimal rejected distribution serves", tuple(checks), {**series, "beta": beta, "others": others}
    )


def _fit_rejected(reference: Array, target: Array, rejected: Array, beta: float) -> tuple[float, float]:
    """JSD of DPO's fit to the target, and to the closed form of its optimum."""
    fit = minimize("dpo", Problem(reference, target, reference, rejected), beta=beta)
    return float(did.jsd(target, fit)), float(did.jsd(did.dpo_optimum(reference, rejected, reference, beta=beta), fit))


def _other_rejected(name: str, reference: Array, target: Array, other: Array) -> Array:
    zero = jnp.zeros_like(reference)
    choices = {"uniform": zero, "target": target, "independent": other, "reference squared": 2 * reference}
    return jax.nn.log_softmax(choices[name])


E3_CHOSEN = (-0.708, -0.845, -1.021)
E3_REJECTED = {1.0: (-1.69, -2.39, -2.07), 0.1: (-0.82, -1.03, -1.18)}


def e3(settings: Settings) -> Result:
    """Displacement: both log-probabilities must fall, the chosen one by exactly KL(reference || target)."""
    checks: list[Check] = []
    rows: list[list[float]] = []
    gaps, orders = [], []
    for beta in BETAS:
        for seed in range(3):
            problem = power_law_problem(seed, beta=beta, num_responses=settings.num_responses)
            fit = minimize("dpo", problem, beta=beta)
            chosen = float(did.expected_change(problem.chosen, problem.reference, fit))
            rejected = float(did.expected_change(problem.rejected, problem.reference, fit))
            reward = problem.target - problem.reference
            predicted = [float(did.tilted_mean(problem.reference, reward, s)) for s in (0.0, -beta)]
            rows.append([beta, seed, chosen, rejected, *predicted])
            gaps.append(max(abs(chosen - predicted[0]), abs(rejected - predicted[1])))
            orders += [rejected - chosen, chosen]
            label = f"beta {beta:g}, seed {seed}"
            checks.append(near(f"chosen change, {label}", chosen, E3_CHOSEN[seed], 0.001))
            checks.append(near(f"rejected change, {label}", rejected, E3_REJECTED[beta][seed], 0.006))
    checks.append(below("largest error of the predicted changes", max(gaps), 1e-6))
    checks.append(below("largest of rejected - chosen change, and of the chosen change", max(orders), 0.0))
    return Result("e3", "Displacement: both fall, by the predicted amount", tuple(checks), {"rows": rows})


E4_FIGURES = {0.1: -0.593, 0.3: -0.335, 0.5: -0.035, 0.6: 0.130, 1.0: 0.828, 2.0: 1.858}


def e4(settings: Settings) -> Result:
    """Crossover: with rejected responses of the reference, the chosen log-probability falls or rises with beta."""
    reference, target, _ = draw_policies(0, num_responses=settings.num_responses)
    reward = target - reference
    crossover = float(did.solve_tilt(reference, reward, 0.0))
    checks = [near("crossover s0", crossover, 0.522, 0.001)]
    rows, worst, gaps, signs = [], 0.0, [], []
    for beta, figure in E4_FIGURES.items():
        problem = Problem(reference, target, did.tilt(reference, reward, beta), reference)
        fit = minimize("dpo", problem, beta=beta)
        chosen = float(did.expected_change(problem.chosen, reference, fit))
        rejected = float(did.expected_change(reference, reference, fit))
        worst = max(worst, float(did.jsd(target, fit)))
        gaps += [chosen - float(did.tilted_mean(reference, reward, beta)), rejected + float(did.kl(reference, target))]
        signs.append((chosen > 0) == (beta > crossover))
        rows.append([beta, chosen, rejected])
        checks.append(near(f"chosen change, beta {beta:g}", chosen, figure, 0.001))
        checks.append(near(f"rejected change, beta {beta:g}", rejected, -0.708, 0.001))
    checks.append(below("largest error of the predicted changes", np.max(np.abs(gaps)), 1e-6))
    checks.append(above("share of betas whose chosen change has the predicted sign", np.mean(signs), 1.0))
    checks.append(below("JSD(target, fit), worst beta", worst, 1e-12))
    grid = np.linspace(0, 2.1, 85)
    curve = [float(did.tilted_mean(reference, reward, s)) for s in grid]
    series = {"rows": rows, "grid": grid.tolist(), "curve": curve, "crossover": crossover}
    return Result("e4", "Crossover: one optimum, displacement of either sign", tuple(checks), series)


def e5(settings: Settings) -> Result:
    """Log-margin order: the power law puts the reference's margin between the other two on every pair."""
    shares: dict[str, list[float]] = {"power law": [], "independent": []}
    slopes, r2s, points = [], [], {}
    beta = 0.5
    above_diagonal = np.triu_indices(settings.num_responses, 1)
    for seed in range(settings.num_seeds):
        reference, target, other = draw_policies(seed, num_responses=settings.num_responses)
        rejected = {"power law": did.optimal_rejected(target, reference, beta=beta), "independent": other}
        for name, log_rejected in rejected.items():
            policies = (target, reference, log_rejected)
            target_m, reference_m, rejected_m = (did.margins(x)[above_diagonal] for x in policies)
            shares[name].append(float(did.ordered_share(target_m, reference_m, rejected_m)))
            if name == "power law":
                fit = did.power_law(reference_m - rejected_m, target_m - reference_m)
                slopes.append(float(fit.slope))
                r2s.append(float(fit.r2))
            if seed == 0:
                points[name] = [(target_m - reference_m).tolist(), (reference_m - rejected_m).tolist()]
    checks = (
        above("ordered share under the power law, worst seed", min(shares["power law"]), 1.0),
        below("error of the power-law slope (beta 0.5), worst seed", np.max(np.abs(np.array(slopes) - beta)), 1e-9),
        above("R^2 of the power law, worst seed", min(r2s), 1 - 1e-9),
        near("ordered share, independent rejected policy", np.mean(shares["independent"]), 0.29, 0.006),
    )
    series = {"shares": shares, "points": points, "beta": beta}
    return Result("e5", "Log-margin order: every pair under the power law, a third without", checks, series)
