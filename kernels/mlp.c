/* Training steps of one multilayer perceptron on one CPU thread: gather, forward, loss, backward and update fused over
 * arrays that stay in its cache. Compiled at first use by native.py, once for float and once for double (-DREAL).
 *
 * Shape letters: B samples of a block, I/O inputs/outputs of a layer, C classes, P parameters, N training samples.
 *
 * A layer's parameters are [panels][I + 1][w]: the outputs cut into panels of w = 1 to 3 vectors, so that a product reads
 * them in order, and the biases as row I. Activations are [B][pitch] with a 1 at column I of each row, so that products
 * with them carry the bias and its gradient. What lies beyond the last output is zero and stays zero. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef PHASES
#include <time.h>
#endif

#ifndef REAL
#define REAL float
#define SINGLE 1
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define ROWS1 14
#define ROWS2 12
#define ROWS3 8
#elif defined(__AVX__)
#define BYTES 32
#define ROWS1 12
#define ROWS2 6
#define ROWS3 4
#elif defined(__aarch64__)
#define BYTES 16
#define ROWS1 14
#define ROWS2 12
#define ROWS3 8
#else
#define BYTES 16
#define ROWS1 12
#define ROWS2 6
#define ROWS3 4
#endif

typedef REAL real;
typedef int64_t i64;
typedef uint32_t u32;
typedef real vec __attribute__((vector_size(BYTES), may_alias));
#if SINGLE
typedef int32_t mask __attribute__((vector_size(BYTES), may_alias));
#else
typedef int64_t mask __attribute__((vector_size(BYTES), may_alias));
#endif

#define LANES ((i64)(BYTES / sizeof(real)))
#define LINE ((i64)(64 / sizeof(real)))
#define BLOCK 128   /* samples that go through the layers together */
#define INNER 256   /* inputs of a layer that a product takes at once: a panel of them stays in L1 */
#define CHUNK 48    /* rows of a layer whose gradient is formed before they are updated */
#define MOST_VECTORS 3
#define INLINE static inline __attribute__((always_inline))

enum { RELU, LEAKY_RELU, GELU, SILU, TANH, SIGMOID, IDENTITY };
enum { SGD, ADAM };

typedef struct {
    i64 features, width, depth, classes; /* the shape */
    i64 batch;                           /* samples of a minibatch, 0 for the whole training set */
    i64 activation, optimizer;
    i64 n, step;       /* training samples; steps taken */
    i64 key[2];        /* of the sample order, 32 bits each */
    double lr, momentum;
    const real *pool;  /* [R, I] */
    const i64 *rows;   /* [N], of the pool */
    const i64 *labels; /* [N] */
    real *params;      /* [P] */
    real *state;       /* [k, P], the optimizer's arrays */
    double loss;       /* out: mean loss of the last minibatch before its update */
    double mean_loss;  /* out: over the training set */
    i64 wrong;         /* out: samples not strictly right */
} model;

/* ---- layout ---- */

INLINE i64 vectors(i64 columns) { return (columns + LANES - 1) / LANES; }

/* Vectors of the panel that starts at vector v of n: twos, and one three where n is odd, or a one. */
INLINE i64 panel(i64 v, i64 n) { return n - v == 1 ? 1 : (n - v) & 1 ? 3 : 2; }

/* Elements from one row of activations to the next: an odd number of cache lines, so that a column does not fall into few
 * sets of the cache. */
static i64 pitch(i64 columns) {
    i64 lines = (columns + 1 + LINE - 1) / LINE;
    i64 wide = (vectors(columns) * LANES + LINE - 1) / LINE;
    return ((lines > wide ? lines : wide) | 1) * LINE;
}

INLINE i64 fan_in(const model *m, i64 layer) { return layer == 0 ? m->features : m->width; }
INLINE i64 fan_out(const model *m, i64 layer) { return layer == m->depth ? m->classes : m->width; }
INLINE i64 layer_size(const model *m, i64 layer) {
    i64 size = (fan_in(m, layer) + 1) * vectors(fan_out(m, layer)) * LANES;
    return (size + LINE - 1) / LINE * LINE;
}

