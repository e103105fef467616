"""Triton tile functions of a training step of multilayer perceptrons, each with a width, n and rates of its own.

A tile belongs to one model, and its sums run in loop order inside of one program: what the others do, or how many
there are, changes no bit. No gradient reaches memory: the tile that forms it applies it.

Every model has a row in an integer table and one in a table of rates, and places in flat arrays:

- ``params`` and the optimizer's ``first`` and ``second``: layer by layer W [fan_in, pitch(fan_out)], then the bias.
  Columns are filled up to 16 bytes in float32; what lies beyond fan_out is zero and stays so.
- ``acts``: [room, pitch(width)] for the outputs of every hidden layer, the gradients with respect to what went into its
  activation, and for some activations their slopes; then [room, pitch(classes)] for the gradient of the logits.
- ``drawn``: [2, batch], the rows in the pool and the labels of the step's samples.

The equations are those of ``reference.py`` and ``optim.py``, which the tests hold them to.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
FIELDS = tl.constexpr(24)
"""Columns of the integer table, int64."""
WIDTH = tl.constexpr(0)
N = tl.constexpr(1)
BATCH = tl.constexpr(2)  # samples of a step; n for full batches
ROOM = tl.constexpr(3)  # rows in acts: samples of a step or of a pass over all, whichever is more
PARAMS = tl.constexpr(4)  # offsets in elements
ACTS = tl.constexpr(5)
ROWS = tl.constexpr(6)
DRAWN = tl.constexpr(7)
KEY = tl.constexpr(8)  # two words
SIDES = tl.constexpr(10)  # a = ceil(sqrt(n)), b = ceil(n / a)
ROUNDS = tl.constexpr(12)
STEP = tl.constexpr(13)  # steps taken when the launches began
STOPPED = tl.constexpr(14)  # set here: a check has ended the model, or its place is free
BUDGET = tl.constexpr(15)  # steps that the model may take
EVERY = tl.constexpr(16)  # steps between its checks
FLAT_AFTER = tl.constexpr(17)  # steps from which on a check may call it flat

RATES = tl.constexpr(4)
"""Columns of the table of rates, in the precision of the parameters: learning rate, momentum, weight decay, none."""


CORRECTED = tl.constexpr(65536)
"""Steps after which Adam's corrections are one in every precision: 0.999^65536 is 3e-29."""
FUSED_CLASSES = tl.constexpr(64)
"""Padded classes up to which the head also takes its gradient back through its weights; with more they do not fit."""


