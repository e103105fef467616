import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from fasttrain import ScanSpec, UserError
from fasttrain.data import check, describe, task

# All draws are keyed, so that a test gives the same number every time; see test_sampling.py.
P_LEAST = 1e-4


def inputs(spec: ScanSpec, seed: int, n: int) -> np.ndarray:
    found = task(spec, "random", 10, seed, n)
    return found.pool[found.rows]


def test_digits_have_every_pixel_standardised() -> None:
    pool = task(ScanSpec(), "random", 10, 0, 100).pool
    raw = load_digits().data
    assert pool.shape == raw.shape
    assert pool.dtype == np.float64
    constant = raw.std(0) == 0
    assert 0 < constant.sum() < 64
    assert not pool[:, constant].any()
    varying = pool[:, ~constant]
    # A mean of N numbers of size up to max|x| is off by at most N eps max|x|, and so is a mean of squares.
    bound = len(pool) * np.finfo(float).eps * np.abs(varying).max() ** 2
    assert np.abs(varying.mean(0)).max() < bound
    assert np.abs((varying**2).mean(0) - 1).max() < bound
    # Nothing but shift and scale: the order of a pixel's values is that of the raw ones.
    for pixel in np.flatnonzero(~constant)[::7]:
        assert np.array_equal(
            np.unique(pool[:, pixel], return_inverse=True)[1],
            np.unique(raw[:, pixel], return_inverse=True)[1],
        )


def test_true_labels_are_those_of_the_rows() -> None:
    found = task(ScanSpec(labels="true"), "true", 10, 3, 500)
    raw = load_digits()
    assert np.array_equal(found.y, raw.target[found.rows])
    assert found.y.dtype == np.int64
    assert len(set(found.rows.tolist())) == 500


def test_the_whole_data_set_is_every_row_once() -> None:
    found = task(ScanSpec(labels="true"), "true", 10, 0, 1797)
    assert np.array_equal(np.sort(found.rows), np.arange(1797))
    assert not np.array_equal(found.rows, np.arange(1797))


def test_random_labels_ignore_the_data() -> None:
    found = task(ScanSpec(), "random", 10, 0, 1797)
    true = load_digits().target[found.rows]
    table = np.zeros((10, 10))
    np.add.at(table, (found.y, true), 1)
    assert stats.chi2_contingency(table).pvalue > P_LEAST


@pytest.mark.parametrize("data", ["digits", "gaussian:3"])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_random_labels_are_uniform_over_the_classes(data: str, classes: int) -> None:
    spec = ScanSpec(data=data, classes=classes)
    y = np.concatenate([task(spec, "random", classes, seed, 1500).y for seed in range(10)])
    assert y.min() == 0
    assert y.max() == classes - 1
    assert P_LEAST < stats.chisquare(np.bincount(y, minlength=classes)).pvalue < 1 - P_LEAST
    # Not balanced by construction either: the counts of one run vary as those of independent labels.
    counts = [np.bincount(task(spec, "random", classes, seed, 1500).y, minlength=classes) for seed in range(10)]
    statistic = sum(stats.chisquare(c).statistic for c in counts)
    assert P_LEAST < stats.chi2.sf(statistic, 10 * (classes - 1)) < 1 - P_LEAST


def test_gaussian_inputs_are_standard_normal_and_uncorrelated() -> None:
    n, features = 20_000, 8
    x = inputs(ScanSpec(data=f"gaussian:{features}"), 0, n)
    assert x.shape == (n, features)
    z = stats.norm.isf(P_LEAST / 2 / 64)
    assert np.abs(x.mean(0)).max() < z / math.sqrt(n)
    assert np.abs(x.var(0) - 1).max() < z * math.sqrt(2 / n)  # the variance of x^2 is 2
    assert np.abs((x**4).mean(0) - 3).max() < z * math.sqrt(96 / n)  # and of x^4 105 - 9
    products = (x.T @ x / n)[np.triu_indices(features, 1)]
    assert np.abs(products).max() < z / math.sqrt(n)
    assert stats.kstest(x.ravel(), "norm").pvalue > P_LEAST


@pytest.mark.parametrize("data", ["digits", "gaussian:5"])
def test_a_task_is_keyed_by_scan_seed_seed_and_n(data: str) -> None:
    spec = ScanSpec(data=data)
    first, again = task(spec, "random", 10, 1, 300), task(spec, "random", 10, 1, 300)
    assert np.array_equal(first.pool[first.rows], again.pool[again.rows])
    assert np.array_equal(first.y, again.y)
    other_settings = ScanSpec(data=data, widths=7, lr=0.5, steps=3, optimizer="sgd", batch_size=3)
    same = task(other_settings, "random", 10, 1, 300)
    assert np.array_equal(same.pool[same.rows], first.pool[first.rows])
    assert np.array_equal(same.y, first.y)


