import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from fasttrain import ScanSpec, UserError
from fasttrain.spec import Variant, budget_steps, budget_text, parse_integers, read_toml

BAD = [
    ("arch", "rnn", "mlp, linear, cnn, vit"),
    ("arch", "mlp,rnn", "package.module:factory"),
    ("arch", [3], "mlp"),
    ("arch", "", "mlp"),
    ("arch", (), "at least one"),
    ("arch", "a b:c", "mlp"),
    ("scaling", "zip", "product, compound"),
    ("match_params", "yes", "true, false"),
    ("match_params", True, "at least two architectures"),
    ("norm", "layer", "none, batch"),
    ("heads", 0, "at least 1"),
    ("patch", "0", "at least 1"),
    ("inputs", "noise", "real, shuffled, gaussian"),
    ("labels", "corrupted", "corrupted:SHARE"),
    ("labels", "corrupted:0", "between 0 and 1"),
    ("labels", "corrupted:1", "between 0 and 1"),
    ("lr_search", "best", "race, all"),
    ("nesterov", 1, "true, false"),
    ("weight_decay", -1, "at least 0"),
    ("weight_decay", "inf", "at least 0"),
    ("schedule", "step", "constant, cosine, linear"),
    ("warmup", -1, "at least 0"),
    ("warmup", 10_000, "less than steps"),
    ("clip", 0, "above 0"),
    ("label_smoothing", 1, "not including, 1"),
    ("label_smoothing", -0.1, "from 0"),
    ("init_scale", 0, "above 0"),
    ("activation", "reluu", "relu, leaky_relu"),
    ("activation", ("relu", "swish"), "relu, leaky_relu"),
    ("activation", (), "at least one"),
    ("activation", 3, "relu"),
    ("activation", [["relu"]], "relu"),
    ("widths", (), "at least one"),
    ("widths", "", "4,8,16"),
    ("widths", "4,,8", "4,8,16"),
    ("widths", 0, "at least 1"),
    ("widths", "0", "at least 1"),
    ("widths", (4, -1), "at least 1"),
    ("widths", "-4", "4,8,16"),
    ("widths", "8:4", "upwards"),
    ("widths", "4:8:0", "upwards"),
    ("widths", "2^8:2^3", "upwards"),
    ("widths", "2^3:3^8", "4,8,16"),
    ("widths", "4.5", "4,8,16"),
    ("widths", (4.5,), "at least 1"),
    ("widths", "four", "4,8,16"),
    ("widths", True, "at least 1"),
    ("widths", None, "at least 1"),
    ("widths", [[4]], "at least 1"),
    ("widths", math.inf, "at least 1"),
    ("widths", "1:999999999", "100000 values"),
    ("widths", 10**19, "10^18"),
    ("widths", "9^99", "10^18"),
    ("depths", -1, "at least 0"),
    ("depths", (), "at least one"),
    ("depths", "2:1", "upwards"),
    ("data", "", "digits"),
    ("data", 3, "digits"),
    ("labels", "fake", "random, true"),
    ("classes", 1, "at least 2"),
    ("classes", "1,10", "at least 2"),
    ("classes", (), "at least one"),
    ("optimizer", "lion", "sgd, adam"),
    ("lr", 0, "above 0"),
    ("lr", -0.1, "above 0"),
    ("lr", math.nan, "above 0"),
    ("lr", "nan", "above 0"),
    ("lr", math.inf, "above 0"),
    ("lr", "1e999", "above 0"),
    ("lr", 10**400, "above 0"),
    ("lr", "fast", "above 0"),
    ("lr", "", "above 0"),
    ("lr", True, "above 0"),
    ("lr", None, "above 0"),
    ("lr", (0.1, 0.0), "above 0"),
    ("lr", [[0.1]], "above 0"),
    ("momentum", 1, "not including, 1"),
    ("momentum", -0.1, "from 0"),
    ("momentum", False, "from 0"),
    ("momentum", "nan", "from 0"),
    ("batch_size", "0", "full"),
    ("batch_size", -1, "full"),
    ("batch_size", "half", "full"),
    ("batch_size", False, "full"),
    ("steps", 0, "at least 1"),
    ("steps", "many", "at least 1"),
    ("steps", np.array([1, 2]), "at least 1"),
    ("budget", "300", "and its unit, such as 300epochs"),
    ("budget", 300, "300epochs"),
    ("budget", "", "300epochs"),
    ("budget", "epochs", "300epochs"),
    ("budget", "0epochs", "300epochs"),
    ("budget", "-3epochs", "300epochs"),
    ("budget", "0.5epochs", "whole number"),
    ("budget", "1e-3samples", "whole number"),
    ("budget", "300hours", "300epochs"),
    ("budget", "300epochs,400epochs", "300epochs"),
    ("budget", "1e9999samples", "300epochs"),
    ("budget", "2e9epochs", "at most 1,000,000,000 epochs"),
    ("budget", "1e19samples", "at most"),
    ("budget", "1e19steps", "at most"),
    ("check_every", 0, "at least 1"),
    ("early_stop", "no", "true, false"),
    ("seeds", 0, "at least 1"),
    ("n_min", 0, "at least 1"),
    ("n_max", 1, "at least 2"),
    ("n_max", "1", "at least 2"),
    ("interval", 0, "between 0 and 1"),
    ("interval", 1, "between 0 and 1"),
    ("interval", 90, "between 0 and 1"),
    ("tolerance", 0, "above 0"),
    ("tolerance", "inf", "above 0"),
    ("max_probes", 0, "at least 1"),
    ("search", "random", "adaptive, paper, grid"),
    ("search", "grid", "needs --n"),
    ("growth", 1, "above 1"),
    ("growth", "inf", "above 1"),
    ("n", "5,9", "goes with --search grid only"),
    ("seed", -1, "at least 0"),
    ("seed", 1.5, "at least 0"),
    ("device", "gpu", "cuda:N"),
    ("device", "cuda:", "cuda:N"),
    ("device", None, "cuda:N"),
    ("backend", "cuda-graph", "loop, vmap"),
    ("precision", "float16", "float32, float64"),
]


