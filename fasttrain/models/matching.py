"""Widths at which other architectures have the parameter count of a given one."""

import dataclasses
import math
from collections.abc import Sequence

from fasttrain.errors import UserError
from fasttrain.models import parameter_count
from fasttrain.spec import Variant, default_heads

TOLERANCE = 0.05
"""Relative difference of the smallest and the largest of matching parameter counts."""
_MOST_WIDTH = 2**20


def matched(
    variants: Sequence[Variant], in_shape: tuple[int, ...], heads: int | None = None
) -> tuple[list[Variant], list[str]]:
    """The variants of the first architecture as they are, the others at the widths that match them.

    Args:
        variants: of several architectures; the widths of the first one's are the ones to match.
        in_shape: of a sample.
        heads: attention heads that the spec asks for, which divide every width of vit.

    Returns:
        The variants, all of one reference within 5 % of each other, and a line for each that has no such width; it is
        left out.

    Raises:
        UserError: an architecture has no width.
    """
    first = variants[0].arch
    references = [v for v in variants if v.arch == first]
    families = list(dict.fromkeys(v.arch for v in variants if v.arch != first))
    for arch in (first, *families):
        if any(v.width == 0 for v in variants if v.arch == arch):
            raise UserError("match_params", "true", f"{arch} without hidden layers has no width to match")
    out, missing = list(references), []
    for reference in references:
        target = parameter_count(reference, in_shape)
        counts = [target]
        for arch in families:
            other = next(v for v in variants if v.arch == arch and _alike(v, reference))
            found = _nearest(other, target, in_shape, heads)
            count = parameter_count(found, in_shape)
            if max(*counts, count) <= (1 + TOLERANCE) * min(*counts, count):
                out.append(found)
                counts.append(count)
            else:
                missing.append(
                    f"no width of {arch} at depth {other.depth} matches {first} of width {reference.width} with "
                    f"{target} parameters; the nearest, {found.width}, has {count}"
                )
    order = {arch: k for k, arch in enumerate((first, *families))}
    return sorted(dict.fromkeys(out), key=lambda v: order[v.arch]), list(dict.fromkeys(missing))


def _alike(variant: Variant, reference: Variant) -> bool:
    """Whether they are the same point of a spec's product, but for what only one of the two architectures has."""
    own = {"arch", "norm", "heads", "patch"} | ({"activation"} if variant.activation == "none" else set())
    shared = [field.name for field in dataclasses.fields(Variant) if field.name not in own]
    return all(getattr(variant, name) == getattr(reference, name) for name in shared)


def _nearest(variant: Variant, target: int, in_shape: tuple[int, ...], heads: int | None) -> Variant:
    """The variant at the width whose count is nearest to the target, by ratio; counts rise with the width."""
    step = heads if variant.arch == "vit" and heads else 1

    def at(multiple: int) -> Variant:
        width = multiple * step
        own = (heads or default_heads(width)) if variant.arch == "vit" else 0
        return dataclasses.replace(variant, width=width, heads=own)

    low, high = 1, 2
    while parameter_count(at(high), in_shape) < target and high * step < _MOST_WIDTH:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if parameter_count(at(middle), in_shape) < target:
            low = middle
        else:
            high = middle
    return min(at(low), at(high), key=lambda v: abs(math.log(parameter_count(v, in_shape) / target)))
