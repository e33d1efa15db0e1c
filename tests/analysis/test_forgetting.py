"""The law of forgetting: planted parameters come back, intervals cover them, what cannot be told apart is refused."""

import math

import pytest

pytest.importorskip("scipy")

import numpy as np

from curvopt.analysis import fit_forgetting_law
from curvopt.analysis.forgetting import Law

PLAIN = {"alpha": 0.35, "beta": 0.6, "A": 0.02, "E": 0.05}
GAMMAS = {"gamma_r": 1.5, "gamma_a": 0.7, "gamma_p": 0.4}
LOSS0 = 1.5


def observations(gammas=GAMMAS, noise=0.0, seed=0, repeats=4, **planted):
    """Return observations of a planted law on 3 sizes × 4 amounts of data; noise relative to the rise."""
    rng, p = np.random.default_rng(seed), {**PLAIN, **planted}
    N = np.repeat([1e5, 4e5, 1.6e6], 4 * repeats)
    D = np.tile(np.repeat([1e4, 3e4, 1e5, 3e5], repeats), 3)
    n = len(N)
    z = {"r_eff": rng.uniform(0.1, 0.9, n), "rho_align": rng.uniform(0, 0.8, n), "pi_proj": rng.uniform(0.2, 1, n)}
    xi = np.prod([1 + g * v for g, v in zip(gammas.values(), z.values(), strict=True)], axis=0) if gammas else 1.0
    rise = p["A"] * D ** p["beta"] / (N * xi) ** p["alpha"] + p["E"]
    loss = LOSS0 + rise * (1 + noise * rng.standard_normal(n))
    return {"n_params": N, "n_tokens": D, "loss": loss, "loss0": LOSS0}, z


# what the fit needs beside the data; few resamples keep the tests fast where intervals are not looked at
QUICK = {"resamples": 20}


@pytest.mark.parametrize(
    "planted", [{}, {"E": 0.0}, {"alpha": 1.2, "beta": 0.3, "A": 5e4}, {"beta": 1.1, "A": 1e-4}], ids=str
)
def test_noise_free_plain_law_is_recovered(planted):
    given, _ = observations({}, **planted)
    fit = fit_forgetting_law(**given, **QUICK)
    assert fit.modulated is None and fit.best is fit.plain and not fit.earns
    expected = {**PLAIN, **planted}
    # the search stops at relative changes of 1e-14; the bound E ≥ 0 is approached from within
    for name, value in expected.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_noise_free_modulated_law_is_recovered():
    given, z = observations()
    fit = fit_forgetting_law(**given, **z, **QUICK)
    assert fit.earns and fit.best is fit.modulated and "Ξ justifies" in str(fit)
    for name, value in {**PLAIN, **GAMMAS}.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-5)
    assert fit.plain.rss > 1e3 * fit.modulated.rss


def test_planted_parameters_lie_in_the_intervals():
    """Equal noise of 0.004 on rises of 0.07 to 0.6, 99 % intervals."""
    given, z = observations(seed=3)
    given["loss"] += 0.004 * np.random.default_rng(3).standard_normal(len(given["loss"]))
    fit = fit_forgetting_law(**given, **z, level=0.99, resamples=60)
    for name, value in {**PLAIN, **GAMMAS}.items():
        low, high = fit.intervals[name]
        assert low <= value <= high and low < fit.params[name] < high
    # control: the plain law, without its modulators, is confidently wrong in its fit
    assert fit.plain.aicc > fit.modulated.aicc + 20 and fit.plain.bic > fit.modulated.bic + 20


def test_coverage_over_many_data_sets():
    """80 % intervals of β cover in about 80 % of 20 data sets; binomial: below 11 has probability 0.3 %."""
    inside = 0
    for seed in range(20):
        given, _ = observations({}, noise=0.05, seed=seed, repeats=2)
        low, high = fit_forgetting_law(**given, level=0.8, resamples=30).intervals["beta"]
        inside += low <= PLAIN["beta"] <= high
    assert inside >= 11
    assert inside < 20  # and they are no wider than need be