@pytest.mark.parametrize(("field", "value", "accepted"), BAD)
def test_bad_value_names_the_field_the_value_and_what_is_accepted(field, value, accepted):
    with pytest.raises(UserError) as caught:
        ScanSpec(**{field: value})
    assert caught.value.option == field
    assert accepted in caught.value.expected
    line = caught.value.as_option()
    assert line.startswith(f"--{field.replace('_', '-')} ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("widths", (4, -1), "-1"),
        ("widths", "4,8:6", "8:6"),
        ("lr", (0.1, math.nan), "nan"),
        ("classes", 1, "1"),
    ],
)
def test_the_value_named_is_the_item_at_fault(field, value, shown):
    with pytest.raises(UserError) as caught:
        ScanSpec(**{field: value})
    assert str(caught.value.value) == shown


def test_n_min_must_lie_below_n_max():
    with pytest.raises(UserError, match="less than n-max, which is 50") as caught:
        ScanSpec(n_min=50, n_max=50)
    assert caught.value.option == "n_min"
    assert ScanSpec(n_min=49, n_max=50).n_min == 49


def test_shapes_and_architectures_must_go_together():
    for fields, option, said in (
        ({"scaling": "compound", "widths": (4, 8), "depths": 1}, "depths", "pairs them with 2 widths"),
        ({"arch": "mlp,cnn", "depths": (0, 1)}, "depths", "cnn has at least one block"),
        ({"arch": "vit", "widths": (4, 6), "heads": 4}, "heads", "does not divide the width 6"),
        ({"nesterov": True, "momentum": 0}, "nesterov", "momentum above 0"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            ScanSpec(**fields)
        assert caught.value.option == option


def test_compound_scaling_pairs_widths_and_depths():
    spec = ScanSpec(arch="mlp,vit", widths=(4, 6, 12), depths=(1, 2, 3), scaling="compound")
    shapes = [(v.arch, v.width, v.depth, v.heads) for v in spec.variants(10)]
    assert shapes == [
        ("mlp", 4, 1, 0), ("mlp", 6, 2, 0), ("mlp", 12, 3, 0), ("vit", 4, 1, 4), ("vit", 6, 2, 2), ("vit", 12, 3, 4),
    ]  # fmt: skip


def test_a_variant_has_only_what_means_something_to_it():
    fields = {"optimizer": "sgd,adam", "nesterov": True, "norm": "batch", "heads": 1, "patch": 2, "widths": 4}
    of = {(v.arch, v.optimizer): v for v in ScanSpec(arch="mlp,linear,cnn,vit,a:b", **fields).variants(10)}
    assert of["mlp", "adam"].momentum == 0
    assert not of["mlp", "adam"].nesterov
    assert of["mlp", "sgd"].nesterov
    assert {key: v.norm for key, v in of.items() if v.norm != "none"} == dict.fromkeys(
        [("cnn", "sgd"), ("cnn", "adam")], "batch"
    )
    assert {arch for (arch, _), v in of.items() if v.heads or v.patch} == {"vit"}
    assert (of["linear", "sgd"].width, of["linear", "sgd"].depth) == (0, 0)
    assert {v.activation for v in of.values()} == {"relu", "none"}


def test_a_product_too_large_to_list_is_refused_before_it_is_made():
    with pytest.raises(UserError, match="span 2500000000 variants") as caught:
        ScanSpec(widths="1:50000", depths="1:50000")
    assert caught.value.option in ("widths", "depths")
    assert len(ScanSpec(widths="1:1000", depths="1:100").variants(10)) == 100_000


def test_defaults_are_those_of_the_issue():
    spec = ScanSpec()
    assert dataclasses.asdict(spec) == {
        "arch": ("mlp",),
        "widths": (4, 8, 16, 24),
        "depths": (1,),
        "scaling": "product",
        "match_params": False,
        "activation": ("relu",),
        "norm": "none",
        "heads": None,
        "patch": None,
        "data": "digits",
        "inputs": ("real",),
        "labels": ("random",),
        "classes": None,
        "optimizer": ("adam",),
        "lr": (0.01,),
        "lr_search": "race",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": (0.0,),
        "schedule": ("constant",),
        "warmup": 0,
        "clip": None,
        "label_smoothing": 0.0,
        "init_scale": 1.0,
        "batch_size": (64,),
        "steps": 10_000,
        "budget": None,
        "check_every": 100,
        "early_stop": True,
        "elasticity": True,
        "search": "adaptive",
        "growth": 1.1,
        "n": None,
        "seeds": 16,
        "n_min": None,
        "n_max": None,
        "interval": 0.9,
        "tolerance": 0.1,
        "max_probes": 96,
        "seed": 0,
        "device": "auto",
        "backend": "auto",
        "precision": "auto",
    }


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("widths", 4, (4,)),
        ("widths", "4,8:12:2", (4, 8, 10, 12)),
        ("widths", ["2^3:2^5", 7], (8, 16, 32, 7)),
        ("widths", np.array([4, 8]), (4, 8)),
        ("widths", range(1, 4), (1, 2, 3)),
        ("widths", [4, 4.0, "4"], (4,)),
        ("depths", "0:2", (0, 1, 2)),
        ("classes", "2,10", (2, 10)),
        ("activation", "relu, tanh", ("relu", "tanh")),
        ("arch", "mlp,cnn,my.models:make", ("mlp", "cnn", "my.models:make")),
        ("labels", "corrupted:0.50,true", ("corrupted:0.5", "true")),
        ("nesterov", "true", True),
        ("weight_decay", "0,1e-3", (0.0, 0.001)),
        ("clip", 1, 1.0),
        ("labels", "random,true,random", ("random", "true")),
        ("lr", "0.1,1e-3", (0.1, 0.001)),
        ("lr", "0.1,0.10", (0.1,)),
        ("lr", 1, (1.0,)),
        ("momentum", "0", 0.0),
        ("momentum", 0, 0.0),
        ("momentum", "0.5", 0.5),
        ("batch_size", "full", (0,)),
        ("batch_size", "32,full,64", (32, 0, 64)),
        ("batch_size", 0, (0,)),
        ("steps", "500", 500),
        ("n_max", "100", 100),
        ("seed", np.int64(7), 7),
        ("interval", "0.5", 0.5),
        ("device", "cuda:1", "cuda:1"),
    ],
)
def test_values_are_stored_in_one_form(field, value, stored):
    result = getattr(ScanSpec(**{field: value}), field)
    assert result == stored
    assert type(result) is type(stored)
    if isinstance(stored, tuple):
        assert [type(item) for item in result] == [type(item) for item in stored]


