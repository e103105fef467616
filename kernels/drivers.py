"""The kernels of both drivers over the tile functions of ``tiles.py``.

*Stages*: one launch for each layer's outputs, the head, each hidden layer's gradient and the update, about 2 L + 1 a
step; a program takes one tile of one model from a work list. *Whole steps*: one program a model makes many steps in one
launch, with the same tiles one after the other.

A program leaves at once if its model is past its steps or has stopped. Both end a model by themselves at a check, which
comes every so many of its steps and at its last one (both are each model's own, in the integer table); what the checks
found goes to ``history`` [models, checks, 3]: mean loss, samples not strictly right, and the least loss so far.

No number of a launch may be compiled into a kernel for its value (``_NUMBERS``): another step would be another kernel.
"""

import triton
import triton.language as tl

from fasttrain.kernels.tiles import (
    BATCH,
    BUDGET,
    EVERY,
    FIELDS,
    FLAT_AFTER,
    FUSED_CLASSES,
    RATES,
    ROOM,
    STEP,
    STOPPED,
    WIDTH,
    N,
    back_tile,
    check_tile,
    head_tile,
    hidden_tile,
    weights_tile,
)

_NUMBERS = ("layer", "s", "begin", "steps", "blocks", "checks")


def _stage(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _NUMBERS])


@triton.jit
def _active(model, s):
    """Whether a model takes step s, counted from where the launches began."""
    return (tl.load(model + STOPPED) == 0) & (tl.load(model + STEP) + s < tl.load(model + BUDGET))


@triton.jit
def _due(model, s):
    """Whether a model is checked after step s, the step being its own."""
    steps = tl.load(model + STEP) + s + 1
    return (steps % tl.load(model + EVERY) == 0) | (steps == tl.load(model + BUDGET))