@pytest.mark.parametrize("seed", range(3))
def test_modulators_that_say_nothing_do_not_earn_their_parameters(seed):
    given, z = observations({}, seed=seed)
    given["loss"] += 0.01 * np.random.default_rng(100 + seed).standard_normal(len(given["loss"]))
    fit = fit_forgetting_law(**given, **z, **QUICK)
    assert not fit.earns and fit.best is fit.plain and "does not justify" in str(fit)
    assert fit.modulated.rss <= fit.plain.rss * (1 + 1e-9)  # nested: it can only fit better, and must pay for it


def test_noise_that_grows_with_the_rise_does_not_make_them_earn():
    """Seed 8: AICc and BIC, which take the noise for equal, both prefer Ξ here; the test is not deceived."""
    given, z = observations({}, noise=0.03, seed=8)
    fit = fit_forgetting_law(**given, **z, resamples=40)
    assert fit.modulated.bic < fit.plain.bic and fit.modulated.aicc < fit.plain.aicc
    assert fit.p_value > 0.05 and not fit.earns


def test_shuffled_modulators_lose_what_true_ones_win():
    given, z = observations(noise=0.02)
    order = np.random.default_rng(1).permutation(len(given["loss"]))
    assert fit_forgetting_law(**given, **z, **QUICK).earns
    assert not fit_forgetting_law(**given, **{k: v[order] for k, v in z.items()}, **QUICK).earns


def test_an_outlier_does_not_decide():
    given, _ = observations({}, noise=0.01)
    given["loss"][7] += 5.0
    fit = fit_forgetting_law(**given, **QUICK)
    assert fit.params["beta"] == pytest.approx(PLAIN["beta"], abs=0.1)
    # control: with the square of the residual the same point moves the exponent by much more
    from curvopt.analysis.design import checked
    from curvopt.analysis.search import search

    design, rise = checked(*given.values(), {"r_eff": None, "rho_align": None, "pi_proj": None})
    assert abs(search(design, rise, None).x[1] - PLAIN["beta"]) > 0.2


def test_criteria_are_those_of_the_books():
    law = Law("plain", PLAIN, dict.fromkeys(PLAIN, (0.0, 1.0)), 0.95, 12, 0.3, [])
    base = 12 * math.log(0.3 / 12)
    assert law.k == 5
    assert law.aic == pytest.approx(base + 10)
    assert law.aicc == pytest.approx(base + 10 + 2 * 5 * 6 / (12 - 5 - 1))
    assert law.bic == pytest.approx(base + 5 * math.log(12))
    assert Law("plain", PLAIN, {}, 0.95, 6, 0.3, []).aicc == math.inf


def test_same_seed_same_intervals_and_other_seed_others():
    given, _ = observations({}, noise=0.05)
    one, two = (fit_forgetting_law(**given, **QUICK, generator=7) for _ in range(2))
    assert one == two
    assert fit_forgetting_law(**given, **QUICK, generator=np.random.default_rng(7)) == one
    assert fit_forgetting_law(**given, **QUICK, generator=8).intervals != one.intervals


def test_prediction():
    given, z = observations()
    fit = fit_forgetting_law(**given, **z, **QUICK)
    again = fit.predict(given["n_params"], given["n_tokens"], LOSS0, **z)
    np.testing.assert_allclose(again, given["loss"], rtol=1e-7)
    np.testing.assert_allclose(given["loss"] - again, fit.best.residuals, atol=1e-9)
    assert fit.plain.predict(1e6, [1e4, 1e5], LOSS0).shape == (2,)
    with pytest.raises(ValueError, match="rho_align"):
        fit.modulated.predict(1e6, 1e5, LOSS0, r_eff=0.5)


def test_loss0_may_be_a_number_or_a_row():
    given, _ = observations({})
    row = {**given, "loss0": np.full(len(given["loss"]), LOSS0)}
    assert fit_forgetting_law(**given, **QUICK) == fit_forgetting_law(**row, **QUICK)


# ------------------------------------------------------------------------------------------------- refusals


def change(**columns):
    given, z = observations()
    every = {**given, **z}
    return {name: columns[name](every[name], every) if name in columns else value for name, value in every.items()}