def test_minus_zero_momentum_is_zero():
    assert math.copysign(1.0, ScanSpec(momentum=-0.0).momentum) == 1.0


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("4", (4,)),
        ("4,8, 16", (4, 8, 16)),
        ("4:8", (4, 5, 6, 7, 8)),
        ("4:16:4", (4, 8, 12, 16)),
        ("4:15:4", (4, 8, 12)),
        ("5:5", (5,)),
        ("2^3:2^8", (8, 16, 32, 64, 128, 256)),
        ("10^2", (100,)),
        ("0", (0,)),
        ("1,2:3,2^2:2^3", (1, 2, 3, 4, 8)),
    ],
)
def test_parse_integers(text, numbers):
    assert parse_integers("widths", text) == numbers


@pytest.mark.parametrize(
    "text",
    ["", ",", "4,", "a", "4:", ":4", "4:8:2:2", "-1", "1e3", "4-8", "2^3:8", "2^", "4:8:-1", "9" * 19, "8:4"],
)
def test_parse_integers_refuses(text):
    with pytest.raises(UserError) as caught:
        parse_integers("depths", text)
    assert caught.value.option == "depths"
    assert "2^3:2^8" in caught.value.expected
    assert str(caught.value.value).strip()


def test_parse_integers_refuses_a_huge_range_at_once():
    with pytest.raises(UserError, match="more than 100000 values"):
        parse_integers("widths", f"1:{10**17}")
    assert len(parse_integers("widths", "1:100000")) == 100_000


