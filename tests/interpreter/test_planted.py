"""Faults put into the kernels on purpose: the comparisons of this folder must notice each."""

import numpy as np
import pytest
from planted import plant
from ragged import Ragged

from fasttrain.kernels import fused

FAULTS = {
    "a_mask_dropped": ("tl.sum(tl.where(inside, z, 0.0) * 0, 1)", "tl.sum(z * 0, 1)"),
    "one_sample_too_many": ("        valid = b < batch\n", "        valid = b < batch + 1\n"),
    "a_round_too_few": ("while r < rounds:", "while r < rounds - 2:"),
    "epsilon_a_hundredfold": ("* root + 1e-8", "* root + 1e-6"),
    "a_layer_left_out": ("while layer > 0:", "while layer > 1:"),
}


def walk(steps: int = 3) -> list[np.ndarray]:
    """Parameters and losses of a ragged bench in whole steps, and of a wide head in stages."""
    found = []
    for fields in (
        {"widths": (3, 13), "whole": True, "depth": 2, "batch": 70, "activation": "sigmoid", "optimizer": "adam"},
        {"widths": (3, 13), "whole": False, "depth": 1, "classes": 70, "activation": "sigmoid", "optimizer": "adam"},
    ):
        widths = fields.pop("widths")
        bench = Ragged(widths, (40, 100), **fields)
        bench.poison()
        bench.models.run(steps)
        found += [
            np.append(bench.parameters(k), [column[k] for column in bench.models.last_step()])
            for k in range(len(widths))
        ]
    return found


@pytest.fixture(scope="module")
def sound() -> list[np.ndarray]:
    return walk()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name, sound, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "drivers", plant(tmp_path, name, *FAULTS[name]))
    differ = [not np.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(walk(), sound, strict=True)]
    assert any(differ)


def test_the_sound_kernels_in_a_copy_are_not(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "drivers", plant(tmp_path, "sound", "while r < rounds:", "while r < rounds:"))
    for a, b in zip(walk(), sound, strict=True):
        np.testing.assert_array_equal(a, b)