REFUSED = {
    "too few": ({k: (lambda v, _: v[:7]) for k in ("n_params", "n_tokens", "loss", "r_eff", "rho_align", "pi_proj")},
                "at least 8 observations, got 7"),
    "one size": ({"n_params": lambda v, _: 0 * v + 1e6}, "n_params needs at least 2.*alpha"),
    "two amounts of data": ({"n_tokens": lambda v, _: np.where(v > 5e4, 1e5, 1e4)}, "n_tokens needs at least 3.*beta"),
    "constant r_eff": ({"r_eff": lambda v, _: 0 * v + 0.5}, "r_eff needs at least 2.*gamma_r"),
    "size and data go together": ({"n_tokens": lambda v, e: e["n_params"] ** 1.5}, "varies only together"),
    "modulators go together": ({"pi_proj": lambda v, e: e["r_eff"]}, "varies only together with .*r_eff|pi_proj"),
    "no forgetting": ({"loss": lambda v, _: LOSS0 - (v - LOSS0)}, "never rises"),
    "no trend": ({"loss": lambda v, _: 0 * v + LOSS0 + 0.5}, "must rise with n_tokens, .* a constant rise of 0.5"),
    "less with data": ({"loss": lambda v, e: LOSS0 + 5 / e["n_tokens"]}, "must rise with n_tokens, .*a constant rise"),
    "more with size": ({"loss": lambda v, e: LOSS0 + 1e-3 * e["n_params"] ** 0.3}, "must rise with n_tokens"),
    "negative data": ({"n_tokens": lambda v, _: -v}, "n_tokens must be > 0"),
    "negative overlap": ({"rho_align": lambda v, _: -v}, "rho_align must be ≥ 0"),
    "nan": ({"loss": lambda v, _: np.where(v == v[0], np.nan, v)}, "loss must be one row of finite"),
    "lengths": ({"n_tokens": lambda v, _: v[:-1]}, "n_tokens must have one value for each"),
    "words": ({"n_params": lambda v, _: ["many"] * len(v)}, "n_params must be numbers"),
    "one of three": ({"pi_proj": lambda v, _: None}, "belong together: pi_proj missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_is_missing(case):
    columns, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit_forgetting_law(**change(**columns), **QUICK)


def test_what_is_constant_to_the_plain_law_may_be_none_to_the_modulated_one():
    """Ξ rises with D and falls with N, so that on average nothing is left of either."""
    rng = np.random.default_rng(0)
    N = np.repeat([1e5, 2e5, 4e5], 16)
    D = np.tile(np.repeat([1e4, 2e4, 4e4, 8e4], 4), 3)
    xi = ((D / 1e4) / (N / 4e5)) ** 1.1 * np.exp(rng.uniform(0, 1.5, len(N))) * 1.2
    z = {"r_eff": xi - 1, "rho_align": rng.uniform(0, 0.8, len(N)), "pi_proj": rng.uniform(0.2, 1, len(N))}
    rise = 0.2 * D**0.3 / (N * xi * (1 + 0.7 * z["rho_align"]) * (1 + 0.4 * z["pi_proj"])) ** 0.3 + 0.002
    loss = LOSS0 + rise * (1 + 0.01 * rng.standard_normal(len(N)))
    found = fit_forgetting_law(N, D, loss, LOSS0, **z, **QUICK)
    assert found.earns and found.params["alpha"] == pytest.approx(0.3, abs=0.05)
    with pytest.raises(ValueError, match="a constant rise"):
        fit_forgetting_law(N, D, loss, LOSS0, **QUICK)


def test_too_few_for_the_plain_law():
    given, _ = observations({}, repeats=1)
    few = {k: v if k == "loss0" else v[[0, 1, 2, 4]] for k, v in given.items()}
    with pytest.raises(ValueError, match="at least 5 observations, got 4"):
        fit_forgetting_law(**few)


@pytest.mark.parametrize("wrong", [{"level": 0}, {"level": 1.0}, {"resamples": 3}, {"resamples": 1.5}], ids=str)
def test_bad_settings(wrong):
    given, _ = observations({})
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fit_forgetting_law(**given, **wrong)
