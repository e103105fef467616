import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.data import available, check, describe, provenance, sources, task, test_set
from fasttrain.data.prepare import split

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
    # The rows of the pool are those of the data set: nothing but shift and scale of every pixel.
    assert np.array_equal(
        np.unique(found.pool[:, 20], return_inverse=True)[1], np.unique(raw.data[:, 20], return_inverse=True)[1]
    )
    assert found.y.dtype == np.int64
    assert len(set(found.rows.tolist())) == 500


def test_the_whole_data_set_is_every_row_once() -> None:
    found = task(ScanSpec(), "random", 10, 0, 1797)
    assert np.array_equal(np.sort(found.rows), np.arange(1797))
    assert not np.array_equal(found.rows, np.arange(1797))


def test_the_numbers_of_digits_are_those_of_version_0_1() -> None:
    """Rows and labels that scans before had; what is drawn must not change without a change of sampling.VERSION."""
    found = task(ScanSpec(seed=3), "random", 10, 1, 6)
    assert found.rows.tolist() == [43, 1622, 39, 239, 364, 539]
    assert found.y.tolist() == [9, 4, 8, 2, 0, 1]
    gaussian = task(ScanSpec(seed=3, data="gaussian:2"), "random", 10, 1, 2)
    assert gaussian.pool.ravel().tolist() == [
        1.7907134128261497,
        0.5022356213670882,
        1.9321381761860825,
        0.8092648437833302,
    ]
    assert gaussian.y.tolist() == [1, 9]


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
    spec = ScanSpec(labels="random,true,corrupted:0.5")
    assert np.array_equal(task(spec, "corrupted:0.5", 10, 2, 90).rows, task(spec, "true", 10, 2, 90).rows)
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
        "Digits",
        "gaussian:3x4",
        "gaussian:0x4x4",
        "gaussian:3x1024x1024",
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
    assert "digits, mnist" in caught.value.expected
    assert "gaussian:D" in caught.value.expected


@pytest.mark.parametrize(
    ("fields", "option", "value", "expected"),
    [
        ({"data": "gaussian:8", "labels": "true"}, "labels", "true", "random"),
        ({"data": "gaussian:8", "labels": "random,true"}, "labels", "true", "random"),
        ({"data": "gaussian:8", "labels": "corrupted:0.1"}, "labels", "corrupted:0.1", "random"),
        ({"data": "gaussian:8", "inputs": "shuffled"}, "inputs", "shuffled", "real"),
        ({"data": "gaussian:8", "inputs": "real,gaussian"}, "inputs", "gaussian", "real"),
        ({"inputs": "gaussian", "labels": "random,true"}, "inputs", "gaussian", "random"),
        ({"inputs": "gaussian", "labels": "corrupted:0.2"}, "inputs", "gaussian", "random"),
        ({"labels": "corrupted:0.2", "classes": 3}, "classes", 3, "10 classes"),
        ({"labels": "random,true", "n_max": 1439}, "n_max", 1439, "1438"),
        ({"labels": "corrupted:0.2", "n_min": 1439}, "n_min", 1439, "1438"),
        ({"inputs": "shuffled", "n_max": 1798}, "n_max", 1798, "1797"),
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
        {"inputs": "gaussian", "n_max": 10**9},
        {"inputs": "shuffled", "labels": "true", "n_max": 1438},
        {"data": "gaussian:3x8x8", "n_max": 10**9},
    ],
)
def test_what_it_has_is_accepted(fields: dict[str, object]) -> None:
    spec = ScanSpec(**fields)
    assert check(spec) == describe(spec.data)


# Held-out samples -----------------------------------------------------------------------------------------------------


def test_a_fixed_fifth_is_never_trained_on() -> None:
    spec = ScanSpec(labels="true")
    raw = load_digits()
    train, test = split("digits", 1797)
    assert len(test) == 359
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    for seed in range(3):
        for labels in ("true", "corrupted:0.3"):
            rows = task(ScanSpec(labels=labels, seed=seed), labels, 10, seed, 1438).rows
            assert np.array_equal(np.sort(rows), train)
    found = test_set(spec, "true", "real", 10)
    assert found is not None
    x, y = found
    assert np.array_equal(y, raw.target[test])
    # Mean and deviation are those of the training part, so that nothing of the test part is known in training.
    mean, deviation = raw.data[train].mean(0), raw.data[train].std(0)
    constant = deviation == 0
    expected = np.where(constant, 0, (raw.data[test] - mean) / np.where(constant, 1, deviation))
    np.testing.assert_allclose(x, expected, atol=1797 * 16 * np.finfo(float).eps)
    again = test_set(ScanSpec(labels="corrupted:0.3", seed=8), "corrupted:0.3", "real", 10)
    assert again is not None
    assert np.array_equal(again[0], x)
    assert np.array_equal(again[1], y)


