"""What is done with a fitted run before it leaves its slot: accuracy on held-out samples, and its weights if wanted."""

import numpy as np
import torch

from fasttrain.backends.base import Run, Setting
from fasttrain.data import test_set
from fasttrain.kernels.reference import strictly_right
from fasttrain.models import build, input_shape
from fasttrain.spec import Variant

_ROWS = 1024  # samples of a pass


class Keeper:
    """Looks at the parameters of runs that have ended.

    Args:
        setting: what all runs share.
        save_weights: whether the parameters of fitted runs are to be kept.
        save_failed: whether those of the others are to be kept.
    """

    def __init__(self, setting: Setting, save_weights: bool, save_failed: bool = False) -> None:
        self._setting = setting
        self.save_weights = save_weights
        self.save_failed = save_failed
        self._tests: dict[tuple[str, str, int], tuple[torch.Tensor, torch.Tensor] | None] = {}

    def wanted(self, run: Run) -> bool:
        """Whether the parameters of a run matter once it has fitted."""
        return self.save_weights or self._test(run.problem.variant) is not None

    def accuracy(self, run: Run, parameters: dict[str, np.ndarray]) -> float:
        """Share of the held-out samples whose label's logit is larger than every other; NaN where there are none."""
        variant = run.problem.variant
        test = self._test(variant)
        if test is None:
            return float("nan")
        setting, (x, y) = self._setting, test
        model = build(variant, setting.in_shape).to(setting.device, setting.dtype).eval()
        model.load_state_dict({name: torch.as_tensor(value) for name, value in parameters.items()}, strict=False)
        right = 0
        with torch.no_grad():
            for start in range(0, len(y), _ROWS):
                labels = torch.nn.functional.one_hot(y[start : start + _ROWS], variant.classes)
                some = x[start : start + _ROWS].view(-1, *input_shape(variant, setting.in_shape))
                right += int(strictly_right(model(some), labels).sum())
        return right / len(y)

    def _test(self, variant: Variant) -> tuple[torch.Tensor, torch.Tensor] | None:
        # The share of corrupted labels changes nothing in what is held out.
        key = (variant.labels.partition(":")[0], variant.inputs, variant.classes)
        if key not in self._tests:
            found = test_set(self._setting.spec, variant.labels, variant.inputs, variant.classes)
            device, dtype = self._setting.device, self._setting.dtype
            self._tests[key] = found and (
                torch.as_tensor(found[0]).to(device, dtype),
                torch.as_tensor(found[1], device=device),
            )
        return self._tests[key]
