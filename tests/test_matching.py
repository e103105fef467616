"""Widths of equal parameter counts: against all widths tried one by one, for families that rise and that do not."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.models import parameter_count
from fasttrain.models.matching import GAP, SCANNED, matched
from fasttrain.spec import default_heads

SHAPE = (1, 8, 8)


def match(arch, widths, **fields):
    spec = ScanSpec(arch=arch, widths=widths, match_params=True, **fields)
    return matched(spec.variants(10), SHAPE, spec.heads)


def alternatives(reference, arch, widths, heads=None) -> dict[int, int]:
    """The counts of a family at all of some widths that can be built."""
    out = {}
    for width in widths:
        own = (heads or default_heads(width)) if arch == "vit" else 0
        try:
            one = dataclasses.replace(reference, arch=arch, width=width, heads=own)
            out[width] = parameter_count(one, SHAPE)
        except UserError:
            pass
    return out


def near(counts) -> bool:
    return max(counts) <= 1.05 * min(counts)


def best(target: int, families: list[dict[int, int]]) -> tuple[int, float]:
    """How many families can be taken together, and how far they are then: every choice of widths tried."""
    close = [[None, *(c for c in counts.values() if near((c, target)))] for counts in families]
    scores = []
    for choice in itertools.product(*close):
        taken = [c for c in choice if c is not None]
        if near([target, *taken]):
            scores.append((-len(taken), sum(abs(np.log(c / target)) for c in taken)))
    least = min(scores)
    return -least[0], least[1]


@pytest.mark.parametrize("depth", [1, 2])
def test_as_many_families_as_can_be_are_matched_and_the_nearest(depth):
    widths = (10, 16, 25, 32, 40, 64)
    found, missing = match("mlp,cnn,vit", widths, depths=depth, heads=2)
    references = [v for v in found if v.arch == "mlp"]
    assert tuple(v.width for v in references) == widths
    assert len(found) + len(missing) == 3 * len(widths)
    assert missing
    for reference in references:
        target = parameter_count(reference, SHAPE)
        families = [
            alternatives(reference, "cnn", range(1, 300)),
            alternatives(reference, "vit", range(2, 300, 2), heads=2),
        ]
        count, away = best(target, families)
        mine = [
            parameter_count(v, SHAPE)
            for v in found
            if v.arch != "mlp" and near((parameter_count(v, SHAPE), target)) and v.depth == reference.depth
        ]
        assert len(mine) == count
        assert near([target, *mine])
        assert sum(abs(np.log(c / target)) for c in mine) == pytest.approx(away, abs=1e-12)
        assert sum(f"of width {reference.width} with {target} parameters" in line for line in missing) == 2 - count


class _Sized(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.p = torch.nn.Parameter(torch.empty(size))


def table(counts: dict[int, int], asked: list[int] | None = None):
    """A factory with these counts by width, which refuses all other widths."""

    def made(width, depth, in_shape, classes):
        if asked is not None:
            asked.append(width)
        if width not in counts:
            raise ValueError(f"no width {width}")
        return _Sized(counts[width])

    return made


def of_tables(target: int, *families: dict[int, int]) -> tuple[list[int], list[str]]:
    """Counts of what was matched, and the lines on the rest."""
    found, missing = match([table({1: target}), *map(table, families)], 1)
    return [parameter_count(v, SHAPE) for v in found[1:]], missing


@pytest.mark.parametrize("seed", range(8))
def test_rising_counts_with_gaps_give_the_nearest_of_all_widths(seed):
    rng = np.random.default_rng(seed)
    gaps = rng.integers(1, GAP + 1, 60) if seed % 2 else rng.integers(1, 4, 300)
    widths = np.cumsum(gaps).tolist()
    counts = dict(zip(widths, (10 + np.cumsum(rng.integers(0, 9, len(widths)) ** 2)).tolist(), strict=True))
    for target in rng.integers(1, 2 * max(counts.values()), 10).tolist():
        count, away = best(target, [counts])
        mine, missing = of_tables(target, counts)
        assert (len(mine), len(missing)) == (count, 1 - count)
        assert sum(abs(np.log(c / target)) for c in mine) == pytest.approx(away, abs=1e-12)
        nearest = min(counts.values(), key=lambda c: abs(np.log(c / target)))
        assert all(line.endswith(f"has {nearest}") for line in missing)


@pytest.mark.parametrize("seed", range(8))
def test_counts_in_any_order_are_matched_within_the_range_that_is_scanned(seed):
    rng = np.random.default_rng(seed)
    widths = rng.permutation(np.arange(1, SCANNED + 1))[: rng.integers(1, 60)]
    counts = {int(w): int(c) for w, c in zip(widths, np.exp(rng.uniform(3, 12, len(widths))), strict=True)}
    for target in [*(int(1.04 * c) for c in list(counts.values())[:5]), *np.exp(rng.uniform(3, 12, 3)).astype(int)]:
        expected, _ = best(int(target), [counts])
        mine, missing = of_tables(int(target), counts)
        assert (len(mine), len(missing)) == (expected, 1 - expected)


def test_families_are_chosen_together():
    """104 is nearer to 100 than 95.5 is, but leaves the other family out."""
    assert of_tables(100, {1: 96, 2: 103}, {1: 97}) == ([96, 97], [])
    mine, (line,) = of_tables(100, {1: 103}, {1: 97})
    assert mine == [103]
    assert "with 100 parameters and the others; the nearest, 1, has 97" in line


@pytest.mark.parametrize(
    ("name", "widths"), [("even_only", range(1, 300)), ("hundreds", range(1, 2000)), ("grouped", range(1, SCANNED + 1))]
)
def test_ones_own_family_is_matched_past_the_widths_that_it_refuses_or_falls_at(name, widths):
    references = (16, 100, 260)
    found, missing = match(f"mlp,my_models:{name}", references)
    assert len(found) + len(missing) == 2 * len(references)
    counts = alternatives(found[0], f"my_models:{name}", widths)
    assert len(counts) < len(widths) or any(b < a for a, b in itertools.pairwise(counts.values()))
    matched_counts = [parameter_count(v, SHAPE) for v in found if v.arch != "mlp"]
    some = 0
    for reference in found[: len(references)]:
        target = parameter_count(reference, SHAPE)
        expected, away = best(target, [counts])
        mine = [c for c in matched_counts if near((c, target))]
        assert len(mine) == expected
        if name != "grouped":
            assert sum(abs(np.log(c / target)) for c in mine) == pytest.approx(away, abs=1e-12)
        some += expected
    assert some


def test_counts_that_fall_are_matched():
    found, missing = match("mlp,my_models:falling", (150, 390))
    assert not missing
    for reference, own in zip(found[:2], found[2:], strict=True):
        assert near([parameter_count(reference, SHAPE), parameter_count(own, SHAPE)])


def test_a_factory_is_called_a_bounded_number_of_times():
    everything = {w: 75 * w for w in range(1, 5000)}
    for counts, most in ((everything, 40), ({2**k: 75 * 2**k for k in range(13)}, 2500), ({}, 400)):
        asked: list[int] = []
        try:
            match(["mlp", table(counts, asked)], (100, 1000))
        except UserError:
            assert not counts
        assert len(asked) <= most
        assert len(set(asked)) == len(asked)


def test_what_no_width_can_be_built_of_is_an_error():
    for arch, said in (
        ("my_models:failing", "raised for width 1, depth 1: RuntimeError: width 1 is not for me"),
        ("my_models:no_parameters", "has no parameters to train"),
        ("my_models:lazy", "has no shape yet"),
        ("my_models:missing", "cannot be imported"),
        ("my_models:NUMBER", "is not a function"),
    ):
        for archs in (f"mlp,{arch}", f"{arch},mlp"):
            with pytest.raises(UserError) as caught:
                match(archs, 8)
            assert (caught.value.option, caught.value.value) == ("arch", arch)
            assert said.replace("width 1", "width 8" if archs == f"{arch},mlp" else "width 1") in caught.value.expected


def test_what_has_no_match_is_said_and_left_out(tmp_path):
    fields = {"arch": "mlp,vit", "match_params": True, "widths": 16, "steps": 50, "max_probes": 2, "n_max": 6}
    with pytest.warns(UserWarning, match="left out: no width of vit at depth 1 matches mlp of width 16 with 1210"):
        results = fasttrain.scan(ScanSpec(**fields), out=tmp_path / "m.h5")
    assert list(results.curves["arch"]) == ["mlp"]
    assert "no width of vit" in results.attrs["unmatched"]
    with pytest.raises(UserError, match="linear without hidden layers has no width"):
        fasttrain.scan(ScanSpec(**{**fields, "arch": "mlp,linear"}))


def test_ones_own_family_may_come_first():
    """It has no activation of the spec's, so that each of the others' stands beside it."""
    found, missing = match("my_models:residual,mlp,cnn", 40, activation="relu,tanh")
    assert not missing
    assert [(v.arch, v.activation) for v in found] == [
        ("my_models:residual", "none"), ("mlp", "relu"), ("mlp", "tanh"), ("cnn", "relu"), ("cnn", "tanh")
    ]  # fmt: skip
    assert near([parameter_count(v, SHAPE) for v in found])
