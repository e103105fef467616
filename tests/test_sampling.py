import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fasttrain.sampling import (
    VERSION,
    Purpose,
    generator,
    generator_digest,
    minibatches,
    order_key,
    permute,
    subset,
)

# All draws are keyed: a test gives the same number every time. A right generator would fall below this
# for one key in 10,000; a change of what is drawn (which the pinned values catch first) draws again.
P_LEAST = 1e-4

SIZES = [*range(1, 301), 1009, 1024, 1797, 4093, 65535, 65536, 65537]

ORDER_KEY = (1179925189, 2580295525)
MINIBATCHES_10 = [[6, 8, 5, 1], [0, 2, 4, 9], [7, 3, 9, 2], [8, 1, 3, 4], [0, 5, 6, 7]]
MINIBATCHES_3 = [[1, 0, 1, 2, 0, 2, 1, 1], [2, 0, 0, 1, 2, 1, 2, 0]]
SUBSET = [1189, 148, 1394, 1301, 1515, 969, 1401, 921]
LABELS = [2, 1, 8, 9, 1, 3, 3, 2, 1, 8, 6, 6, 6, 4, 8, 8]
WEIGHTS = [-0.03885898448898689, 1.4027625030313031, -2.1317959330719995, -0.4006602828625256]
INPUTS = [-1.1731164398613587, 0.7891138508539056]
DIGEST = "2d3b2ba2d9194bc0"


