"""What of ``python -m benchmarks gpu`` can run without a GPU: the contender that is ours."""

import numpy as np

from benchmarks.gpu import Fused
from benchmarks.work import BLOCK, Case
from fasttrain.backends import make_backend


def test_widths_of_a_class_share_a_state_and_train_as_the_oracle():
    cases = [Case(4, 5, width, models=1) for width in (2, 3)]
    fused = Fused(cases, "float64")
    assert len(fused.states) == 1
    fused(BLOCK)
    assert fused.launches == 1  # so small that a program makes whole steps
    ((_, backend, state),) = fused.states
    for position, case in enumerate(cases):
        setting = case.setting(state.models._dtype, 10**9, "float64")
        loop = make_backend("loop", setting, setting.spec.variants(10)[0])
        oracle = loop.init(case.runs(setting, 1))
        loop.run(oracle, BLOCK)
        own, theirs = backend.parameters(state, position), loop.parameters(oracle, 0)
        for name, value in theirs.items():
            # float32, over 20 steps.
            np.testing.assert_allclose(own[name], value, rtol=1e-4, atol=1e-5)
            assert not np.array_equal(value, 0 * value)