i64 parameters_size(const model *m) {
    i64 size = 0;
    for (i64 layer = 0; layer <= m->depth; layer++) size += layer_size(m, layer);
    return size;
}

/* flat: per layer the weights [O, I] and the biases [O]. */
static void repack(const model *m, double *flat, int into) {
    real *p = m->params;
    for (i64 layer = 0; layer <= m->depth; layer++) {
        i64 in = fan_in(m, layer), out = fan_out(m, layer), n = vectors(out), w;
        real *at = p;
        for (i64 v = 0; v < n; v += w) {
            w = panel(v, n);
            for (i64 i = 0; i <= in; i++)
                for (i64 c = 0; c < w * LANES && v * LANES + c < out; c++) {
                    i64 o = v * LANES + c;
                    double *f = flat + (i < in ? o * in + i : out * in + o);
                    if (into) at[i * w * LANES + c] = (real)*f;
                    else *f = at[i * w * LANES + c];
                }
            at += (in + 1) * w * LANES;
        }
        flat += out * (in + 1);
        p += layer_size(m, layer);
    }
}

void pack(const model *m, double *flat) {
    memset(m->params, 0, parameters_size(m) * sizeof(real));
    repack(m, flat, 1);
}

void unpack(const model *m, double *flat) { repack(m, flat, 0); }

/* ---- products ---- */

