import dataclasses
import itertools
import math

import pytest

from fasttrain import ScanSpec, UserError
from fasttrain.data import DataInfo, describe
from fasttrain.ensemble import Layout
from fasttrain.models import parameter_count
from fasttrain.optim import SHAMPOO_LARGEST, make_optimizer
from fasttrain.plan import (
    Trained,
    bucket,
    data_bytes,
    default_n_max,
    make_plan,
    most_steps,
    optimizer_numbers,
    probe_bytes,
)
from fasttrain.records import Problem
from fasttrain.spec import Variant
from fasttrain.stopping import StopRules

GIB = 2**30


def problems(spec: ScanSpec, info: DataInfo | None = None) -> list[Problem]:
    info = info or describe(spec.data)
    out = []
    for index, variant in enumerate(spec.variants(info.classes)):
        params = parameter_count(variant, (info.features,))
        out.append(Problem(index, variant, params, 2, spec.n_max or default_n_max(params, info)))
    return out


def trained(spec: ScanSpec, backend: str = "native") -> list[Trained]:
    return [Trained(problem, backend, bucket(problem.variant)) for problem in problems(spec)]


def needs(item: int = 4, **fields: object) -> int:
    """Bytes of one probe of the only variant of a spec."""
    spec = ScanSpec(**{"widths": 16, **fields})
    (problem,) = problems(spec)
    return probe_bytes(problem, spec, describe(spec.data), item)


def variant() -> Variant:
    (one,) = ScanSpec(widths=16, optimizer="sgd").variants(10)
    return one


SHARED = {
    "lr": 0.5,
    "momentum": 0.1,
    "labels": "true",
    "inputs": "shuffled",
    "init_scale": 0.5,
}
APART = {
    "arch": "other",
    "width": 17,
    "depth": 2,
    "activation": "gelu",
    "optimizer": "adam",
    "batch_size": 65,
    "classes": 9,
    "norm": "batch",
    "heads": 2,
    "patch": 4,
    "nesterov": True,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 5,
    "clip": 1.0,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize("field", SHARED)
def test_what_is_a_vector_over_the_models_shares_a_bucket(field: str) -> None:
    assert bucket(dataclasses.replace(variant(), **{field: SHARED[field]})) == bucket(variant())


@pytest.mark.parametrize("field", APART)
def test_what_changes_the_step_function_does_not(field: str) -> None:
    assert bucket(dataclasses.replace(variant(), **{field: APART[field]})) != bucket(variant())


def test_every_field_of_a_variant_is_in_one_of_the_two_lists_above() -> None:
    assert {field.name for field in dataclasses.fields(Variant)} == {*SHARED, *APART}


def test_whether_there_is_decay_tells_buckets_apart_but_not_how_much() -> None:
    some, more = (dataclasses.replace(variant(), weight_decay=decay) for decay in (1e-4, 0.1))
    assert bucket(some) == bucket(more) != bucket(variant())


@pytest.mark.parametrize("fields", [{"depths": 0}, {"widths": 5, "depths": 3}, {"widths": 1030, "depths": 2}], ids=str)
def test_what_shampoo_takes_is_counted(fields: dict[str, object]) -> None:
    """Its statistics and roots twice, against those that it asks for (which start on multiples of 64 numbers)."""
    spec = ScanSpec(**{"widths": 16, "optimizer": "shampoo", **fields})
    (problem,) = problems(spec)
    sizes = list(itertools.pairwise([64, *[problem.variant.width] * problem.variant.depth, 10]))
    layout = Layout({f"{k}.{s}": (b, a)[: 2 - s] for k, (a, b) in enumerate(sizes) for s in (0, 1)})
    asked = sum(make_optimizer(problem.variant, layout).state_sizes)
    counted = optimizer_numbers(problem.variant, 64, problem.params)
    assert 2 * asked - 2 * 64 * 6 * len(sizes) <= counted <= 2 * asked + 4 * 1024**2
    whole = [size for a, b in sizes for size in (a, b, b) if size <= SHAMPOO_LARGEST]
    diagonal = [size for a, b in sizes for size in (a, b, b) if size > SHAMPOO_LARGEST]
    exact = 2 * (2 * sum(size**2 for size in whole) + sum(diagonal)) + 4 * max(whole) ** 2
    assert counted == exact
    assert needs(**{"optimizer": "shampoo", **fields}) > needs(**{"optimizer": "adam", **fields}) + 4 * asked - 10**5


def test_muon_and_others_are_counted() -> None:
    adam = needs(optimizer="adam", widths=1000)
    assert needs(optimizer="muon", widths=1000) > adam
    for name in ("sgd", "adamw", "rmsprop"):
        assert needs(optimizer=name, widths=1000) == adam


def test_a_bucket_is_a_variant_of_itself() -> None:
    assert bucket(bucket(variant())) == bucket(variant())


def test_n_max_is_the_data_set_or_four_times_the_parameters() -> None:
    assert default_n_max(10**9, describe("digits")) == 1797
    assert default_n_max(1, describe("digits")) == 1797
    assert default_n_max(650, describe("gaussian:64")) == 2600


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"widths": 16}, {"widths": 17}),
        ({"depths": 1}, {"depths": 2}),
        ({"classes": 10}, {"classes": 11}),
        ({"batch_size": 128}, {"batch_size": 256}),
        ({"check_every": 100}, {"check_every": 200}),
        ({"data": "gaussian:64"}, {"data": "gaussian:65"}),
        ({"data": "gaussian:64", "n_max": 100}, {"data": "gaussian:64", "n_max": 101}),
    ],
)
def test_memory_grows_with_everything_that_takes_it(small: dict[str, object], large: dict[str, object]) -> None:
    assert needs(**small) < needs(**large)
    assert needs(item=4, **small) < needs(item=8, **small)


