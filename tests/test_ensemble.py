import numpy as np
import pytest
import torch

from fasttrain.ensemble import Layout, Stack, capacity, padded_index

SHAPES = {"layers.0.weight": (5, 13), "layers.0.bias": (5,), "layers.1.weight": (2, 5), "layers.1.bias": (2,)}


def test_capacities_are_powers_of_two_and_one_and_a_half_times_them() -> None:
    allowed = sorted([2**k for k in range(1, 12)] + [3 * 2**k for k in range(10)])
    for models in range(1, 2000):
        assert capacity(models) == min(size for size in allowed if size >= models)


def test_pack_and_views_are_a_round_trip_for_every_model() -> None:
    layout = Layout(SHAPES)
    rng = np.random.default_rng(0)
    models = [{name: rng.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(3)]
    rows = torch.as_tensor(np.stack([layout.pack(model) for model in models]))
    views = layout.views(rows)
    assert list(views) == list(SHAPES)
    for e, model in enumerate(models):
        for name, value in model.items():
            assert np.array_equal(views[name][e].numpy(), value)


def test_parameters_start_on_64_elements_do_not_overlap_and_leave_zeros_between() -> None:
    layout = Layout(SHAPES)
    assert layout.offsets == {
        "layers.0.weight": 0,
        "layers.0.bias": 128,
        "layers.1.weight": 192,
        "layers.1.bias": 256,
    }
    assert layout.size == 320
    row = layout.pack({name: np.ones(shape) for name, shape in SHAPES.items()})
    used = {start + k for name, start in layout.offsets.items() for k in range(int(np.prod(SHAPES[name])))}
    assert len(used) == sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert set(np.flatnonzero(row).tolist()) == used


def test_views_share_the_memory_of_the_rows() -> None:
    layout = Layout(SHAPES)
    rows = torch.zeros(2, layout.size)
    for k, view in enumerate(layout.views(rows).values()):
        view[1] = k + 1
    assert not rows[0].any()
    counts = {k + 1: int(np.prod(shape)) for k, shape in enumerate(SHAPES.values())}
    assert {int(v): int((rows[1] == v).sum()) for v in rows[1].unique() if v} == counts


def stack(models: list[int]) -> Stack:
    """Rows that tell which model and which array they are of."""
    ids = torch.tensor(models, dtype=torch.float64)[:, None]
    return Stack(
        params=ids + torch.arange(4) / 10,
        grads=torch.full((len(models), 4), -1.0, dtype=torch.float64),
        optim=[ids + 100 + torch.arange(4) / 10, ids + 200 + torch.arange(4) / 10],
    )


def holds(found: Stack, models: list[int]) -> None:
    """The rows are those of these models, in every array, and no gradient is left over."""
    expected = stack(models)
    assert torch.equal(found.params, expected.params)
    assert len(found.optim) == 2
    for a, b in zip(found.optim, expected.optim, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found.grads, torch.zeros_like(found.params))


@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        ([0], [10, 10]),
        ([3], [13, 13]),
        ([2, 0], [12, 10]),
        ([4, 1, 3], [14, 11, 13]),
        ([0, 1, 2, 3, 4], [10, 11, 12, 13, 14, 10]),
        ([4, 3, 2, 1, 0], [14, 13, 12, 11, 10, 14]),
    ],
)
def test_take_keeps_the_rows_in_order_and_repeats_the_first(keep: list[int], rows: list[int]) -> None:
    holds(stack([10, 11, 12, 13, 14]).take(keep), rows)


def test_take_copies() -> None:
    whole = stack([1, 2])
    part = whole.take([0, 1])
    for tensor in (part.params, *part.optim):
        tensor.zero_()
    assert torch.equal(whole.params, stack([1, 2]).params)
    assert torch.equal(whole.optim[1], stack([1, 2]).optim[1])


def test_join_drops_the_spare_rows_of_both() -> None:
    left, right = stack([1, 2, 3]).take([0, 1, 2, 0, 2]), stack([7, 8]).take([1])
    assert len(left.params) == 6
    holds(left.join(5, right, 1), [1, 2, 3, 1, 3, 8])
    holds(right.join(1, left, 2), [8, 1, 2])
    holds(left.join(5, stack([7, 8]), 2), [1, 2, 3, 1, 3, 7, 8, 1])


def test_a_stack_of_new_models_has_zero_state() -> None:
    rows = stack([4, 5, 6]).params
    new = Stack.of(rows, (4, 9))
    assert torch.equal(new.params, rows)
    assert [tuple(tensor.shape) for tensor in new.optim] == [(3, 4), (3, 9)]
    assert {tensor.dtype for tensor in new.optim} == {rows.dtype}
    assert not any(tensor.any() for tensor in (*new.optim, new.grads))
    assert len({tensor.data_ptr() for tensor in (new.params, new.grads, *new.optim)}) == 4


def test_padded_index_repeats_its_first_position() -> None:
    index = padded_index([5, 3, 4, 9, 1], torch.device("cpu"))
    assert index.tolist() == [5, 3, 4, 9, 1, 5]
    assert index.dtype == torch.int64
    assert padded_index([7], torch.device("cpu")).tolist() == [7, 7]
