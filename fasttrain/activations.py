"""The activation functions, in one place for every model and backend.

Adding one is a line here. Nothing in this module imports torch, so that a spec can be checked without it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise activation and the weight scale that suits it.

    Attributes:
        module: name of its class in ``torch.nn`` (built without arguments).
        gain: initial weights are drawn from N(0, gain^2 / fan_in). sqrt(2) is He et al. (2015), eq. 10, used for
            the ReLU-like ones; 1 is LeCun et al. (1998), used for the others.
        exact: whether each element takes at most one rounding. The others are approximated, on a CPU in one way in
            the vectors of an array and in another way in its tail, which the batched backends must allow for.
    """

    module: str
    gain: float
    exact: bool = False


_HE = 2.0**0.5

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation("ReLU", _HE, exact=True),
    "leaky_relu": Activation("LeakyReLU", _HE, exact=True),
    "gelu": Activation("GELU", _HE),
    "silu": Activation("SiLU", _HE),
    "tanh": Activation("Tanh", 1.0),
    "sigmoid": Activation("Sigmoid", 1.0),
    "identity": Activation("Identity", 1.0, exact=True),
}