def test_the_split_is_a_fair_draw_that_depends_on_the_name() -> None:
    train, test = split("digits", 1797)
    y = load_digits().target
    counts = [np.bincount(y[rows], minlength=10) for rows in (train, test)]
    assert stats.chi2_contingency(counts).pvalue > P_LEAST
    other = split("a file", 1797)[1]
    # Two independent fifths share a fifth of their rows.
    shared = len(np.intersect1d(test, other))
    assert P_LEAST < stats.hypergeom(1797, 359, 359).cdf(shared) < 1 - P_LEAST
    assert len(split("a file", 10**6)[1]) == 10_000
    assert len(split("a file", 4)[1]) == 0


def test_without_true_labels_nothing_is_held_out() -> None:
    assert test_set(ScanSpec(), "random", "real", 10) is None
    assert test_set(ScanSpec(inputs="gaussian"), "random", "gaussian", 10) is None
    assert test_set(ScanSpec(data="gaussian:4"), "random", "real", 10) is None


def test_available_samples_depend_on_labels_and_inputs() -> None:
    digits, mnist, gaussian = describe("digits"), describe("mnist"), describe("gaussian:5")
    assert [available(digits, labels, "real") for labels in ("random", "true", "corrupted:0.1")] == [1797, 1438, 1438]
    assert available(digits, "random", "shuffled") == 1797
    assert available(digits, "random", "gaussian") is None
    assert [available(mnist, labels, "real") for labels in ("random", "true")] == [60_000, 60_000]
    assert available(gaussian, "random", "real") is None


# Label and input modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["0.25", "0.5", "0.9"])
def test_corrupted_labels_are_drawn_uniformly_with_that_probability(share: str) -> None:
    labels = f"corrupted:{share}"
    spec = ScanSpec(labels=labels)
    raw = load_digits().target
    found = [task(spec, labels, 10, seed, 1400) for seed in range(10)]
    y, true = np.concatenate([t.y for t in found]), np.concatenate([raw[t.rows] for t in found])
    # A drawn label is the true one with probability 1/10.
    wrong = int((y != true).sum())
    assert P_LEAST < stats.binom(len(y), float(share) * 0.9).cdf(wrong) < 1 - P_LEAST
    drawn = (y - true)[y != true] % 10
    assert stats.chisquare(np.bincount(drawn, minlength=10)[1:]).pvalue > P_LEAST
    # Each of the others is as likely, 0 too: of the wrong ones, class c is a ninth of those whose truth is another.
    expected = [(true[y != true] != c).sum() / 9 for c in range(10)]
    assert stats.chisquare(np.bincount(y[y != true], minlength=10), expected).pvalue > P_LEAST
    again = task(spec, labels, 10, 3, 1400)
    assert np.array_equal(again.y, found[3].y)
    assert not np.array_equal(again.y != raw[again.rows], found[4].y != raw[found[4].rows])


def test_shuffled_inputs_are_the_same_features_in_one_other_order() -> None:
    spec = ScanSpec(inputs="real,shuffled", labels="true")
    real, shuffled = (task(spec, "true", 10, 1, 300, inputs) for inputs in ("real", "shuffled"))
    assert np.array_equal(real.rows, shuffled.rows)
    assert np.array_equal(real.y, shuffled.y)
    order = orders(real.inputs(), shuffled.inputs())
    assert not np.array_equal(order, np.arange(64))
    other = task(spec, "true", 10, 2, 200, "shuffled")  # another run of the scan
    assert np.array_equal(other.inputs(), task(spec, "true", 10, 2, 200).inputs()[:, order])
    tests = [test_set(spec, "true", inputs, 10) for inputs in ("real", "shuffled")]
    assert tests[0] is not None
    assert tests[1] is not None
    assert np.array_equal(tests[1][0], tests[0][0][:, order])
    moved = task(ScanSpec(inputs="shuffled", labels="true", seed=1), "true", 10, 1, 300, "shuffled")
    real = task(ScanSpec(labels="true", seed=1), "true", 10, 1, 300)
    assert not np.array_equal(moved.inputs(), real.inputs()[:, order])