@pytest.mark.parametrize("data", ["digits", "gaussian:5"])
def test_other_seeds_and_other_n_are_independent(data: str) -> None:
    """Also the shared prefix of two n: a larger task is no extension of a smaller one."""
    spec, other_scan = ScanSpec(data=data), ScanSpec(data=data, seed=1)
    shared = 300
    tasks = [task(spec, "random", 10, seed, n) for seed in (0, 1, 2) for n in (300, 301, 600)]
    tasks.append(task(other_scan, "random", 10, 0, 300))
    z = stats.norm.isf(P_LEAST / 2 / math.comb(len(tasks), 2))
    labels = np.corrcoef([found.y[:shared] for found in tasks])[np.triu_indices(len(tasks), 1)]
    assert np.abs(labels).max() * math.sqrt(shared) < z
    if data == "digits":
        # Rows without replacement agree in about Poisson(shared / 1797) places.
        pairs = itertools.combinations([found.rows[:shared] for found in tasks], 2)
        most = stats.poisson.isf(P_LEAST / math.comb(len(tasks), 2), shared / 1797)
        assert max(int((a == b).sum()) for a, b in pairs) <= most
    else:
        flat = [found.pool[:shared].ravel() for found in tasks]
        correlation = np.corrcoef(flat)[np.triu_indices(len(tasks), 1)]
        assert np.abs(correlation).max() * math.sqrt(shared * 5) < z


def test_inputs_do_not_depend_on_the_labels_asked_for() -> None:
    spec = ScanSpec(labels="random,true")
    assert np.array_equal(task(spec, "random", 10, 2, 90).rows, task(spec, "true", 10, 2, 90).rows)
    assert np.array_equal(task(spec, "random", 2, 2, 90).rows, task(spec, "random", 10, 2, 90).rows)


def test_digits_tasks_share_one_pool_and_gaussian_tasks_own_theirs() -> None:
    digits = [task(ScanSpec(seed=seed), "random", 10, seed, 10 + seed) for seed in range(3)]
    assert all(found.pool is digits[0].pool for found in digits)
    spec = ScanSpec(data="gaussian:4")
    gaussian = [task(spec, "random", 10, seed, 10) for seed in (0, 1)]
    assert not np.shares_memory(gaussian[0].pool, gaussian[1].pool)
    assert np.array_equal(gaussian[0].rows, np.arange(10))


def test_describe_tells_features_classes_and_size() -> None:
    digits, gaussian = describe("digits"), describe("gaussian:1048576")
    raw = load_digits()
    assert (digits.size, digits.features) == raw.data.shape
    assert digits.classes == len(np.unique(raw.target))
    assert (gaussian.features, gaussian.classes, gaussian.size) == (2**20, 10, None)


@pytest.mark.parametrize(
    "name",
    [
        "mnist",
        "Digits",
        "digits ",
        "gaussian",
        "gaussian:",
        "gaussian:0",
        "gaussian:x",
        "gaussian:-3",
        "gaussian:2.5",
        "gaussian:64:2",
        " gaussian:64",
        "gaussian:64\n",
        "gaussian:1048577",
        "gaussian:99999999999",
    ],
)
def test_unknown_data_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check(ScanSpec(data=name))
    assert (caught.value.option, caught.value.value) == ("data", name)
    assert "digits or gaussian:D" in caught.value.expected


@pytest.mark.parametrize(
    ("fields", "option", "value", "expected"),
    [
        ({"data": "gaussian:8", "labels": "true"}, "labels", "true", "random"),
        ({"data": "gaussian:8", "labels": "random,true"}, "labels", "true", "random"),
        ({"labels": "true", "classes": (10, 2)}, "classes", 2, "10 classes"),
        ({"labels": "random,true", "classes": 11}, "classes", 11, "10 classes"),
        ({"n_max": 1798}, "n_max", 1798, "1797"),
        ({"n_min": 1798}, "n_min", 1798, "1797"),
        ({"n_min": 5, "n_max": 10**9}, "n_max", 10**9, "1797"),
    ],
)
def test_what_the_data_set_does_not_have_is_refused(
    fields: dict[str, object], option: str, value: object, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(ScanSpec(**fields))
    assert (caught.value.option, caught.value.value) == (option, value)
    assert expected in caught.value.expected


@pytest.mark.parametrize(
    "fields",
    [
        {"n_max": 1797},
        {"n_min": 1797},
        {"labels": "true", "classes": 10},
        {"labels": "random", "classes": 100},
        {"data": "gaussian:8", "n_max": 10**9},
    ],
)
def test_what_it_has_is_accepted(fields: dict[str, object]) -> None:
    spec = ScanSpec(**fields)
    assert check(spec) == describe(spec.data)
