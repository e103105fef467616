"""Results of simulated searches as frames, and distributions of ln EMC50 whose form is known."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.special import ndtr
from test_search import VARIANT, play, world

from fasttrain.measured import Measured
from fasttrain.records import Problem


def curve(number, params, n_max, race="", **settings):
    """A row of /curves as far as comparisons read it."""
    variant = dataclasses.replace(VARIANT, **{"width": number + 1, **settings})
    about = {"variant": number, "params": params, "n_min": 2, "n_max": n_max, "data": "gaussian:64"}
    about |= {
        "steps_budget": 1000,
        "budget": "1000steps",
        "check_every": 100,
        "interval": 0.9,
        "race": race,
        "finished": True,
    }
    return {**dataclasses.asdict(variant), **about}


def run(variant, n, seed, fitted, test_accuracy=math.nan):
    """A row of /probes."""
    outcome = "fitted" if fitted else "plateaued"
    return {"variant": variant, "n": n, "seed": seed, "outcome": outcome, "test_accuracy": test_accuracy}


def scanned(emcs, params, slope=10.0, lapse=0.02, key=0, n_max=None, **settings):
    """Curves and probes of a scan whose variants, of width 1, 2, ..., have these EMC50 and one slope."""
    curves, probes = [], []
    for number, (emc, count) in enumerate(zip(emcs, params, strict=True)):
        row = curve(number, count, n_max or 4 * count, **settings)
        problem = Problem(number, VARIANT, count, 2, row["n_max"])
        _, rounds = play(problem, world(emc, slope, lapse, key=key))
        curves.append(row)
        probes += [run(number, one.n, one.seed, fitted) for done in rounds for one, fitted in done.items()]
    return pd.DataFrame(curves), pd.DataFrame(probes)


def with_density(x, below, bottom=-math.inf, top=math.inf, params=100, emc50=None):
    """A variant of which the distribution of ln EMC50 is given; the ends of its prior are far away, unless censored."""
    ends = {
        "n_min": math.exp(x[0]) * 4 if bottom > x[0] else 1e-9,
        "n_max": math.exp(x[-1]) / 4 if top < x[-1] else 1e9,
    }
    median = float(np.interp(0.5, below, x))
    known = math.exp(median) if bottom <= median <= top else math.nan
    estimate = SimpleNamespace(emc50=known, emc50_low=math.nan, emc50_high=math.nan, censored="no")
    row = {"params": params, **ends}
    return Measured(row, None, estimate, x, below, bottom, top, math.nan)


def normal(mean, sd, **about):
    """ln EMC50 is N(mean, sd^2)."""
    x = np.linspace(mean - 6 * sd, mean + 6 * sd, 1201)
    below = ndtr((x - mean) / sd)
    below[0], below[-1] = 0.0, 1.0
    return with_density(x, below, **about)