def orders(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The permutation that was applied to the columns; equal ones in any order."""
    left = list(range(before.shape[1]))
    out = []
    for column in after.T:
        k = next(k for k in left if np.array_equal(before[:, k], column))
        left.remove(k)
        out.append(k)
    return np.array(out)


def test_gaussian_inputs_have_the_moments_of_every_feature(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Pixels with means and deviations of their own, in channels that are standardised as a whole.
    x = rng.normal(rng.uniform(90, 160, (2, 3, 4)), rng.uniform(2, 12, (2, 3, 4)), (500, 2, 3, 4)).astype(np.uint8)
    x[:, 1, 2, 3] = 100
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(500) % 5)
    spec = ScanSpec(data=str(tmp_path / "a.npz"), inputs="real,gaussian")
    check(spec)
    real = task(spec, "random", 5, 0, 2).standardised(np.float64)
    n = 20_000
    found = task(spec, "random", 5, 0, n, "gaussian")
    drawn = found.inputs()
    assert drawn.shape == (n, 24)
    mean, deviation = real.mean(0), real.std(0)
    constant = 23
    np.testing.assert_allclose(drawn[:, constant], mean[constant], rtol=1e-12)
    z = (np.delete(drawn, constant, 1) - np.delete(mean, constant)) / np.delete(deviation, constant)
    bound = stats.norm.isf(P_LEAST / 2 / 600)
    assert np.abs(z.mean(0)).max() < bound / math.sqrt(n)
    assert np.abs(z.var(0) - 1).max() < bound * math.sqrt(2 / n)
    assert np.abs((z.T @ z / n)[np.triu_indices(23, 1)]).max() < bound / math.sqrt(n)
    assert stats.kstest(z.ravel(), "norm").pvalue > P_LEAST
    again = task(spec, "random", 5, 0, n, "gaussian")
    assert np.array_equal(again.inputs(), drawn)
    assert not np.array_equal(task(spec, "random", 5, 1, n, "gaussian").inputs(), drawn)


# The pool that backends take ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_the_whole_pool_is_converted_once(tmp_path: Path, kind: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 256, (5000, 1, 4, 4)).astype(kind), y=np.arange(5000) % 3)
    spec = ScanSpec(data=str(tmp_path / "a.npz"), labels="random,true")
    check(spec)
    found = task(spec, "random", 3, 0, 100)
    whole = found.standardised(dtype)
    assert whole.dtype == dtype
    assert whole is task(spec, "random", 3, 1, 200).standardised(dtype)
    assert np.array_equal(whole[found.rows], found.inputs().astype(dtype))
    # With true labels, mean and deviation are those of fewer rows.
    other = task(spec, "true", 3, 0, 100)
    assert not np.array_equal(other.standardised(dtype), whole)
    assert np.array_equal(other.standardised(dtype)[other.rows], other.inputs().astype(dtype))


def test_a_conversion_ends_with_its_pool() -> None:
    from fasttrain.data.prepare import _CONVERTED

    before = len(_CONVERTED)
    found = task(ScanSpec(data="gaussian:4"), "random", 10, 0, 10)
    assert found.standardised(np.float64) is found.pool
    assert np.array_equal(found.standardised(np.float32), found.pool.astype(np.float32))
    assert len(_CONVERTED) == before + 1
    del found
    assert len(_CONVERTED) == before


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked", "native"])
@pytest.mark.parametrize("labels", ["random,true", "corrupted:0.5"])
def test_every_backend_trains_on_the_standardised_images(tmp_path: Path, backend: str, labels: str) -> None:
    """Bytes give the losses that plain torch has on the same images as floats, to rounding, whatever shares a state."""
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 256, (80, 3, 2, 2), dtype=np.uint8), np.arange(80) % 2
    np.savez(tmp_path / "bytes.npz", x=x, y=y)
    np.savez(tmp_path / "floats.npz", x=x.astype(float), y=y)
    losses = []
    for name, trained_by in (("bytes.npz", backend), ("floats.npz", "loop")):
        spec = ScanSpec(
            data=str(tmp_path / name), labels=labels, widths=3, steps=20, check_every=10, max_probes=4,
            backend=trained_by, precision="float64", inputs="real,shuffled",
        )  # fmt: skip
        probes = fasttrain.scan(spec).probes.sort_values(["variant", "n", "seed"])
        losses.append(probes["train_loss"].to_numpy())
    assert len(losses[0]) >= 4
    # 20 steps of rounding at 1e-16, with gradients of order 1, stay far below this; other inputs would not.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)


def test_gaussian_images_have_a_shape_and_the_numbers_of_the_flat_ones() -> None:
    info = describe("gaussian:3x4x5")
    assert (info.shape, info.features, info.size, info.image) == ((3, 4, 5), 60, None, True)
    assert describe("gaussian:60").shape == (60,)
    image, flat = (task(ScanSpec(data=name), "random", 10, 1, 7) for name in ("gaussian:3x4x5", "gaussian:60"))
    assert np.array_equal(image.pool, flat.pool)


def test_provenance_of_digits_and_of_what_is_drawn() -> None:
    told = provenance(ScanSpec(labels="random,true"))
    assert (told["data_size"], told["data_test_size"], told["data_shape"]) == (1797, 359, "1x8x8")
    assert "scikit-learn" in str(told["data_source"])
    data = sources.load("digits")
    raw = load_digits()
    assert np.array_equal(data.x, raw.data)
    assert np.array_equal(data.y, raw.target)
    assert provenance(ScanSpec())["data_test_size"] == 0
    assert provenance(ScanSpec())["data_sha256"] == told["data_sha256"]
    drawn = provenance(ScanSpec(data="gaussian:3"))
    assert set(drawn) == set(told)
    assert (drawn["data_size"], drawn["data_sha256"], drawn["data_shape"]) == (0, "", "3")