def orders(n: int, epochs: int, key: tuple[int, int]) -> np.ndarray:
    """The permutations of the first epochs, [epochs, n]."""
    place = np.arange(epochs * n)
    return permute(place % n, n, place // n, key).reshape(epochs, n)


def scalar_permute(position: int, n: int, epoch: int, key: tuple[int, int]) -> int:
    """The published definition once more, one element, in Python integers."""
    word = 2**32

    def mix(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x7FEB352D % word
        h = (h ^ (h >> 15)) * 0x846CA68B % word
        return h ^ (h >> 16)

    hashed = mix((epoch * 0x9E3779B9 + key[0]) % word)
    for_low, for_high = mix(hashed ^ key[1]), mix((hashed + key[1]) % word)
    rows = next(a for a in itertools.count(1) if a * a >= n)
    columns = (n + rows - 1) // rows
    while True:
        high, low = divmod(position, rows)
        for r in range(1, 13 if n > 6 else 25):
            constant = 0x9E3779B9 * r % word
            if r % 2:
                low = (low + mix((high * 0x85EBCA6B + for_low) % word ^ constant) * rows // word) % rows
            else:
                high = (high + mix((low * 0x85EBCA6B + for_high) % word ^ constant) * columns // word) % columns
        position = high * rows + low
        if position < n:
            return position


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 10, 54, 97, 100, 101, 1797, 65537, 2**31 - 1, 2**31])
def test_permute_equals_its_definition_in_python_integers(n: int) -> None:
    rng = np.random.default_rng(n)
    for key in ((0, 0), (2**32 - 1, 2**32 - 1), (0x12345678, 0x9ABCDEF0)):
        position = rng.integers(0, n, 12)
        epoch = rng.integers(0, 2**31, 12)
        expected = [scalar_permute(int(p), n, int(e), key) for p, e in zip(position, epoch, strict=True)]
        assert permute(position, n, epoch, key).tolist() == expected


def test_permute_is_a_bijection() -> None:
    for n in SIZES:
        for epoch, key in ((0, (0, 0)), (1, order_key(0, 0, n)), (12345, (2**32 - 1, 1))):
            found = permute(np.arange(n), n, np.full(n, epoch), key)
            assert np.array_equal(np.sort(found), np.arange(n)), (n, epoch, key)


def test_permute_of_many_positions_equals_one_at_a_time_and_keeps_the_shape() -> None:
    key = order_key(3, 1, 101)
    place = np.arange(300).reshape(3, 4, 25)
    whole = permute(place % 101, 101, place // 101, key)
    assert whole.dtype == np.int64
    for index in np.ndindex(place.shape):
        position, epoch = np.array([place[index] % 101]), np.array([place[index] // 101])
        assert whole[index] == permute(position, 101, epoch, key)[0]


def test_permute_does_not_write_into_its_arguments() -> None:
    place, epoch = np.arange(30, dtype=np.uint32), np.ones(30, dtype=np.uint32)
    permute(place, 30, epoch, (1, 2))
    assert place.tolist() == list(range(30))
    assert set(epoch.tolist()) == {1}


def test_what_is_drawn_is_pinned() -> None:
    """A change here changes every scan: raise VERSION, pin the new values, and say so in the changelog."""
    assert VERSION == "philox-feistel-2"
    assert order_key(1, 2, 100) == ORDER_KEY
    assert minibatches(10, 4, 0, 5, order_key(0, 0, 10)).tolist() == MINIBATCHES_10
    assert minibatches(3, 8, 1, 3, order_key(7, 5, 3)).tolist() == MINIBATCHES_3
    assert subset(0, 3, 8, 1797).tolist() == SUBSET
    assert generator(1, 2, 3, Purpose.LABELS).integers(0, 10, 16).tolist() == LABELS
    assert generator(1, 2, 3, Purpose.WEIGHTS).standard_normal(4).tolist() == WEIGHTS
    assert generator(1, 2, 3, Purpose.INPUTS).standard_normal(2).tolist() == INPUTS
    assert generator_digest() == DIGEST


def test_purposes_are_pinned() -> None:
    assert {p.name: int(p) for p in Purpose} == {
        "INPUTS": 1,
        "LABELS": 2,
        "SUBSET": 3,
        "WEIGHTS": 4,
        "ORDER": 5,
        "FEATURES": 6,
        "CURVATURE": 7,
    }


def uniform_p(drawn: np.ndarray) -> float:
    """Chi-square p-value of all n! orders being equally likely, from orders [K, n]."""
    n = drawn.shape[1]
    cells = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    counts = np.bincount([cells[tuple(order)] for order in drawn.tolist()], minlength=math.factorial(n))
    return float(stats.chisquare(counts).pvalue)


@pytest.mark.parametrize(("n", "epochs"), [(2, 50_000), (3, 50_000), (4, 50_000), (5, 100_000), (6, 100_000)])
def test_all_orders_are_equally_likely_over_epochs(n: int, epochs: int) -> None:
    """12 rounds would leave 4 % at n = 5 and 9 % at n = 6: here, 9 and 20 standard deviations."""
    assert uniform_p(orders(n, epochs, order_key(0, 0, n))) > P_LEAST


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_are_equally_likely_over_keys(n: int) -> None:
    place, epoch = np.arange(n), np.zeros(n, dtype=np.int64)
    drawn = [permute(place, n, epoch, order_key(0, seed, n)) for seed in range(15 * math.factorial(n))]
    assert uniform_p(np.array(drawn)) > P_LEAST


@pytest.mark.parametrize("n", [54, 100])
def test_every_value_is_equally_often_at_every_position(n: int) -> None:
    """The counts' n rows and n columns have fixed sums, which leaves (n - 1)^2 degrees of freedom."""
    epochs = 10_000
    drawn = orders(n, epochs, order_key(0, 1, n))
    table = np.bincount((np.arange(n) * n + drawn).ravel(), minlength=n * n)
    expected = epochs / n
    statistic = ((table - expected) ** 2).sum() / expected * (n - 1) / n
    # Both ends: a table that is too even is not random either.
    assert P_LEAST < stats.chi2.sf(statistic, (n - 1) ** 2) < 1 - P_LEAST


@pytest.mark.parametrize("n", [54, 100])
@pytest.mark.parametrize("apart", ["neighbours", "one row apart"])
def test_pairs_of_positions_take_all_pairs_of_values_equally_often(n: int, apart: str) -> None:
    """Positions that share one half of the Feistel network are where too few rounds show."""
    epochs = 50 * n * (n - 1)
    second = 1 if apart == "neighbours" else math.isqrt(n - 1) + 1
    epoch = np.arange(epochs)
    key = order_key(0, 2, n)
    first_value = permute(np.zeros_like(epoch), n, epoch, key)
    second_value = permute(np.full_like(epoch, second), n, epoch, key)
    counts = np.bincount(first_value * n + second_value, minlength=n * n).reshape(n, n)
    assert not counts.diagonal().any()
    off = counts[~np.eye(n, dtype=bool)]
    assert P_LEAST < stats.chisquare(off).pvalue < 1 - P_LEAST


def test_orders_of_other_seeds_epochs_purposes_and_scans_are_unrelated() -> None:
    """Two independent permutations agree in Poisson(1) places."""
    n = 100
    keys = [order_key(scan, seed, n) for scan in range(4) for seed in range(8)]
    keys += [order_key(0, seed, n, Purpose.SUBSET) for seed in range(8)]
    keys += [order_key(0, 0, other) for other in range(2, 10)]
    assert len(set(keys)) == len(keys)
    drawn = np.concatenate([orders(n, 3, key) for key in keys])
    pairs = list(itertools.combinations(drawn, 2))
    agreements = np.array([(a == b).sum() for a, b in pairs])
    assert agreements.max() < n / 4
    low, high = stats.poisson.interval(1 - P_LEAST, len(pairs))
    assert low <= agreements.sum() <= high


def test_the_epochs_of_two_runs_do_not_meet_shifted() -> None:
    """Keys that differ by what an epoch adds would give one run the orders of the other, an epoch later."""
    low, high = 0x01234567, 0x89ABCDEF
    here = {tuple(order) for order in orders(50, 40, (low, high)).tolist()}
    there = {tuple(order) for order in orders(50, 40, ((low + 0x9E3779B9) % 2**32, high)).tolist()}
    also = {tuple(order) for order in orders(50, 40, (low, (high + 1) % 2**32)).tolist()}
    assert len(here) == len(there) == len(also) == 40
    assert not here & also
    assert len(here & there) < 40


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (1, 64), (3, 64), (54, 64), (63, 64), (64, 64), (100, 7), (101, 64)])
def test_an_epoch_takes_every_sample_once_and_every_batch_is_full(n: int, batch: int) -> None:
    steps = 4 * n  # 4 batch epochs
    drawn = minibatches(n, batch, 0, steps, order_key(0, 0, n))
    assert drawn.shape == (steps, batch)
    epochs = drawn.reshape(-1, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (4 * batch, 1)))
    if n > 10:  # repeats of one order among so few of n! have a probability below 1e-5
        assert len({tuple(order) for order in epochs.tolist()}) == len(epochs)


@pytest.mark.parametrize(("n", "batch"), [(5, 64), (100, 64), (1797, 1)])
def test_batches_do_not_depend_on_how_the_steps_are_sliced(n: int, batch: int) -> None:
    key = order_key(0, 4, n)
    whole = minibatches(n, batch, 0, 60, key)
    for cut in (0, 1, 17, 59, 60):
        parts = [minibatches(n, batch, 0, cut, key), minibatches(n, batch, cut, 60, key)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 1797), (1797, 1797), (900, 1797), (97, 101)])