/* c[r, :] (+)= sum_k a[r * row + k * col] b[k * ldb, :] for a tile of so many rows and vectors. */
INLINE void tile(const int rows, const int vecs, i64 inner, const real *restrict a, i64 row, i64 col,
                 const real *restrict b, i64 ldb, real *restrict c, i64 ldc, int add) {
    vec sum[ROWS1][MOST_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[r][v] = add ? *(const vec *)(c + r * ldc + v * LANES) : (vec){0};
    for (i64 k = 0; k < inner; k++) {
        vec right[MOST_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) right[v] = *(const vec *)(b + k * ldb + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            real left = a[r * row + k * col];
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) *(vec *)(c + r * ldc + v * LANES) = sum[r][v];
}

#define DEFINE_PRODUCT(VECS, MOST)                                                                                        \
    static void product##VECS(i64 rows, i64 inner, const real *a, i64 row, i64 col, const real *b, i64 ldb, real *c,     \
                              i64 ldc, int add) {                                                                         \
        for (; rows >= MOST; rows -= MOST, a += MOST * row, c += MOST * ldc)                                              \
            tile(MOST, VECS, inner, a, row, col, b, ldb, c, ldc, add);                                                    \
        if (MOST > 8 && rows >= 8) {                                                                                      \
            tile(8, VECS, inner, a, row, col, b, ldb, c, ldc, add);                                                       \
            rows -= 8, a += 8 * row, c += 8 * ldc;                                                                        \
        }                                                                                                                 \
        if (MOST > 4 && rows >= 4) {                                                                                      \
            tile(4, VECS, inner, a, row, col, b, ldb, c, ldc, add);                                                       \
            rows -= 4, a += 4 * row, c += 4 * ldc;                                                                        \
        }                                                                                                                 \
        if (rows >= 2) {                                                                                                  \
            tile(2, VECS, inner, a, row, col, b, ldb, c, ldc, add);                                                       \
            rows -= 2, a += 2 * row, c += 2 * ldc;                                                                        \
        }                                                                                                                 \
        if (rows) tile(1, VECS, inner, a, row, col, b, ldb, c, ldc, add);                                                 \
    }
DEFINE_PRODUCT(1, ROWS1)
DEFINE_PRODUCT(2, ROWS2)
DEFINE_PRODUCT(3, ROWS3)

/* c[rows, w] (+)= a b for one panel of w vectors. */
static void product(i64 w, i64 rows, i64 inner, const real *a, i64 row, i64 col, const real *b, i64 ldb, real *c,
                    i64 ldc, int add) {
    if (w == 1) product1(rows, inner, a, row, col, b, ldb, c, ldc, add);
    else if (w == 2) product2(rows, inner, a, row, col, b, ldb, c, ldc, add);
    else product3(rows, inner, a, row, col, b, ldb, c, ldc, add);
}

/* c[rows, columns] = a[rows, inner] times panels [.][inner][w]. */
static void times_panels(i64 rows, i64 inner, i64 columns, const real *a, i64 lda, const real *panels, real *c, i64 ldc) {
    i64 n = vectors(columns), parts = (inner + INNER - 1) / INNER, w;
    for (i64 part = 0; part < parts; part++) {
        i64 begin = part * inner / parts, end = (part + 1) * inner / parts;
        for (i64 v = 0; v < n; v += w) {
            w = panel(v, n);
            const real *b = panels + v * LANES * inner + begin * w * LANES;
            product(w, rows, end - begin, a + begin, lda, 1, b, w * LANES, c + v * LANES, ldc, part > 0);
        }
    }
}

/* ---- elementary functions of vectors ---- */

#define CONSTANT(x) ((vec){0} + (real)(x))
INLINE vec pick(mask which, vec yes, vec no) { return (vec)((which & (mask)yes) | (~which & (mask)no)); }
INLINE vec absolute(vec x) { return pick(x < 0, -x, x); }

#if SINGLE
/* The scheme of Cody and Waite: 2^k e^r with |r| <= ln 2 / 2; below -87.3 the result is that of -87.3. */
INLINE vec exponential(vec x) {
    x = pick(x > 88.3f, CONSTANT(88.3f), x);
    x = pick(x < -87.3f, CONSTANT(-87.3f), x);
    vec k = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    vec r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    mask bits = (__builtin_convertvector(k, mask) + 127) << 23;
    return p * (vec)bits;
}

INLINE vec tangent(vec x) {
    vec square = x * x;
    vec p = -5.70498872745e-3f * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    vec small = p * square * x + x;
    vec e = exponential(-2 * absolute(x));
    vec large = (1 - e) / (1 + e);
    return pick(absolute(x) < 0.625f, small, pick(x < 0, -large, large));
}

/* Least-squares polynomials at Chebyshev nodes: erf(x) / x in x^2 below 1, erfc(x) e^(x^2) / t in t = 1 / (1 + x) up to 4,
 * where the rest rounds to 1. Largest error 1.2e-7. */
INLINE vec error_function(vec x) {
    vec a = absolute(x), square = x * x;
    a = pick(a > 4, CONSTANT(4), a);
    vec t = 1 / (1 + a);
    vec small = CONSTANT(7.882497112e-05f);
    small = small * square + -8.018854993e-04f;
    small = small * square + 5.189311943e-03f;
    small = small * square + -2.685432880e-02f;
    small = small * square + 1.128359746e-01f;
    small = small * square + -3.761262690e-01f;
    small = small * square + 1.128379166e+00f;
    vec large = CONSTANT(8.489471006e-01f);
    large = large * t + -2.981995609e+00f;
    large = large * t + 4.180174145e+00f;
    large = large * t + -2.578364859e+00f;
    large = large * t + 1.926150509e-01f;
    large = large * t + 2.096646411e-01f;
    large = large * t + 5.703842131e-01f;
    large = large * t + 5.639606472e-01f;
    large = 1 - exponential(-a * a) * t * large;
    return pick(absolute(x) < 1, small * x, pick(x < 0, -large, large));
}
#else
#define EACH(NAME, FUNCTION)                              \
    INLINE vec NAME(vec x) {                              \
        for (int i = 0; i < LANES; i++) x[i] = FUNCTION(x[i]); \
        return x;                                         \
    }
EACH(exponential, exp)
EACH(tangent, tanh)
EACH(error_function, erf)
#endif

INLINE vec root(vec x) {
    for (int i = 0; i < LANES; i++) x[i] = SINGLE ? sqrtf(x[i]) : sqrt(x[i]);
    return x;
}

/* The activation of z, and its derivative there. */
INLINE vec activate(const int which, vec z, vec *slope) {
    vec one = CONSTANT(1), zero = CONSTANT(0), s;
    switch (which) {
        case RELU: *slope = pick(z <= 0, zero, one); return pick(z < 0, zero, z);
        case LEAKY_RELU: *slope = pick(z > 0, one, CONSTANT(0.01)); return pick(z > 0, z, z * (real)0.01);
        case GELU:
            s = (real)0.5 * (1 + error_function(z * (real)0.70710678118654752440));
            *slope = s + z * exponential(z * z * (real)-0.5) * (real)0.39894228040143267794;
            return z * s;
        case SILU: s = 1 / (1 + exponential(-z)); *slope = s * (1 + z * (1 - s)); return z * s;
        case TANH: s = tangent(z); *slope = 1 - s * s; return s;
        case SIGMOID: s = 1 / (1 + exponential(-z)); *slope = s * (1 - s); return s;
        default: *slope = one; return z;
    }
}

#define EACH_ACTIVATION(DO) DO(RELU) DO(LEAKY_RELU) DO(GELU) DO(SILU) DO(TANH) DO(SIGMOID) DO(IDENTITY)

/* a[rows, columns] becomes its activation, slopes its derivative (unless NULL), and column `columns` of a becomes 1. */
static void activate_all(i64 which, i64 rows, i64 columns, i64 ld, real *a, real *slopes) {
    i64 n = vectors(columns);
#define CASE(NAME)                                                          \
    case NAME:                                                              \
        for (i64 r = 0; r < rows; r++)                                      \
            for (i64 v = 0; v < n; v++) {                                   \
                vec *at = (vec *)(a + r * ld) + v, slope;                   \
                *at = activate(NAME, *at, &slope);                          \
                if (slopes) *((vec *)(slopes + r * ld) + v) = slope;        \
            }                                                               \
        break;
    switch (which) { EACH_ACTIVATION(CASE) }
#undef CASE
    for (i64 r = 0; r < rows; r++) a[r * ld + columns] = 1;
}

/* ---- head ---- */

INLINE real largest(vec x) {
    real most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most || x[i] != x[i] ? x[i] : most;
    return most;
}

INLINE real total(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

/* Logits [rows, C] to their loss's gradient in place, times weight. Returns the sum of the losses if asked for it. */
static double head_gradient(i64 rows, i64 classes, i64 ld, real *z, const i64 *labels, real weight, int want_loss) {
    i64 n = vectors(classes);
    vec lane, sum;
    double losses = 0;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    /* The padding of the last vector must not be the largest and weighs nothing. */
    mask valid = lane + (real)((n - 1) * LANES) < (real)classes;
    for (i64 r = 0; r < rows; r++) {
        vec *at = (vec *)(z + r * ld);
        at[n - 1] = pick(valid, at[n - 1], CONSTANT(-INFINITY));
        vec most = at[0];
        for (i64 v = 1; v < n; v++) most = pick(at[v] > most, at[v], most);
        real top = largest(most), own = z[r * ld + labels[r]];
        sum = CONSTANT(0);
        for (i64 v = 0; v < n; v++) {
            vec e = exponential(at[v] - top);
            if (v == n - 1) e = pick(valid, e, CONSTANT(0));
            at[v] = e;
            sum += e;
        }
        real all = total(sum), scale = weight / all;
        for (i64 v = 0; v < n; v++) at[v] *= scale;
        z[r * ld + labels[r]] -= weight;
        if (want_loss) losses += log((double)all) + ((double)top - (double)own);
    }
    return losses;
}

/* ---- sample order: the permutation of sampling.py, bit for bit ---- */

INLINE u32 mix(u32 h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ h >> 16;
}

INLINE u32 turn(u32 half, u32 modulus, u32 other, u32 key, u32 r) {
    u32 h = mix((other * 0x85EBCA6Bu + key) ^ (0x9E3779B9u * (r + 1)));
    u32 moved = half + (u32)((uint64_t)h * modulus >> 32), wrapped = moved - modulus;
    return moved < wrapped ? moved : wrapped;
}

INLINE u32 feistel(u32 x, u32 a, u32 b, u32 even, u32 odd, int rounds) {
    u32 high = (u32)((double)(int32_t)x / (double)(int32_t)a), low = x - high * a;
    for (int r = 0; r < rounds; r += 2) {
        low = turn(low, a, high, even, (u32)r);
        high = turn(high, b, low, odd, (u32)r + 1);
    }
    return low + high * a;
}

/* The samples at `count` places of the concatenated epochs, from place `first` on; at most BLOCK. */
static void draw(const model *m, i64 first, i64 count, i64 *out) {
    u32 n = (u32)m->n, a = (u32)sqrt((double)(m->n - 1)), x[BLOCK], even[BLOCK], odd[BLOCK];
    while ((uint64_t)a * a > n - 1) a--;
    while ((uint64_t)(a + 1) * (a + 1) <= n - 1) a++;
    a++;
    u32 b = (n + a - 1) / a, epoch = (u32)(first / m->n), position = (u32)(first % m->n);
    u32 key0 = (u32)m->key[0], key1 = (u32)m->key[1], hashed = mix(epoch * 0x9E3779B9u + key0);
    for (i64 i = 0; i < count; i++) {
        if (position == n) position = 0, epoch++, hashed = mix(epoch * 0x9E3779B9u + key0);
        x[i] = position++;
        even[i] = mix(hashed ^ key1);
        odd[i] = mix(hashed + key1);
    }
    if (n > 6) {
        for (i64 i = 0; i < count; i++) x[i] = feistel(x[i], a, b, even[i], odd[i], 12);
        for (i64 i = 0; i < count; i++)
            while (x[i] >= n) x[i] = feistel(x[i], a, b, even[i], odd[i], 12);
    } else {
        for (i64 i = 0; i < count; i++)
            do x[i] = feistel(x[i], a, b, even[i], odd[i], 24);
            while (x[i] >= n);
    }
    for (i64 i = 0; i < count; i++) out[i] = x[i];
}

/* ---- a pass over a block of samples ---- */

typedef struct {
    real *inputs;  /* [B, pitch(I)] */
    real *hidden;  /* [L][B, pitch(H)] */
    real *slopes;  /* [L][B, pitch(H)] */
    real *deltas;  /* [2][B, pitch(max(H, C))] */
    real *turned;  /* a layer's weights the other way round, in panels */
    real *grads;   /* [P] where a step takes several blocks, else [CHUNK, MOST_VECTORS * LANES] */
    i64 in, wide, out; /* pitches */
} scratch;

INLINE i64 one_block(const model *m) { return (m->batch ? m->batch : m->n) <= BLOCK; }

static i64 arrange(const model *m, real *base, scratch *s) {
    i64 most = m->width > m->classes ? m->width : m->classes, used = 0;
    s->in = pitch(m->features), s->wide = pitch(m->width), s->out = pitch(most);
    i64 turned = m->depth ? (m->depth > 1 ? most : m->classes) * vectors(m->width) * LANES : 0;
    i64 grads = one_block(m) ? CHUNK * MOST_VECTORS * LANES : parameters_size(m);
#define TAKE(NAME, SIZE) s->NAME = base + used, used += ((SIZE) + LINE - 1) / LINE * LINE
    TAKE(inputs, BLOCK * s->in);
    TAKE(hidden, m->depth * BLOCK * s->wide);
    TAKE(slopes, m->depth * BLOCK * s->wide);
    TAKE(deltas, 2 * BLOCK * s->out);
    TAKE(turned, turned);
    TAKE(grads, grads);
#undef TAKE
    return used;
}

/* Elements of scratch that training and evaluating a model take. */
i64 scratch_size(const model *m) {
    scratch s;
    return arrange(m, 0, &s);
}

static void gather(const model *m, const scratch *s, const i64 *samples, i64 count, i64 *labels) {
    for (i64 r = 0; r < count; r++) {
        real *to = s->inputs + r * s->in;
        memcpy(to, m->pool + m->rows[samples[r]] * m->features, m->features * sizeof(real));
        to[m->features] = 1;
        labels[r] = m->labels[samples[r]];
    }
}

/* Logits of the gathered samples, into deltas. */
static void forward(const model *m, const scratch *s, i64 count, int keep_slopes) {
    const real *a = s->inputs, *p = m->params;
    i64 lda = s->in;
    for (i64 layer = 0; layer < m->depth; layer++) {
        real *to = s->hidden + layer * BLOCK * s->wide;
        times_panels(count, fan_in(m, layer) + 1, m->width, a, lda, p, to, s->wide);
        activate_all(m->activation, count, m->width, s->wide, to, keep_slopes ? s->slopes + layer * BLOCK * s->wide : 0);
        a = to, lda = s->wide, p += layer_size(m, layer);
    }
    times_panels(count, fan_in(m, m->depth) + 1, m->classes, a, lda, p, s->deltas, s->out);
}

/* ---- updates, as in optim.py ---- */

typedef struct {
    real first, second;
} rates;

static rates rates_at(const model *m, i64 step) {
    if (m->optimizer == SGD) return (rates){(real)m->lr, (real)m->momentum};
    double first = 1 - pow(0.9, (double)step), second = pow(1 - pow(0.999, (double)step), -0.5);
    return (rates){(real)(m->lr / first), (real)second};
}

static void update(const model *m, i64 size, rates c, i64 offset, const real *grads, i64 count) {
    vec *p = (vec *)(m->params + offset), *one = (vec *)(m->state + offset), *two = (vec *)(m->state + size + offset);
    const vec *grad = (const vec *)grads;
    if (m->optimizer == SGD) {
        for (i64 i = 0; i < count / LANES; i++) {
            one[i] = one[i] * c.second + grad[i];
            p[i] -= one[i] * c.first;
        }
    } else {
        for (i64 i = 0; i < count / LANES; i++) {
            vec g = grad[i];
            one[i] = one[i] * (real)0.9 + g * (real)(1 - 0.9);
            two[i] = two[i] * (real)0.999 + g * g * (real)(1 - 0.999);
            p[i] -= one[i] / (root(two[i]) * c.second + (real)1e-8) * c.first;
        }
    }
}

/* The weights of a layer as panels over its inputs: [.][O][w]. */
static void turn_round(const model *m, i64 layer, const real *p, real *to) {
    i64 in = fan_in(m, layer), out = fan_out(m, layer), n = vectors(out), columns = vectors(in), w, u;
    for (i64 v = 0; v < n; v += w, p += (in + 1) * w * LANES) {
        w = panel(v, n);
        i64 some = out - v * LANES < w * LANES ? out - v * LANES : w * LANES;
        for (i64 x = 0; x < columns; x += u) {
            u = panel(x, columns);
            real *at = to + x * LANES * out + v * LANES * u * LANES;
            for (i64 c = 0; c < u * LANES; c++)
                for (i64 o = 0; o < some; o++) at[o * u * LANES + c] = x * LANES + c < in ? p[(x * LANES + c) * w * LANES + o] : 0;
        }
    }
}

/* From the gradient of the logits in deltas to all gradients: applied at once if the step is this one block, else added
 * to s->grads. */
static void backward(const model *m, const scratch *s, i64 size, rates c, i64 count) {
    real *delta = s->deltas, *other = s->deltas + BLOCK * s->out;
    i64 offset = size, direct = one_block(m), w;
    for (i64 layer = m->depth; layer >= 0; layer--) {
        i64 in = fan_in(m, layer), out = fan_out(m, layer), n = vectors(out);
        const real *a = layer ? s->hidden + (layer - 1) * BLOCK * s->wide : s->inputs;
        i64 lda = layer ? s->wide : s->in, at;
        offset -= layer_size(m, layer);
        if (layer) {
            turn_round(m, layer, m->params + offset, s->turned);
            times_panels(count, out, in, delta, s->out, s->turned, other, s->out);
            const real *slopes = s->slopes + (layer - 1) * BLOCK * s->wide;
            for (i64 r = 0; r < count; r++)
                for (i64 v = 0; v < vectors(in); v++)
                    *((vec *)(other + r * s->out) + v) *= *((const vec *)(slopes + r * s->wide) + v);
        }
        at = offset;
        for (i64 v = 0; v < n; v += w) {
            w = panel(v, n);
            if (direct) {
                for (i64 i = 0; i <= in; i += CHUNK) {
                    i64 some = in + 1 - i < CHUNK ? in + 1 - i : CHUNK;
                    product(w, some, count, a + i, 1, lda, delta + v * LANES, s->out, s->grads, w * LANES, 0);
                    update(m, size, c, at + i * w * LANES, s->grads, some * w * LANES);
                }
            } else {
                product(w, in + 1, count, a, 1, lda, delta + v * LANES, s->out, s->grads + at, w * LANES, 1);
            }
            at += (in + 1) * w * LANES;
        }
        real *swap = delta;
        delta = other, other = swap;
    }
}

/* Where the time of train goes, for benchmarks; nothing unless it is asked for. */
#ifdef PHASES
double phase_seconds[5];
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
#define PHASE(which) (phase_seconds[which] -= since, since = now(), phase_seconds[which] += since)
#else
#define PHASE(which) ((void)0)
#endif

/* Takes so many steps. */
void train(model *m, i64 steps, real *base) {
    scratch s;
    arrange(m, base, &s);
    i64 size = parameters_size(m), all = m->batch ? m->batch : m->n, samples[BLOCK], labels[BLOCK];
#ifdef PHASES
    double since = now();
#endif
    for (i64 last = m->step + steps; m->step < last; m->step++) {
        rates c = rates_at(m, m->step + 1);
        int want_loss = m->step == last - 1;
        double losses = 0;
        if (!one_block(m)) memset(s.grads, 0, size * sizeof(real));
        for (i64 begin = 0; begin < all; begin += BLOCK) {
            i64 count = all - begin < BLOCK ? all - begin : BLOCK;
            if (m->batch) draw(m, m->step * all + begin, count, samples);
            else for (i64 i = 0; i < count; i++) samples[i] = begin + i;
            PHASE(0);
            gather(m, &s, samples, count, labels);
            PHASE(1);
            forward(m, &s, count, 1);
            PHASE(2);
            losses += head_gradient(count, m->classes, s.out, s.deltas, labels, (real)(1.0 / all), want_loss);
            PHASE(3);
            backward(m, &s, size, c, count);
            PHASE(4);
        }
        if (!one_block(m)) update(m, size, c, 0, s.grads, size);
        PHASE(4);
        if (want_loss) m->loss = losses / all;
    }
}

/* Mean loss and number of samples not strictly right over the whole training set. */
void evaluate(model *m, real *base) {
    scratch s;
    arrange(m, base, &s);
    i64 samples[BLOCK], labels[BLOCK], classes = m->classes, n = vectors(classes);
    double losses = 0;
    m->wrong = 0;
    for (i64 begin = 0; begin < m->n; begin += BLOCK) {
        i64 count = m->n - begin < BLOCK ? m->n - begin : BLOCK;
        for (i64 i = 0; i < count; i++) samples[i] = begin + i;
        gather(m, &s, samples, count, labels);
        forward(m, &s, count, 0);
        for (i64 r = 0; r < count; r++) {
            real *z = s.deltas + r * s.out, own = z[labels[r]], others = -INFINITY, zeros = 0;
            for (i64 c = 0; c < classes; c++) {
                others = c != labels[r] && !(z[c] <= others) ? z[c] : others;
                zeros += z[c] * 0;
            }
            m->wrong += !(own > others);
            real top = own > others ? own : others;
            double sum = 0;
            for (i64 c = classes; c < n * LANES; c++) z[c] = -INFINITY;
            for (i64 v = 0; v < n; v++) {
                vec e = exponential(((vec *)z)[v] - top);
                for (i64 i = 0; i < LANES && v * LANES + i < classes; i++) sum += e[i];
            }
            /* An infinite logit makes the loss NaN, as in the reference. */
            losses += log(sum) + ((double)top - (double)own) + (double)zeros;
        }
    }
    m->mean_loss = losses / m->n;
}

/* The sample indices of a step, for tests: [batch]. */
void batch_of(const model *m, i64 step, i64 *out) {
    for (i64 begin = 0; begin < m->batch; begin += BLOCK)
        draw(m, step * m->batch + begin, m->batch - begin < BLOCK ? m->batch - begin : BLOCK, out + begin);
}