def test_memory_is_at_least_what_a_model_must_hold() -> None:
    """Parameters, gradient and Adam's two moments; a probe's own inputs; the indices of a block."""
    spec = ScanSpec(widths=1000, depths=3)
    (problem,) = problems(spec)
    assert probe_bytes(problem, spec, describe("digits"), 8) >= 4 * 8 * problem.params
    assert needs(item=8, data="gaussian:64", n_max=10**6) >= 8 * 64 * 10**6
    assert needs(batch_size=1000, check_every=1000, steps=1000) >= 8 * 1000 * 1000
    assert needs(steps=10**6, check_every=1) >= 3 * 8 * 10**6  # a loss, a count and the best loss of each check


def test_a_full_batch_is_taken_at_once_on_a_gpu() -> None:
    spec = ScanSpec(widths=16, depths=3, batch_size="full", data="gaussian:64", n_max=10**5)
    (problem,) = problems(spec)
    cpu, cuda = (probe_bytes(problem, spec, describe("gaussian:64"), 4, device) for device in ("cpu", "cuda"))
    assert cuda - cpu >= 4 * 10**5 * 2 * 3 * 16


def test_memory_of_a_wide_model_is_that_of_its_parameters() -> None:
    wide, wider = needs(widths=10_000, depths=2), needs(widths=20_000, depths=2)
    assert 3.9 < wider / wide < 4.0


def test_steps_that_a_probe_cannot_take_need_no_memory() -> None:
    assert needs(steps=100, check_every=10**12) == needs(steps=100, check_every=100)


def test_a_budget_counts_with_the_steps_that_it_may_be() -> None:
    def most(**fields: object) -> int:
        spec = ScanSpec(widths=16, **fields)
        (problem,) = problems(spec)
        return most_steps(problem, spec)

    assert most(steps=777) == 777
    assert most(budget="300epochs") == math.ceil(300 * 1797 / 64)  # at n-max
    assert most(budget="300epochs", batch_size="full") == 300
    assert most(budget="6400samples", batch_size="full") == 3200  # at the smallest n, 2
    assert needs(budget="1000epochs") == needs(steps=math.ceil(1000 * 1797 / 64))
    # 199 steps are 199 checks, and 200 steps are 100.
    for steps in (3, 99, 100, 199, 200, 50_000):
        counted = needs(budget=f"{steps}epochs", batch_size="full") - needs(steps=1, batch_size="full")
        assert counted >= 24 * math.ceil(steps / StopRules.of(ScanSpec(budget=f"{steps}epochs"), full(), 9).check_every)


