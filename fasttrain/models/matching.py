"""Widths at which other architectures have the parameter count of a given one."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from fasttrain.errors import UserError
from fasttrain.factories import factory
from fasttrain.models import parameter_count, shaping
from fasttrain.models.custom import NO_PARAMETERS
from fasttrain.spec import ARCHITECTURES, Variant, default_heads

TOLERANCE = 0.05
"""Relative difference of the smallest and the largest of matching parameter counts."""
MOST_WIDTH = 2**20
"""The largest width that is tried."""
GAP = 128
"""Widths in a row of which a factory must build one, or the search may miss those around them."""
SCANNED = 256
"""The widths of a factory that are all tried where its counts do not rise with the width."""


def matched(
    variants: Sequence[Variant], in_shape: tuple[int, ...], heads: int | None = None
) -> tuple[list[Variant], list[str]]:
    """The variants of the first architecture as they are, the others at the widths that match them.

    Where counts rise with the width, the nearest below and above are found among all widths up to ``MOST_WIDTH``; a
    factory of the user's may refuse some, but not ``GAP`` in a row below the largest that it builds. Where a factory's
    counts do not rise, a width within 5 % is found if there is one up to ``SCANNED``. For a reference it is called for
    some 20 widths, and for a few thousand at the most.

    Args:
        variants: of several architectures; the widths of the first one's are the ones to match.
        in_shape: of a sample.
        heads: attention heads that the spec asks for, which divide every width of vit.

    Returns:
        The variants, all of one reference within 5 % of each other, and a line for each that has no such width; it is
        left out. As many architectures are taken as fit together, and then the nearest.

    Raises:
        UserError: an architecture has no width, or none that can be built.
    """
    first = variants[0].arch
    references = [v for v in variants if v.arch == first]
    families = list(dict.fromkeys(v.arch for v in variants if v.arch != first))
    for arch in (first, *families):
        if any(v.width == 0 for v in variants if v.arch == arch):
            raise UserError("match_params", "true", f"{arch} without hidden layers has no width to match")
        if arch not in ARCHITECTURES:
            factory(arch)  # the error of one that is not there is no error of a width
    out, missing = list(references), []
    counts: dict[Variant, _Counts] = {}
    for reference in references:
        target = parameter_count(reference, in_shape)
        if not target:
            raise UserError("arch", first, NO_PARAMETERS)
        others = [v for arch in families for v in variants if v.arch == arch and _alike(v, reference)]
        nearest = [counts.setdefault(_family(v), _Counts(v, in_shape, heads)).nearest(target) for v in others]
        for other, near, width in zip(others, nearest, _together(target, nearest), strict=True):
            if width is not None:
                out.append(_at(other, width, heads))
                continue
            width, count = min(near, key=lambda pair: _distance(pair[1], target))
            also = " and the others" if _close(count, target) else ""
            missing.append(
                f"no width of {other.arch} at depth {other.depth} matches {first} of width {reference.width} with "
                f"{target} parameters{also}; the nearest, {width}, has {count}"
            )
    order = {arch: k for k, arch in enumerate((first, *families))}
    return sorted(dict.fromkeys(out), key=lambda v: order[v.arch]), list(dict.fromkeys(missing))


def _close(a: int, b: int) -> bool:
    return max(a, b) <= (1 + TOLERANCE) * min(a, b)


def _distance(count: int, target: int) -> float:
    return abs(math.log(count / target))


def _alike(variant: Variant, reference: Variant) -> bool:
    """Whether they are the same point of a spec's product, but for what only one of the two architectures has."""
    own = {"arch", "norm", "heads", "patch"}
    if "none" in (variant.activation, reference.activation):
        own.add("activation")
    shared = [field.name for field in dataclasses.fields(Variant) if field.name not in own]
    return all(getattr(variant, name) == getattr(reference, name) for name in shared)


def _together(target: int, nearest: Sequence[Sequence[tuple[int, int]]]) -> list[int | None]:
    """The width of each family, or None: as many as fit within 5 % of each other and of the target, and the nearest.

    Args:
        target: the count to match.
        nearest: of each family, (width, count) next to the target on either side. What is taken lies in a range around
            the target, so that no other could serve better.
    """
    below = {count for near in nearest for _, count in near if count <= target and _close(count, target)}
    choices = []
    for low in sorted(below | {target}, reverse=True):
        inside = [[(_distance(c, target), w) for w, c in near if low <= c and _close(c, low)] for near in nearest]
        taken = [min(some, default=(0.0, None)) for some in inside]
        widths = [width for _, width in taken]
        choices.append((widths.count(None), sum(away for away, _ in taken), widths))
    return min(choices, key=lambda choice: choice[:2])[2]


def _at(variant: Variant, width: int, heads: int | None) -> Variant:
    own = (heads or default_heads(width)) if variant.arch == "vit" else 0
    return dataclasses.replace(variant, width=width, heads=own)


def _family(variant: Variant) -> Variant:
    """What decides the counts of all widths."""
    return dataclasses.replace(shaping(variant), width=1, heads=1)


class _Counts:
    """Parameter counts of a family by width, each counted once: a factory of the user's builds a module for it."""

    def __init__(self, variant: Variant, in_shape: tuple[int, ...], heads: int | None) -> None:
        self._variant, self._in_shape, self._heads = variant, in_shape, heads
        self._step = heads if variant.arch == "vit" and heads else 1
        self._known: dict[int, int] = {}  # 0 where nothing can be built
        self._refused = UserError("arch", variant.arch, NO_PARAMETERS)

    def nearest(self, target: int) -> list[tuple[int, int]]:
        """Width and count of the nearest count that is at most the target, and of the nearest above: one or both.

        Raises:
            UserError: no width that was tried can be built.
        """
        tried = dict(self._bracket(target))
        if self._variant.arch not in ARCHITECTURES and not any(_close(count, target) for count in tried.values()):
            tried |= self._built(range(1, SCANNED + 1))
        if not tried:
            raise self._refused
        sides = ([pair for pair in sorted(tried.items()) if (pair[1] > target) == above] for above in (False, True))
        return [min(side, key=lambda pair: _distance(pair[1], target)) for side in sides if side]

    def _bracket(self, target: int) -> Iterator[tuple[int, int]]:
        """Of counts that rise, the two next to the target, and those met on the way."""
        low, high = 0, 0
        for rung in (2**k for k in range((MOST_WIDTH // self._step).bit_length())):
            built = next(self._built(range(rung, min(rung + GAP, 2 * rung))), None)
            if built is None:
                high = rung
                if rung < GAP:
                    continue
                break  # none above either, or there would be one among so many
            width, count = built
            yield width * self._step, count
            if count >= target:
                high = width
                break
            low, high = width, 0
        while high - low > 1:
            middle = (low + high) // 2
            some = range(max(low + 1, middle - GAP // 2), min(high, middle + GAP // 2))
            built = next(self._built(sorted(some, key=lambda width: abs(width - middle))), None)
            if built is None:
                high = some.start  # as above
                continue
            width, count = built
            yield width * self._step, count
            low, high = (width, high) if count < target else (low, width)

    def _built(self, widths: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Those of some widths that can be built, with their counts; in steps."""
        for width in widths:
            if width not in self._known:
                self._known[width] = self._count(width * self._step)
            if self._known[width]:
                yield width, self._known[width]

    def _count(self, width: int) -> int:
        try:
            return parameter_count(_at(self._variant, width, self._heads), self._in_shape)
        except UserError as error:
            if not self._known:
                self._refused = error
            return 0