@triton.jit
def pitch(columns):
    """Elements from one row to the next: a multiple of four."""
    return tl.multiple_of((columns + 3) // 4 * 4, 4)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. ``bf16`` rounds the factors; the others are names of Triton's.

    The interpreter knows neither tf32 nor bf16x3, and gets products of bfloat16 wrong: there, float32 products of the
    rounded factors stand in for them.
    """
    if PRECISION == "ieee":
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    elif INTERPRETED:
        high_a, high_b = _rounded(a, PRECISION), _rounded(b, PRECISION)
        if PRECISION == "bf16x3":
            acc = tl.dot(_rounded(a - high_a, PRECISION), high_b, acc, input_precision="ieee")
            acc = tl.dot(high_a, _rounded(b - high_b, PRECISION), acc, input_precision="ieee")
        return tl.dot(high_a, high_b, acc, input_precision="ieee")
    elif PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """float32 rounded to the bits that bfloat16 or tf32 keep, to nearest, halves upwards."""
    KEPT: tl.constexpr = 13 if PRECISION == "tf32" else 16
    bits = x.to(tl.int32, bitcast=True) + (1 << (KEPT - 1))
    return ((bits >> KEPT) << KEPT).to(tl.float32, bitcast=True)


# ---- sample order, as in sampling.py ----


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _round(half, modulus, other, key, r):
    h = _mix(((other * 0x85EBCA6B) + key) ^ ((r + 1).to(tl.uint32) * 0x9E3779B9))
    total = tl.umulhi(h, modulus) + half
    return tl.minimum(total, total - modulus)


@triton.jit
def permute(place, model):
    """Where places [.] of the concatenated orders of all epochs point: int64 in [0, n)."""
    n = tl.load(model + N)
    epoch = (place // n).to(tl.uint32)
    x = (place % n).to(tl.uint32)
    a, b = tl.load(model + SIDES).to(tl.uint32), tl.load(model + SIDES + 1).to(tl.uint32)
    one, two = tl.load(model + KEY).to(tl.uint32), tl.load(model + KEY + 1).to(tl.uint32)
    rounds = tl.load(model + ROUNDS).to(tl.int32)
    hashed = _mix(epoch * 0x9E3779B9 + one)
    even, odd = _mix(hashed ^ two), _mix(hashed + two)
    size = n.to(tl.uint32)
    todo = x == x
    left = 1
    while left > 0:
        low, high = x % a, x // a
        r = 0
        while r < rounds:
            low = _round(low, a, high, even, r)
            high = _round(high, b, low, odd, r + 1)
            r += 2
        x = tl.where(todo, low + high * a, x)
        todo = x >= size
        left = tl.max(todo.to(tl.int32), 0)
    return x.to(tl.int64)


# ---- activations: as in reference.py ----


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, z, z * 0), tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, z, z * 0.01), _leaky_slope(z)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * below, below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "silu":
        s = _logistic(z)
        return z * s, s + z * s * (1.0 - s)
    elif ACTIVATION == "tanh":
        a = _tanh(z)
        return a, 1.0 - a * a
    elif ACTIVATION == "sigmoid":
        a = _logistic(z)
        return a, a * (1.0 - a)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z, z * 0 + 1.0


@triton.jit
def slope_of(a, ACTIVATION: tl.constexpr):
    """The derivative, from the activation itself; for those that ``fused.py`` keeps no slopes of."""
    if ACTIVATION == "relu":
        return tl.where(a > 0, 1.0, 0.0).to(a.dtype)
    elif ACTIVATION == "leaky_relu":
        return _leaky_slope(a)
    elif ACTIVATION == "tanh":
        return 1.0 - a * a
    elif ACTIVATION == "sigmoid":
        return a * (1.0 - a)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return a * 0 + 1.0


@triton.jit
def _leaky_slope(z):
    """1 above zero, else 0.01 in the precision of z: of two plain numbers, ``where`` makes float32."""
    return tl.where(z > 0, tl.full(z.shape, 1.0, z.dtype), tl.full(z.shape, 0.01, z.dtype))


@triton.jit
def _logistic(z):
    """1 / (1 + e^-z), without overflow on either side."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _tanh(z):
    """(1 - e^-2z) / (1 + e^-2z); near zero, where that cancels, a series."""
    e = tl.exp(-2.0 * tl.abs(z))
    far = tl.where(z >= 0, 1.0 - e, e - 1.0) / (1.0 + e)
    t = z * z
    series = 62.0 / 2835.0 - t * (1382.0 / 155925.0 - t * (21844.0 / 6081075.0 - t * (929569.0 / 638512875.0)))
    near = z * (1.0 - t * (1.0 / 3.0 - t * (2.0 / 15.0 - t * (17.0 / 315.0 - t * series))))
    return tl.where(tl.abs(z) < 0.1, near, far)


# ---- where things lie ----


@triton.jit
def weights_at(model, layer, FEATURES: tl.constexpr):
    """Offset of a layer's weights in the parameters."""
    width = tl.load(model + WIDTH)
    ld = pitch(width)
    before = tl.where(layer > 0, (FEATURES + 1) * ld + (layer - 1) * (width + 1) * ld, 0)
    # The hint is on the load: the sum may be folded away, and the hint with it.
    return tl.multiple_of(tl.load(model + PARAMS), 4) + before


@triton.jit
def acts_at(model, kind, layer, DEPTH: tl.constexpr):
    """Offset of a hidden layer's outputs (kind 0), gradients (1) or slopes (2); kind and layer of the logits follow."""
    block = tl.load(model + ROOM) * pitch(tl.load(model + WIDTH))
    return tl.multiple_of(tl.load(model + ACTS), 4) + (kind * DEPTH + layer) * block


# ---- the tiles ----


@triton.jit
def samples(model, rows, labels, drawn, begin, step, block, TRAIN: tl.constexpr, FULL: tl.constexpr, BB: tl.constexpr):
    """A block of a pass: places in it, which are samples, their rows in the pool and their labels.

    In training the samples are those of a step; with minibatches, drawn by the permutation. Else they are those from
    ``begin`` on.
    """
    b = block * BB + tl.arange(0, BB)
    n = tl.load(model + N)
    if TRAIN and not FULL:
        batch = tl.load(model + BATCH)
        valid = b < batch
        sample = permute(step * batch + tl.where(valid, b, 0), model)
    else:
        room = tl.load(model + ROOM)
        sample = begin + b
        valid = (b < room) & (sample < n)
    at = tl.load(model + ROWS) + sample
    row = tl.load(rows + at, mask=valid, other=0).to(tl.int64)
    label = tl.load(labels + at, mask=valid, other=0)
    if TRAIN:
        batch = tl.load(model + BATCH)
        to = drawn + tl.load(model + DRAWN) + b
        tl.store(to, row.to(tl.int32), mask=valid)
        tl.store(to + batch, label, mask=valid)
    return b, valid, row, label


@triton.jit
def product(src, ld, row, valid, fan_in, weights, ldw, h0, like,
            BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[BB, BH]: rows of the source times columns h0 and on of a layer's weights, plus its bias.

    The source is zero between fan_in and ld, and ld a multiple of four where it can be: masked by it, copies are wide.
    """
    h = h0 + tl.arange(0, BH)
    acc = tl.zeros([BB, BH], dtype=like)
    for k0 in range(0, fan_in, BK):
        k = k0 + tl.arange(0, BK)
        known = k < fan_in
        x = tl.load(src + row[:, None] * ld + k[None, :], mask=valid[:, None] & (k < ld)[None, :], other=0).to(like)
        w = tl.load(weights + k[:, None] * ldw + h[None, :], mask=known[:, None] & (h < ldw)[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    bias = tl.load(weights + fan_in * ldw + h, mask=h < ldw, other=0.0)
    return acc + bias[None, :]


@triton.jit
def hidden_tile(model, pool, rows, labels, drawn, params, acts, layer, begin, step, block, h0,
                FIRST: tl.constexpr, TRAIN: tl.constexpr, FULL: tl.constexpr, FEATURES: tl.constexpr,
                DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr,
                BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Outputs of a hidden layer for a block of samples and of units; the first one gathers its inputs."""
    like = params.dtype.element_ty
    width = tl.load(model + WIDTH)
    ld = pitch(width)
    weights = params + weights_at(model, layer, FEATURES)
    if FIRST:
        b, valid, row, _ = samples(model, rows, labels, drawn, begin, step, block, TRAIN, FULL, BB)
        z = product(pool, FEATURES, row, valid, FEATURES, weights, ld, h0, like, BB, BH, BK, PRECISION)
    else:
        b = block * BB + tl.arange(0, BB)
        valid = b < _count(model, begin, TRAIN)
        row = b.to(tl.int64)
        source = acts + acts_at(model, 0, layer - 1, DEPTH)
        z = product(source, ld, row, valid, width, weights, ld, h0, like, BB, BH, BK, PRECISION)
    h = h0 + tl.arange(0, BH)
    a, slope = activate(z, ACTIVATION)
    own = (h < width)[None, :]
    to = b[:, None] * ld + h[None, :]
    mask = valid[:, None] & (h < ld)[None, :]
    tl.store(acts + acts_at(model, 0, layer, DEPTH) + to, tl.where(own, a, 0.0), mask=mask)
    if TRAIN and KEEP:
        tl.store(acts + acts_at(model, 2, layer, DEPTH) + to, tl.where(own, slope, 0.0), mask=mask)


@triton.jit
def _count(model, begin, TRAIN: tl.constexpr):
    """Samples of a pass."""
    if TRAIN:
        return tl.load(model + BATCH)
    else:
        return tl.minimum(tl.load(model + ROOM), tl.load(model + N) - begin)


@triton.jit
def logits_tile(model, pool, rows, labels, drawn, params, acts, begin, step, block,
                TRAIN: tl.constexpr, FULL: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
                CLASSES: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Logits [BB, BC] of a block of samples, minus infinity beyond the classes; places, which are real, and labels."""
    like = params.dtype.element_ty
    ld = (CLASSES + 3) // 4 * 4
    weights = params + weights_at(model, DEPTH, FEATURES)
    if DEPTH == 0:
        b, valid, row, label = samples(model, rows, labels, drawn, begin, step, block, TRAIN, FULL, BB)
        z = product(pool, FEATURES, row, valid, FEATURES, weights, ld, 0, like, BB, BC, BK, PRECISION)
    else:
        b = block * BB + tl.arange(0, BB)
        valid = b < _count(model, begin, TRAIN)
        if TRAIN:
            at = drawn + tl.load(model + DRAWN) + tl.load(model + BATCH) + b
        else:
            at = labels + tl.load(model + ROWS) + begin + b
        label = tl.load(at, mask=valid, other=0)
        width = tl.load(model + WIDTH)
        source = acts + acts_at(model, 0, DEPTH - 1, DEPTH)
        z = product(source, pitch(width), b.to(tl.int64), valid, width, weights, ld, 0, like, BB, BC, BK, PRECISION)
    c = tl.arange(0, BC)
    return tl.where((c < CLASSES)[None, :], z, float("-inf")), b, valid, label


@triton.jit
def softmax(z, own, CLASSES: tl.constexpr, BC: tl.constexpr):
    """Exponentials [BB, BC] over their sum; the cross-entropy [BB] in nats; whether a sample is right.

    The second is NaN, and the third false, where a logit is not finite. A sample is right whose label has the largest
    logit alone.

    ``own`` marks the label of each sample.
    """
    inside = (tl.arange(0, BC) < CLASSES)[None, :]
    # The comparison drops a NaN: it comes back with the sum of zeros.
    strange = tl.sum(tl.where(inside, z, 0.0) * 0, 1)
    top = tl.max(z, 1)
    e = tl.where(inside, tl.exp(z - top[:, None]), 0.0)
    total = tl.sum(e, 1)
    mine = tl.sum(tl.where(own, z, 0.0), 1)
    loss = tl.log(total) + (top - mine) + strange
    # A largest one that is the only one of its size. A comparison with a masked copy would take registers for it.
    right = (mine == top) & (tl.sum((z == top[:, None]).to(tl.int32), 1) == 1) & (loss == loss)
    return e / total[:, None], loss, right


@triton.jit
def head_tile(model, pool, rows, labels, drawn, params, acts, found, begin, step, block,
              FULL: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr,
              ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
              BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Logits and their gradient for a block of a step's samples; with few classes also that one layer down.

    ``found`` takes the sum of the losses and how many samples are strictly right.
    """
    z, b, valid, label = logits_tile(
        model, pool, rows, labels, drawn, params, acts, begin, step, block,
        True, FULL, FEATURES, DEPTH, CLASSES, BB, BC, BK, PRECISION,
    )  # fmt: skip
    c = tl.arange(0, BC)
    own = c[None, :] == label[:, None]
    share, loss, right = softmax(z, own, CLASSES, BC)
    ld = (CLASSES + 3) // 4 * 4
    batch = tl.load(model + BATCH)
    delta = (share - own.to(z.dtype)) * (1.0 / batch.to(z.dtype))
    delta = tl.where(valid[:, None] & (c < CLASSES)[None, :], delta, 0.0)
    tl.store(found, tl.sum(tl.where(valid, loss, 0.0), 0))
    tl.store(found + 1, tl.sum((valid & right).to(z.dtype), 0))
    to = acts + acts_at(model, 3 if KEEP else 2, 0, DEPTH) + b[:, None] * ld + c[None, :]
    tl.store(to, delta, mask=valid[:, None] & (c < ld)[None, :])
    if DEPTH > 0 and BC <= FUSED_CLASSES:
        width = tl.load(model + WIDTH)
        weights = params + weights_at(model, DEPTH, FEATURES)
        for h0 in range(0, width, BH):
            h = h0 + tl.arange(0, BH)
            w = tl.load(
                weights + h[None, :] * ld + c[:, None], mask=(h < width)[None, :] & (c < ld)[:, None], other=0.0
            )
            back = dot(delta, w, tl.zeros([BB, BH], dtype=z.dtype), PRECISION)
            _store_delta(model, acts, DEPTH - 1, b, valid, h, back, DEPTH, ACTIVATION, KEEP)


@triton.jit
def _store_delta(model, acts, layer, b, valid, h, back,
                 DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """The gradient at the outputs of a hidden layer times its slopes."""
    width = tl.load(model + WIDTH)
    ld = pitch(width)
    at = b[:, None] * ld + h[None, :]
    mask = valid[:, None] & (h < ld)[None, :]
    if KEEP:
        slope = tl.load(acts + acts_at(model, 2, layer, DEPTH) + at, mask=mask, other=0.0)
    else:
        slope = slope_of(tl.load(acts + acts_at(model, 0, layer, DEPTH) + at, mask=mask, other=0.0), ACTIVATION)
    delta = tl.where((h < width)[None, :], back * slope, 0.0)
    tl.store(acts + acts_at(model, 1, layer, DEPTH) + at, delta, mask=mask)


@triton.jit
def back_tile(model, params, acts, layer, block, i0, LAST: tl.constexpr,
              FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, ACTIVATION: tl.constexpr,
              KEEP: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """The gradient at hidden layer ``layer`` - 1 from that at ``layer``, for a block of samples and of units."""
    like = params.dtype.element_ty
    width = tl.load(model + WIDTH)
    weights = params + weights_at(model, layer, FEATURES)
    if LAST:
        fan_out, ld = CLASSES, (CLASSES + 3) // 4 * 4
        delta = acts + acts_at(model, 3 if KEEP else 2, 0, DEPTH)
    else:
        fan_out, ld = width, pitch(width)
        delta = acts + acts_at(model, 1, layer, DEPTH)
    b = block * BB + tl.arange(0, BB)
    valid = b < tl.load(model + BATCH)
    i = i0 + tl.arange(0, BH)
    acc = tl.zeros([BB, BH], dtype=like)
    for h0 in range(0, fan_out, BK):
        h = h0 + tl.arange(0, BK)
        d = tl.load(delta + b[:, None] * ld + h[None, :], mask=valid[:, None] & (h < ld)[None, :], other=0.0)
        w = tl.load(weights + i[None, :] * ld + h[:, None], mask=(i < width)[None, :] & (h < ld)[:, None], other=0.0)
        acc = dot(d, w, acc, PRECISION)
    _store_delta(model, acts, layer - 1, b, valid, i, acc, DEPTH, ACTIVATION, KEEP)


@triton.jit
def stepped(p, grad, m, v, lr, momentum, decay, size, root, OPTIMIZER: tl.constexpr, DECAYS: tl.constexpr):
    """Parameters, first and second moment after one step, as in reference.py, each operation rounded as torch's.

    ``size`` and ``root`` are Adam's corrections; SGD has no second moment and leaves ``v`` as it is.
    """
    if DECAYS:
        if OPTIMIZER == "adamw":
            p = p * (1.0 - lr * decay)
        else:
            grad += p * decay
    if OPTIMIZER == "sgd":
        m = m * momentum + grad
        p -= m * lr
    else:
        m = m * 0.9 + grad * (1.0 - 0.9)
        v = v * 0.999 + grad * grad * (1.0 - 0.999)
        if p.dtype == tl.float32:  # plain division and root are approximated there
            p -= tl.div_rn(m, tl.sqrt_rn(v) * root + 1e-8) * (lr * size)
        else:
            p -= m / (tl.sqrt(v) * root + 1e-8) * (lr * size)
    return p, m, v


@triton.jit
def update(at, grad, mask, params, first, second, rates, corrections, step, OPTIMIZER: tl.constexpr):
    """One step of the optimizer on the parameters at some offsets."""
    p = tl.load(params + at, mask=mask, other=0.0)
    m = tl.load(first + at, mask=mask, other=0.0)
    lr, momentum, decay = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2)
    if OPTIMIZER == "sgd":
        p, m, _ = stepped(p, grad, m, m, lr, momentum, decay, lr, lr, OPTIMIZER, True)
    else:
        v = tl.load(second + at, mask=mask, other=0.0)
        row = corrections + 2 * tl.minimum(step, CORRECTED - 1)
        p, m, v = stepped(p, grad, m, v, lr, momentum, decay, tl.load(row), tl.load(row + 1), OPTIMIZER, True)
        tl.store(second + at, v, mask=mask)
    tl.store(first + at, m, mask=mask)
    tl.store(params + at, p, mask=mask)


@triton.jit
def weights_tile(model, pool, drawn, params, first, second, rates, corrections, acts, layer, step, i0, h0,
                 FIRST: tl.constexpr, LAST: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
                 CLASSES: tl.constexpr, KEEP: tl.constexpr, OPTIMIZER: tl.constexpr, BI: tl.constexpr, BH: tl.constexpr,
                 BS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of a block of a layer's weights over all samples of the step, and the update with it."""
    like = params.dtype.element_ty
    width, batch = tl.load(model + WIDTH), tl.load(model + BATCH)
    if LAST:
        ld = (CLASSES + 3) // 4 * 4
        delta = acts + acts_at(model, 3 if KEEP else 2, 0, DEPTH)
    else:
        ld = pitch(width)
        delta = acts + acts_at(model, 1, layer, DEPTH)
    if FIRST:
        fan_in, source, lds = FEATURES, pool, FEATURES
    else:
        fan_in, source, lds = width, acts + acts_at(model, 0, layer - 1, DEPTH), pitch(width)
    i = i0 + tl.arange(0, BI)
    h = h0 + tl.arange(0, BH)
    grad = tl.zeros([BI, BH], dtype=like)
    bias = tl.zeros([BH], dtype=like)
    for b0 in range(0, batch, BS):
        b = b0 + tl.arange(0, BS)
        valid = b < batch
        row = b.to(tl.int64)
        if FIRST:
            row = tl.load(drawn + tl.load(model + DRAWN) + b, mask=valid, other=0).to(tl.int64)
        # Transposed in the load: [BI, BS].
        x = tl.load(source + row[None, :] * lds + i[:, None], mask=valid[None, :] & (i < lds)[:, None], other=0)
        d = tl.load(delta + b[:, None] * ld + h[None, :], mask=valid[:, None] & (h < ld)[None, :], other=0.0)
        grad = dot(x.to(like), d, grad, PRECISION)
        bias += tl.sum(d, 0)
    at = weights_at(model, layer, FEATURES)
    mask = (i < fan_in)[:, None] & (h < ld)[None, :]
    update(at + i[:, None] * ld + h[None, :], grad, mask, params, first, second, rates, corrections, step, OPTIMIZER)
    if i0 == 0:
        update(at + fan_in * ld + h, bias, h < ld, params, first, second, rates, corrections, step, OPTIMIZER)


@triton.jit
def check_tile(model, pool, rows, labels, drawn, params, acts, begin, block,
               FEATURES: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr,
               BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Sum of the losses (float64) and number of samples not strictly right, in a block of a pass over all samples."""
    z, _, valid, label = logits_tile(
        model, pool, rows, labels, drawn, params, acts, begin, begin, block,
        False, False, FEATURES, DEPTH, CLASSES, BB, BC, BK, PRECISION,
    )  # fmt: skip
    own = tl.arange(0, BC)[None, :] == label[:, None]
    _, loss, right = softmax(z, own, CLASSES, BC)
    return tl.sum(tl.where(valid, loss, 0.0).to(tl.float64), 0), tl.sum((valid & ~right).to(tl.int64), 0)