def full() -> Variant:
    return dataclasses.replace(variant(), batch_size=0)


def test_slots_are_as_many_as_fit() -> None:
    spec = ScanSpec(widths="4,300")
    info, todo = describe("digits"), trained(spec)
    largest = max(probe_bytes(one.problem, spec, info, 4) for one in todo)
    data = data_bytes(todo, info, 4, "cpu")
    assert data > 0
    for fit in (2, 3, 63):
        for spare in (0, largest - 1):
            plan = make_plan(todo, spec, info, device="cpu", item=4, available=data + fit * largest + spare)
            assert (plan.slots, plan.model_bytes, plan.data_bytes) == (fit, largest, data)
            assert plan.memory_bytes == data + fit * largest


@pytest.mark.parametrize(("device", "most"), [("cpu", 64), ("cuda", 1024)])
def test_slots_have_an_upper_end(device: str, most: int) -> None:
    spec = ScanSpec()
    info, todo = describe("digits"), trained(spec)
    assert make_plan(todo, spec, info, device=device, item=4, available=2**50).slots == most


def refused(spec: ScanSpec, available: int = 4 * GIB, item: int = 4) -> UserError:
    info = describe(spec.data)
    with pytest.raises(UserError) as caught:
        make_plan(trained(spec), spec, info, device="cpu", item=item, available=available)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "option", "value"),
    [
        ({"widths": (4, 99_999_999_999, 8)}, "widths", 99_999_999_999),
        ({"widths": 99_999_999_999, "data": "gaussian:64"}, "widths", 99_999_999_999),
        ({"widths": (4, 10**7), "batch_size": "full"}, "widths", 10**7),
        ({"depths": (1, 10**12)}, "depths", 10**12),
        ({"classes": (2, 10**12)}, "classes", 10**12),
        ({"batch_size": (64, 10**9)}, "batch_size", 10**9),
        ({"data": "gaussian:1000000", "widths": 999}, "data", "gaussian:1000000"),
        ({"data": "gaussian:64", "n_max": 10**12}, "n_max", 10**12),
        ({"steps": 10**12, "check_every": 10**11}, "check_every", 10**11),
        ({"steps": 10**12, "check_every": 10**11, "batch_size": 10**3}, "check_every", 10**11),
        ({"steps": 10**9, "check_every": 1}, "check_every", 1),
    ],
)
def test_a_scan_that_does_not_fit_names_what_makes_it_large(
    fields: dict[str, object], option: str, value: object
) -> None:
    error = refused(ScanSpec(**fields))
    assert (error.option, error.value) == (option, value)
    assert "4.0 GiB" in error.expected


def test_two_models_must_fit() -> None:
    spec = ScanSpec(widths=1000)
    info, todo = describe("digits"), trained(spec)
    both = 2 * probe_bytes(todo[0].problem, spec, info, 4) + data_bytes(todo, info, 4, "cpu")
    assert make_plan(todo, spec, info, device="cpu", item=4, available=both).slots == 2
    assert refused(spec, available=both - 1).option == "widths"


def test_the_data_are_named_where_they_leave_no_room() -> None:
    error = refused(ScanSpec(labels="random,true", inputs="real,shuffled"), available=2**20)
    assert (error.option, error.value) == ("data", "digits")
    assert "0.0 GiB are free; expected less data, or fewer of them" in error.expected


def test_the_message_tells_parameters_and_memory() -> None:
    error = refused(ScanSpec(widths=10**9))
    assert f"{75 * 10**9 + 10:,} parameters" in error.expected
    assert "\n" not in str(error)