@_stage
def hidden_stage(models, work, pool, rows, labels, drawn, params, acts, layer, s, begin,
                 FIRST: tl.constexpr, TRAIN: tl.constexpr, FULL: tl.constexpr, FEATURES: tl.constexpr,
                 DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr,
                 BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program a (model, block of samples, block of units): [T, 3] int32."""
    at = work + tl.program_id(0) * 3
    model = models + tl.load(at).to(tl.int64) * FIELDS
    block, unit = tl.load(at + 1), tl.load(at + 2)
    go = _active(model, s)
    if not TRAIN:
        go = go & _due(model, s) & (begin < tl.load(model + N))
    if go:
        step = tl.load(model + STEP) + s
        hidden_tile(
            model, pool, rows, labels, drawn, params, acts, layer, begin, step, block, unit * BH,
            FIRST, TRAIN, FULL, FEATURES, DEPTH, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
        )  # fmt: skip


@_stage
def head_stage(models, work, pool, rows, labels, drawn, params, acts, found, blocks, s,
               FULL: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr,
               ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
               CK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program a (model, block of samples): [T, 2]; found [models, blocks, 2] takes its loss and count."""
    at = work + tl.program_id(0) * 2
    e, block = tl.load(at).to(tl.int64), tl.load(at + 1)
    model = models + e * FIELDS
    if _active(model, s):
        step = tl.load(model + STEP) + s
        head_tile(
            model, pool, rows, labels, drawn, params, acts, found + (e * blocks + block) * 2, 0, step, block,
            FULL, FEATURES, DEPTH, CLASSES, ACTIVATION, KEEP, BB, BH, BC, CK, PRECISION,
        )  # fmt: skip


@_stage
def back_stage(models, work, params, acts, layer, s, LAST: tl.constexpr,
               FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, ACTIVATION: tl.constexpr,
               KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """A program a (model, block of samples, block of units)."""
    at = work + tl.program_id(0) * 3
    model = models + tl.load(at).to(tl.int64) * FIELDS
    block, unit = tl.load(at + 1), tl.load(at + 2)
    if _active(model, s):
        back_tile(
            model, params, acts, layer, block, unit * BH, LAST,
            FEATURES, DEPTH, CLASSES, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
        )  # fmt: skip


@_stage
def weights_stage(models, work, pool, drawn, params, first, second, rates, corrections, acts, s,
                  FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, KEEP: tl.constexpr,
                  OPTIMIZER: tl.constexpr, BI: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """A program a (model, layer, block of inputs, block of units): [T, 4]."""
    at = work + tl.program_id(0) * 4
    e, layer = tl.load(at).to(tl.int64), tl.load(at + 1)
    model = models + e * FIELDS
    if _active(model, s):
        step = tl.load(model + STEP) + s
        any_weights_tile(
            model, pool, drawn, params, first, second, rates + e * RATES, corrections, acts, layer, step,
            tl.load(at + 2), tl.load(at + 3),
            FEATURES, DEPTH, CLASSES, KEEP, OPTIMIZER, BI, BH, BO, BS, PRECISION,
        )  # fmt: skip


@triton.jit
def any_weights_tile(model, pool, drawn, params, first, second, rates, corrections, acts, layer, step, i, h,
                     FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, KEEP: tl.constexpr,
                     OPTIMIZER: tl.constexpr, BI: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """A tile of any layer: the first gathers, the last has classes for units."""
    if DEPTH == 0:
        weights_tile(
            model, pool, drawn, params, first, second, rates, corrections, acts, layer, step, i * BI, h * BO,
            True, True, FEATURES, DEPTH, CLASSES, KEEP, OPTIMIZER, BI, BO, BS, PRECISION,
        )  # fmt: skip
    else:
        if layer == 0:
            weights_tile(
                model, pool, drawn, params, first, second, rates, corrections, acts, layer, step, i * BI, h * BH,
                True, False, FEATURES, DEPTH, CLASSES, KEEP, OPTIMIZER, BI, BH, BS, PRECISION,
            )  # fmt: skip
        elif layer == DEPTH:
            weights_tile(
                model, pool, drawn, params, first, second, rates, corrections, acts, layer, step, i * BI, h * BO,
                False, True, FEATURES, DEPTH, CLASSES, KEEP, OPTIMIZER, BI, BO, BS, PRECISION,
            )  # fmt: skip
        else:
            weights_tile(
                model, pool, drawn, params, first, second, rates, corrections, acts, layer, step, i * BI, h * BH,
                False, False, FEATURES, DEPTH, CLASSES, KEEP, OPTIMIZER, BI, BH, BS, PRECISION,
            )  # fmt: skip


@_stage
def check_stage(models, work, pool, rows, labels, drawn, params, acts, losses, wrong, blocks, s, begin,
                FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, BB: tl.constexpr,
                BC: tl.constexpr, CK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program a (model, block of samples); losses and wrong [models, blocks] gain what it found: blocks are owned."""
    at = work + tl.program_id(0) * 2
    e, block = tl.load(at).to(tl.int64), tl.load(at + 1)
    model = models + e * FIELDS
    if _active(model, s) & _due(model, s) & (begin + block * BB < tl.load(model + N)):
        loss, mistakes = check_tile(
            model, pool, rows, labels, drawn, params, acts, begin, block,
            FEATURES, DEPTH, CLASSES, BB, BC, CK, PRECISION,
        )  # fmt: skip
        to = e * blocks + block
        if begin > 0:
            loss += tl.load(losses + to)
            mistakes += tl.load(wrong + to)
        tl.store(losses + to, loss)
        tl.store(wrong + to, mistakes)


@_stage
def decide_stage(models, losses, wrong, blocks, history, checks, s, RATIO: tl.constexpr, FLOOR: tl.constexpr,
                 BB: tl.constexpr):  # fmt: skip
    """A program a model: adds up the blocks of a check, in order, and stops a model that it ends."""
    e = tl.program_id(0).to(tl.int64)
    model = models + e * FIELDS
    if _active(model, s) & _due(model, s):
        used = tl.cdiv(tl.minimum(tl.load(model + N), tl.load(model + ROOM)), BB)
        total = tl.load(losses + e * blocks)
        mistakes = tl.load(wrong + e * blocks)
        for block in range(1, used):
            total += tl.load(losses + e * blocks + block)
            mistakes += tl.load(wrong + e * blocks + block)
        taken = tl.load(model + STEP) + s + 1
        decide(model, history + e * checks * 3, taken, total, mistakes, RATIO, FLOOR)


@triton.jit
def decide(model, history, taken, total, mistakes, RATIO: tl.constexpr, FLOOR: tl.constexpr):
    """Keeps what a check found and stops the model if that ends it, by the rules of stopping.py; whether it does."""
    every = tl.load(model + EVERY)
    mean = total / tl.load(model + N).to(tl.float64)
    to = history + (tl.cdiv(taken, every) - 1) * 3
    best = tl.minimum(mean, tl.load(to - 1, mask=taken > every, other=float("inf")))
    tl.store(to, mean)
    tl.store(to + 1, mistakes.to(tl.float64))
    tl.store(to + 2, best)
    # The last check at or before half of the steps so far.
    half = taken // (2 * every) - 1
    known = (taken >= tl.load(model + FLAT_AFTER)) & (half >= 0)
    before = tl.load(history + half * 3 + 2, mask=known, other=float("inf"))
    # In a comparison a number of Python is float32.
    flat = known & (best > RATIO * before) & (best > tl.full([], FLOOR, tl.float64))
    finite = mean - mean == 0
    stop = (mistakes == 0) | (finite == 0) | flat | (taken >= tl.load(model + BUDGET))
    if stop:
        tl.store(model + STOPPED, 1)
    return stop


# Called rather than inlined: inlined, there are not enough registers for all phases together, and they spill.
_hidden = triton.jit(hidden_tile.fn, noinline=True)
_head = triton.jit(head_tile.fn, noinline=True)
_back = triton.jit(back_tile.fn, noinline=True)
_check = triton.jit(check_tile.fn, noinline=True)
_any_weights = triton.jit(any_weights_tile.fn, noinline=True)


@triton.jit
def _outputs(model, pool, rows, labels, drawn, params, acts, begin, step, block,
             TRAIN: tl.constexpr, FULL: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
             ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """All hidden layers for a block of samples, one after the other."""
    if DEPTH > 0:
        h0 = 0
        while h0 < tl.load(model + WIDTH):
            _hidden(
                model, pool, rows, labels, drawn, params, acts, 0, begin, step, block, h0,
                True, TRAIN, FULL, FEATURES, DEPTH, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            h0 += BH
        layer = 1
        while layer < DEPTH:
            h0 = 0
            while h0 < tl.load(model + WIDTH):
                _hidden(
                    model, pool, rows, labels, drawn, params, acts, layer, begin, step, block, h0,
                    False, TRAIN, FULL, FEATURES, DEPTH, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                h0 += BH
            layer += 1


@_stage
def whole_steps(models, pool, rows, labels, drawn, params, first, second, rates, corrections, acts, found, blocks,
                history, checks, steps, FULL: tl.constexpr,
                FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, ACTIVATION: tl.constexpr,
                KEEP: tl.constexpr, OPTIMIZER: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
                BK: tl.constexpr, CK: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr,
                RATIO: tl.constexpr, FLOOR: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program a model: so many steps, with the checks that are due.

    The barriers part what a tile stores, in global and in shared memory, from what the next one loads or overwrites;
    the loops that hold both are ``while`` loops, which are not pipelined.
    """
    e = tl.program_id(0).to(tl.int64)
    model = models + e * FIELDS
    # Sizes are loaded where they are used: kept, they would take registers away from the tiles.
    step = tl.load(model + STEP)
    go = (tl.load(model + STOPPED) == 0) & (step < tl.load(model + BUDGET))
    while go:
        block = 0
        while block * BB < tl.load(model + BATCH):
            _outputs(
                model, pool, rows, labels, drawn, params, acts, 0, step, block,
                True, FULL, FEATURES, DEPTH, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
            )  # fmt: skip
            _head(
                model, pool, rows, labels, drawn, params, acts, found + (e * blocks + block) * 2, 0, step, block,
                FULL, FEATURES, DEPTH, CLASSES, ACTIVATION, KEEP, BB, BH, BC, CK, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            if DEPTH > 0 and BC > FUSED_CLASSES:
                h0 = 0
                while h0 < tl.load(model + WIDTH):
                    _back(
                        model, params, acts, DEPTH, block, h0, True,
                        FEATURES, DEPTH, CLASSES, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    h0 += BH
            layer = DEPTH - 1
            while layer > 0:
                h0 = 0
                while h0 < tl.load(model + WIDTH):
                    _back(
                        model, params, acts, layer, block, h0, False,
                        FEATURES, DEPTH, CLASSES, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    h0 += BH
                layer -= 1
            block += 1
        layer = 0
        while layer <= DEPTH:
            fan_in = tl.where(layer == 0, FEATURES, tl.load(model + WIDTH))
            fan_out = tl.where(layer == DEPTH, CLASSES, tl.load(model + WIDTH))
            side = tl.where(layer == DEPTH, BO, BH)
            i = 0
            while i * BI < fan_in:
                h = 0
                while h * side < fan_out:
                    _any_weights(
                        model, pool, drawn, params, first, second, rates + e * RATES, corrections, acts, layer, step,
                        i, h, FEATURES, DEPTH, CLASSES, KEEP, OPTIMIZER, BI, BH, BO, BS, PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    h += 1
                i += 1
            layer += 1
        step += 1
        go = step < tl.load(model + STEP) + steps
        if (step % tl.load(model + EVERY) == 0) | (step == tl.load(model + BUDGET)):  # the last check always stops
            total = tl.zeros([], dtype=tl.float64)
            mistakes = tl.zeros([], dtype=tl.int64)
            # By blocks of the room, each summed over the passes first: the order of the other driver.
            used = tl.cdiv(tl.minimum(tl.load(model + N), tl.load(model + ROOM)), BB)
            block = 0
            while block < used:
                part = tl.zeros([], dtype=tl.float64)
                begin = 0
                while begin + block * BB < tl.load(model + N):
                    _outputs(
                        model, pool, rows, labels, drawn, params, acts, begin, 0, block,
                        False, FULL, FEATURES, DEPTH, ACTIVATION, KEEP, BB, BH, BK, PRECISION,
                    )  # fmt: skip
                    loss, missed = _check(
                        model, pool, rows, labels, drawn, params, acts, begin, block,
                        FEATURES, DEPTH, CLASSES, BB, BC, CK, PRECISION,
                    )  # fmt: skip
                    tl.debug_barrier()
                    part += loss
                    mistakes += missed
                    begin += tl.load(model + ROOM).to(tl.int32)
                total += part
                block += 1
            stop = decide(model, history + e * checks * 3, step, total, mistakes, RATIO, FLOOR)
            go = go & (stop == 0)