def test_variants_are_the_product_in_order():
    spec = ScanSpec(widths=(4, 8), depths=(1, 2), optimizer=("sgd", "adam"), lr=(0.1, 0.01), momentum=0.5)
    variants = spec.variants(10)
    assert len(variants) == len(set(variants)) == 16
    assert [(v.depth, v.width) for v in variants[::4]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert [(v.optimizer, v.lr) for v in variants[:4]] == [
        ("sgd", 0.1),
        ("sgd", 0.01),
        ("adam", 0.1),
        ("adam", 0.01),
    ]
    assert {v.momentum for v in variants if v.optimizer == "sgd"} == {0.5}
    assert {v.momentum for v in variants if v.optimizer == "adam"} == {0.0}


def test_depth_zero_makes_one_variant_without_width_and_activation():
    spec = ScanSpec(widths=(4, 8), depths=(0, 1), activation=("relu", "tanh"))
    linear = [variant for variant in spec.variants(10) if variant.depth == 0]
    assert [(v.width, v.activation) for v in linear] == [(0, "none")]
    assert len(spec.variants(10)) == 1 + 2 * 2


def test_classes_come_from_the_data_set_unless_given():
    assert {v.classes for v in ScanSpec().variants(7)} == {7}
    assert [v.classes for v in ScanSpec(widths=4, classes=(2, 3)).variants(7)] == [2, 3]


def test_every_setting_of_a_variant_comes_from_the_spec():
    spec = ScanSpec(widths=5, depths=3, activation="gelu", labels="true", optimizer="sgd", lr=0.5, batch_size="full")
    assert spec.variants(4) == (
        Variant(
            arch="mlp",
            width=5,
            depth=3,
            activation="gelu",
            optimizer="sgd",
            lr=0.5,
            momentum=0.9,
            batch_size=0,
            labels="true",
            classes=4,
        ),
    )


FULL = ScanSpec(
    arch="vit,mlp",
    widths="2^2:2^4",
    depths="1,2,3",
    scaling="compound",
    match_params=True,
    norm="batch",
    heads=2,
    patch=4,
    inputs="real,shuffled",
    lr_search="all",
    nesterov=True,
    weight_decay="0,0.1",
    schedule="cosine,linear",
    warmup=9,
    clip=2.5,
    label_smoothing=0.125,
    init_scale=0.5,
    activation="relu,tanh",
    data="gaussian:64",
    labels="random,true",
    classes=(2, 5),
    optimizer="sgd,muon",
    lr=(0.1, 1 / 3),
    momentum=0.25,
    batch_size="32,full",
    steps=777,
    check_every=7,
    early_stop=False,
    elasticity=False,
    search="grid",
    growth=1.5,
    n="30:40:5",
    seeds=3,
    n_min=3,
    n_max=999,
    interval=0.5,
    tolerance=0.03,
    max_probes=11,
    seed=12,
    device="cpu",
    backend="loop",
    precision="float64",
)


EPOCHS = dataclasses.replace(FULL, steps=10_000, budget="9epochs")  # one says the same as the other


@pytest.mark.parametrize("spec", [ScanSpec(), FULL, EPOCHS])
def test_json_gives_an_equal_spec_back(spec):
    again = ScanSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest() == spec.digest()
    assert hash(again) == hash(spec)
    assert set(json.loads(spec.to_json())) == {field.name for field in dataclasses.fields(ScanSpec)}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"width": 4}', '{"widths": [0]}', '{"lr": [NaN]}'])