def test_a_subset_has_distinct_rows(n: int, size: int) -> None:
    rows = subset(0, 0, n, size)
    assert len(rows) == len(set(rows.tolist())) == n
    assert 0 <= rows.min() <= rows.max() < size


def test_every_row_is_equally_often_in_a_subset() -> None:
    """Counts of draws without replacement: variance K p (1 - p), one linear constraint."""
    draws, n, size = 1500, 7, 23
    counts = np.bincount(np.concatenate([subset(0, seed, n, size) for seed in range(draws)]), minlength=size)
    share = n / size
    statistic = ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (size - 1) / size
    assert P_LEAST < stats.chi2.sf(statistic, size - 1) < 1 - P_LEAST


def test_a_generator_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    base = (0, 1, 50, Purpose.WEIGHTS)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = generator(*base).standard_normal(1000)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(99)  # noqa: NPY002
    assert np.array_equal(first, generator(*base).standard_normal(1000))
    streams = [first]
    for place, other in enumerate((1, 2, 51, Purpose.INPUTS)):
        key = list(base)
        key[place] = other
        streams.append(generator(*key).standard_normal(1000))
    # The same numbers in other places must not give the same stream.
    streams.append(generator(1, 0, 50, Purpose.WEIGHTS).standard_normal(1000))
    correlation = np.corrcoef(streams)[np.triu_indices(len(streams), 1)]
    assert np.abs(correlation).max() * math.sqrt(1000) < stats.norm.isf(P_LEAST / 2 / len(correlation))
