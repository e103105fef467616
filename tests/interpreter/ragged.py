"""What the interpreter tests share: models of several widths and sizes in one ``Models``, and what its arrays hold."""

import dataclasses
import itertools

import numpy as np
import torch

from fasttrain.kernels import fused
from fasttrain.kernels.configurations import configuration
from fasttrain.sampling import minibatches, order_key

NAN = float("nan")
FEATURES, CLASSES = 7, 5


class Ragged:
    """Models with random weights, data and rates; model k of ``widths`` and ``ns`` is the same in any company."""

    def __init__(self, widths, ns, *, dtype=torch.float64, whole=False, inputs=None, budget=20, check_every=5,
                 plateau_after=10**6, **fields):  # fmt: skip
        self.rules = {"budget": budget, "check_every": check_every, "plateau_after": plateau_after}
        fields = {
            "features": FEATURES, "classes": CLASSES, "depth": 1, "activation": "relu", "optimizer": "sgd",
            "batch": 16, "precision": "ieee", "plateau_ratio": 0.9, "plateau_loss": 0.0, **fields,
        }  # fmt: skip
        self.shape = fused.Shape(**fields)
        self.config = configuration(
            width=max(widths), features=self.shape.features, classes=self.shape.classes, depth=self.shape.depth,
            batch=self.shape.batch, precision=self.shape.precision, target=90,
        )  # fmt: skip
        self.config = dataclasses.replace(self.config, whole=whole)
        self.models = fused.Models(self.shape, self.config, torch.device("cpu"), dtype, inputs)
        self.widths, self.ns = widths, ns
        self.made: list[fused.Model] = []
        for k in range(len(widths)):
            self.made.append(self.model(k))
        self.models.add(self.made)

    def model(self, k: int) -> fused.Model:
        rng = np.random.default_rng([k, 11])
        n, shape = self.ns[k], self.shape
        sizes = [shape.features, *[self.widths[k]] * shape.depth, shape.classes]
        x = rng.standard_normal((n + 3, shape.features))
        return fused.Model(
            width=self.widths[k] if shape.depth else 0,
            inputs=x
            if self.models._pool.tensor.dtype.is_floating_point
            else (50 + 40 * x).clip(0, 255).astype(np.uint8),
            rows=rng.permutation(n + 3)[:n],
            labels=rng.integers(0, shape.classes, n),
            key=order_key(5, k, n),
            rates=(0.02 * (k + 1), 0.9 - 0.1 * k, 0.01 * k),
            weights=[
                (rng.standard_normal((o, i)) / i**0.5, rng.standard_normal(o) / 4) for i, o in itertools.pairwise(sizes)
            ],
            # One number for all models, or one for each.
            **{name: rule if isinstance(rule, int) else rule[k] for name, rule in self.rules.items()},
        )

    def poison(self) -> None:
        """Fills what kernels must write before they read it."""
        self.models._acts.tensor.fill_(NAN)
        self.models._drawn.tensor.fill_(10**6)
        self.models._found.fill_(NAN)
        self.models._check_losses.fill_(NAN)

    def batch(self, position: int, step: int) -> np.ndarray:
        """Sample indices of a step, as every other backend draws them."""
        model = self.made[position]
        if not self.shape.batch:
            return np.arange(len(model.rows))
        return minibatches(len(model.rows), self.shape.batch, step, step + 1, model.key)[0]

    def inputs(self, position: int, samples: np.ndarray) -> torch.Tensor:
        model = self.made[position]
        return torch.as_tensor(model.inputs[model.rows[samples]]).to(self.models._dtype)

    def acts(self, position: int, kind: int, layer: int = 0) -> torch.Tensor:
        """A block of a model's activations [room, pitch]: kind 0 outputs, 1 gradients, 2 slopes, -1 of the logits."""
        place = self.models._place(self.models._order[position])
        at, size = place.acts
        flat = self.models._acts.tensor[at : at + size]
        if kind < 0:
            return flat[-place.room * fused.pitch(self.shape.classes) :].view(place.room, -1)
        block = place.room * fused.pitch(place.width)
        return flat[(kind * self.shape.depth + layer) * block :][:block].view(place.room, -1)

    def weights(self, position: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.as_tensor(w), torch.as_tensor(b)) for w, b in self.models.weights(position)]

    def parameters(self, position: int) -> np.ndarray:
        return np.concatenate([np.concatenate([w.ravel(), b]) for w, b in self.models.weights(position)])


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float64, terms: int = 64) -> None:
    """Equal to what rounding a sum of so many terms allows, on the scale of the largest: derived, not chosen.

    A sum of K products is off by at most K units of rounding times the sum of their magnitudes; 8 more for what is done
    with it elementwise.
    """
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    unit = torch.finfo(dtype).eps / 2
    scale = expected.abs().max().clamp(min=1.0)
    worst = (found.double() - expected.double()).abs().max()
    assert worst <= (terms + 8) * unit * scale, f"{worst / (unit * scale):.1f} units"