def test_bad_json_is_a_user_error(text):
    with pytest.raises(UserError):
        ScanSpec.from_json(text)


def test_digest_is_fixed_by_the_values_alone():
    assert ScanSpec(widths="4,8", lr=1).digest() == ScanSpec(widths=[4, 8], lr="1.0").digest()
    assert len(ScanSpec().digest()) == 64


def test_digest_tells_every_field_apart():
    defaults = ScanSpec(arch="mlp,cnn", widths=4)
    together = {"search": {"search": "paper"}, "n": {"search": "grid", "n": FULL.n}}  # neither goes alone
    values = {field.name: getattr(FULL, field.name) for field in dataclasses.fields(ScanSpec)}
    changed = {
        name: dataclasses.replace(defaults, **together.get(name, {name: value}))
        for name, value in {**values, "budget": EPOCHS.budget}.items()
        if value != getattr(defaults, name)
    }
    assert len(changed) == len(dataclasses.fields(ScanSpec))
    assert len({spec.digest() for spec in changed.values()} | {defaults.digest()}) == len(changed) + 1


@pytest.mark.parametrize(
    ("fields", "probes"),
    [
        ({}, 96),
        ({"search": "paper", "seeds": 5}, 500),
        ({"search": "paper", "max_probes": 7}, 7),
        ({"search": "grid", "n": "9,3:4", "seeds": 5}, 15),
    ],
)
def test_probes_of_a_variant_are_limited_by_the_search_unless_they_are_by_the_user(fields, probes):
    spec = ScanSpec(**fields)
    assert spec.max_probes == probes
    assert ScanSpec.from_json(spec.to_json()) == spec


def test_the_n_of_a_grid_are_sorted_whole_and_within_the_bounds():
    assert ScanSpec(search="grid", n=["9", 3, "4:5"], n_min=3, n_max=9).n == (3, 4, 5, 9)
    for fields, value, says in (
        ({"n": "0,5"}, 0, "at least 1"),
        ({"n": 2.5}, 2.5, "at least 1"),
        ({"n": "5,9", "n_max": 8}, 9, "at most n-max, which is 8"),
        ({"n": "5,9", "n_min": 6}, 5, "at least n-min, which is 6"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            ScanSpec(search="grid", **fields)
        assert (caught.value.option, caught.value.value) == ("n", value)


def test_the_n_of_a_grid_are_not_counted_as_variants():
    assert len(ScanSpec(search="grid", n="1:2000", widths="1:100").variants(10)) == 100


def test_learning_rates_race_in_the_adaptive_search_only():
    assert ScanSpec().races
    assert not ScanSpec(lr_search="all").races
    assert not ScanSpec(search="paper").races
    assert not ScanSpec(search="grid", n=5).races


@pytest.mark.parametrize(
    ("text", "steps", "kept"),
    [
        ("500steps", 500, None),
        ("1 step", 1, None),
        ("1e4steps", 10_000, None),
        ("300epochs", 10_000, "300epochs"),
        (" 1  epoch ", 10_000, "1epochs"),
        ("1e6samples", 10_000, "1000000samples"),
        ("1.5E+6 samples", 10_000, "1500000samples"),
        ("1000000000000000000samples", 10_000, "1000000000000000000samples"),
    ],
)
def test_a_budget_has_one_text_and_steps_are_steps(text, steps, kept):
    spec = ScanSpec(budget=text)
    assert (spec.steps, spec.budget) == (steps, kept)
    assert budget_text(spec) == (kept or f"{steps}steps")
    for same in (ScanSpec(budget=kept or f"{steps} steps"), ScanSpec(budget=kept, steps=steps)):
        assert same == spec
        assert same.digest() == spec.digest()


@pytest.mark.parametrize(
    "give",
    [
        lambda **fields: ScanSpec(**fields),
        lambda **fields: ScanSpec.from_mapping(fields),
        lambda **fields: ScanSpec.from_json(json.dumps(fields)),
    ],
)
def test_steps_and_a_budget_are_one_too_many(give):
    for budget in ("300epochs", "77steps"):
        with pytest.raises(UserError, match="steps=500 is given too; expected one of the two") as caught:
            give(steps=500, budget=budget)
        assert (caught.value.option, caught.value.value) == ("budget", budget)
    assert give(steps=500, budget=None) == ScanSpec(steps=500)


def test_a_mapping_may_not_give_both_though_one_is_the_default(tmp_path):
    path = tmp_path / "scan.toml"
    path.write_text('steps = 10000\nbudget = "300epochs"\n')
    with pytest.raises(UserError, match="300epochs: steps=10000 is given too") as caught:
        read_toml(path)
    assert caught.value.option == "spec"
    with pytest.raises(UserError, match="steps=10000 is given too"):
        ScanSpec.from_mapping({"steps": 10_000, "budget": "300epochs"})


@pytest.mark.parametrize(
    ("budget", "batch", "n", "steps"),
    [
        ("1000steps", 64, 7, 1000),
        ("1000steps", "full", 7, 1000),
        ("300epochs", "full", 7, 300),
        ("300epochs", 64, 64, 300),
        ("300epochs", 64, 1, 5),  # 4.7
        ("300epochs", 64, 1000, 4688),  # 4687.5
        ("1epochs", 64, 1, 1),
        ("1000samples", 64, 10**6, 16),  # 15.6
        ("640samples", 64, 3, 10),
        ("1000samples", "full", 400, 3),
        ("1000samples", "full", 10**6, 1),
        ("1000000000epochs", 1, 10**9, 10**18),
    ],
)
def test_steps_of_a_budget(budget, batch, n, steps):
    spec = ScanSpec(budget=budget, batch_size=batch, widths=4)
    (variant,) = spec.variants(10)
    assert budget_steps(spec, variant, n) == steps
    third = budget_steps(spec, variant, n, short=True)
    assert third == max(1, round(Fraction(steps, 3)))


def test_full_batch_and_minibatches_compare_at_equal_samples():
    spec = ScanSpec(budget="6400samples", batch_size="64,full", widths=4)
    minibatch, full = spec.variants(10)
    for n in (1, 64, 640, 6400):
        for variant, batch in ((minibatch, 64), (full, n)):
            assert budget_steps(spec, variant, n) * batch == 6400


def test_spec_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ScanSpec().steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        ScanSpec("mlp")  # type: ignore[misc]


def test_toml_fields_take_hyphens_or_underscores(tmp_path):
    path = tmp_path / "scan.toml"
    path.write_text('widths = [4, 8]\nn-max = 100\ncheck_every = 10\nbatch-size = ["full", 32]\nlr = 0.1\n')
    fields = read_toml(path)
    assert fields == {
        "widths": [4, 8],
        "n_max": 100,
        "check_every": 10,
        "batch_size": ["full", 32],
        "lr": 0.1,
    }
    spec = ScanSpec.from_mapping(fields)
    assert (spec.widths, spec.batch_size, spec.lr) == ((4, 8), (0, 32), (0.1,))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"widthz = 4\n", "widthz: no such field; the fields are arch, widths"),
        (b"[scan]\nwidths = 4\n", "scan: no such field"),
        (b"n-max = 3\nn_max = 4\n", "n_max: given twice"),
        (b"widths = \n", "is not TOML"),
        (b"widths 4", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
        (b"seed = " + b"9" * 5000, "is not TOML"),
    ],
)
def test_bad_toml(tmp_path, content, says):
    path = tmp_path / "scan.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_toml(path)
    assert (caught.value.option, caught.value.value) == ("spec", path)
    assert says in caught.value.expected


def test_toml_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_toml(path)
        assert caught.value.option == "spec"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('steps = "many"', "steps"),
        ("widths = [[4]]", "widths"),
        ("widths = {a = 1}", "widths"),
        ("steps = true", "steps"),
        ("seed = 1979-05-27", "seed"),
        ("lr = [0.1, []]", "lr"),
        ("data = 3", "data"),
        ("activation = [1]", "activation"),
        ("arch = {}", "arch"),
    ],
)
def test_a_wrong_type_in_toml_names_its_field(tmp_path, content, field):
    path = tmp_path / "scan.toml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        ScanSpec.from_mapping(read_toml(path))
    assert caught.value.option == field
