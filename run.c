/* run.c - Mistral models in plain C: many sequences at once, quantized, with a sliding-window KV cache.
 *
 *   cc -O3 -march=native -fopenmp run.c -lm -o run && ./run demo/tiny-mistral-q8.bin -b 32 -n 200
 *
 * Reads like a chapter, from top to bottom; the checkpoint and the tokenizer are in model.h, the inner loops with vectors in
 * simd.h, and what is printed about a run and measured of a model in report.h:
 *   1. The mathematics   every operation of the model in plain C
 *   2. The model         one forward for any mixture of tokens and sequences
 *   3. The sampler       logits to the next id
 *   4. The batch         one loop that generates, sequences taking the slots that others leave
 *   5. The modes         generate, chat
 *   6. The command line
 *
 * Letters used throughout: n, the tokens of a call (in the products' inner loops these are T, and n the columns); dim, hidden_dim,
 * head_dim, kv_dim = n_kv_heads * head_dim; [rows, cols] = [output, input] of a matrix. Arrays are row-major, the last index
 * running fastest.
 *
 * Words: a panel is 32 rows of a matrix, interleaved (drawn in model.h); a group is 32, 64 or 128 neighbours of a row along the
 * input that share a scale and a zero: a weight is scale * (code - zero). A slot is a sequence's place in the KV cache; a run is
 * tokens of one forward that follow one another in a sequence; a span is SPAN positions whose attention is summed by itself.
 *
 * Determinism: the logits of a sequence are the same bits whatever else is in the batch, however its prompt is cut
 * in chunks and however many threads run. Two habits make it so. Every sum is added in an order that depends on the
 * model's shape and the token's position alone; and every product that is added to something is written as fmaf(),
 * one rounding, so that no compiler has the choice to contract it or not.
 *
 * C11 that is also C++17, so that run_cuda.cu can include this file. A program that includes it defines
 * RUN_NO_MAIN. */
#ifndef RUN_C
#define RUN_C
#include "model.h"
#include <getopt.h>       /* getopt_long */
#include <signal.h>       /* Ctrl-C */
#include <stddef.h>       /* offsetof */
#include <sys/resource.h> /* getrusage: peak memory */
#include <time.h>         /* clock_gettime */
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
#endif

static double now(void) {               /* seconds */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- what runs a model: declared here, because a backend is chosen before its parts are defined ------------------- */

typedef struct State State;             /* caches and activations: section 2 */

/* A token on its way into the model: at position pos of the sequence in slot `slot`; want: its logits are wanted. */
typedef struct { int id; size_t pos, slot; bool want; } Token;

/* What becomes of a wanted token's logits: with `random` from [0, 1), the next id. */
typedef struct { double random; int id; } Draw;

/* What runs a model. The CPU's stands here; run_cuda.cu has a GPU's. */
struct Backend {
    const char *name;
    size_t best_chunk;                  /* more tokens than this in a forward bring no more speed */
    void (*load)(Model *m);             /* takes the weights of a model that was just mapped, where they must go elsewhere */
    void (*unload)(Model *m);
    void (*open)(State *s);             /* makes room for caches and activations; new_state() has filled in what describes them,
                                           of which this may widen head_width, and position_bytes with it */
    void (*close)(State *s);
    /* a step of the model over n <= s->chunk tokens; logits: [wanted tokens, vocab_size] */
    void (*forward)(State *s, const Token *tokens, size_t n, float *logits);
    /* the same, and instead of logits the next ids; draws: [wanted tokens], in their order */
    void (*step)(State *s, const Token *tokens, size_t n, Draw *draws, float temperature, float top_p);
    double (*peak)(const State *s);     /* bytes of memory, at most so far */
};
static void cpu_open(State *s), cpu_close(State *s), forward(State *s, const Token *tokens, size_t n, float *logits);
static void cpu_step(State *s, const Token *tokens, size_t n, Draw *draws, float temperature, float top_p);
static double cpu_peak(const State *s);
enum { CHUNK = 256 };   /* most tokens of one sequence in a forward: a cache's ring has room for so many */
static const Backend CPU = {"cpu", CHUNK, NULL, NULL, cpu_open, cpu_close, forward, cpu_step, cpu_peak};
static const Backend *backend = &CPU;   /* which load_model() gives a model */

/* A checkpoint, given to the backend; dies if anything is wrong with it. */
static Model load_model(const char *path) {
    Model m = map_model(path);
    m.backend = backend;
    if (backend->load) backend->load(&m);
    return m;
}

static void free_model(Model *m) {
    if (m->backend->unload) m->backend->unload(m);
    unmap_model(m);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 1. The mathematics                                                                                                */

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

/* FP16 to FP32, exact. An FP16 number's bits, moved to where FP32 has its exponent and mantissa, are the number times
 * 2^-112 (the difference of the exponents' biases); that holds for subnormal numbers too. No infinities: checkpoints
 * and caches have none. */
static inline float half_to_float(uint16_t h) {
    float magnitude = as_float((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    return as_float(as_bits(magnitude) | (uint32_t)(h & 0x8000) << 16);
}

static inline const float *halves_to_floats_plain(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = half_to_float(in[i]);
    return out;
}

/* FP32 to FP16, to nearest, ties to even; beyond +-65504 it stays there (NaN becomes that). Adding and taking away a number 2^13
 * times as large leaves of the FP32 mantissa the 10 bits that FP16 keeps; below 2^-14, whose bits are 113 << 23, it keeps fewer,
 * since its steps stay as they are there. */
static inline uint16_t float_to_half(float x) {
    float a = fminf(fabsf(x), 65504.0f);
    uint32_t exponent = as_bits(a) & 0x7f800000;
    float magic = as_float((exponent < 113u << 23 ? 113u << 23 : exponent) + (13u << 23));
    float rounded = (a + magic) - magic;
    return (uint16_t)((as_bits(x) >> 16 & 0x8000) | as_bits(rounded * 0x1p-112f) >> 13);
}

/* 1.5 * 2^23: added to a number of less than 2^22 it leaves no bits for a fraction, so that the sum is rounded to a whole number;
 * and the sum's bits are those of ROUNDER plus that number. */
#define ROUNDER 12582912.0f
#define ROUNDER_BITS 0x4b400000u

/* e^x to 2e-7, relative; clamped to where the result is a normal number (NaN to one end or the other). x log2 e = n + r with |r|
 * <= 1/2, and e^x = 2^n 2^r; of the polynomials of this degree that are 1 at 0 it has the smallest relative error. Our own because
 * a compiler vectorises it, and because libm's differs from one machine to the next (as those of FP64 do too, in the last bit,
 * which rounding to FP32 nearly always hides: RoPE uses them). Clamped as integers, which takes one instruction for each end. */
static inline float fast_exp(float x) {
    uint32_t low = as_bits(-87.0f), bits = as_bits(x);
    int32_t high = (int32_t)as_bits(88.0f), clamped;
    bits = bits < low ? bits : low;             /* the bits of negative floats are larger, the more so the lower they are */
    clamped = (int32_t)bits < high ? (int32_t)bits : high;
    x = as_float((uint32_t)clamped);
    float shifted = fmaf(x, 1.44269502f, ROUNDER), n = shifted - ROUNDER;
    float r = fmaf(x, 1.925963e-8f, fmaf(x, 1.44269502f, -n));      /* log2 e in two parts */
    float p = 1.326472731e-3f;
    p = fmaf(p, r, 9.671512991e-3f);
    p = fmaf(p, r, 5.550733581e-2f);
    p = fmaf(p, r, 2.402224243e-1f);
    p = fmaf(p, r, 6.931470037e-1f);
    p = fmaf(p, r, 1.0f);
    return as_float(as_bits(p) + (as_bits(shifted) << 23));         /* n added to the exponent; ROUNDER_BITS << 23 is 0 */
}

/* out = weight * x / sqrt(mean(x^2) + eps), all [n]. Zhang and Sennrich 2019. 16 partial sums, so that it vectorises. */
static void rms_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    float partial[16] = {0}, sum = 0;
    for (size_t i = 0; i < n / 16 * 16; i += 16)
        for (size_t j = 0; j < 16; j++) partial[j] = fmaf(x[i + j], x[i + j], partial[j]);
    for (size_t i = n / 16 * 16; i < n; i++) partial[i % 16] = fmaf(x[i], x[i], partial[i % 16]);
    for (size_t j = 0; j < 16; j++) sum += partial[j];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (size_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * scale);
}

/* Turns each pair (x[i], x[i + half]) of a head by the angle of its position; rotation: [half][cos, sin].
 * Su et al. 2021, eq. 34, with Hugging Face's pairing of the two halves of a head. */
static void rope(float *x, const float *rotation, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float c = rotation[2 * i], s = rotation[2 * i + 1], a = x[i], b = x[i + half];
        x[i]        = fmaf(a, c, -(b * s));
        x[i + half] = fmaf(b, c, a * s);
    }
}

/* h = silu(gate) * up = gate / (1 + e^-gate) * up. gate, up: [hidden_dim] each, one after the other. */
static void swiglu(float *h, const float *gate_up, size_t hidden_dim) {
    for (size_t i = 0; i < hidden_dim; i++)
        h[i] = gate_up[i] / (1.0f + fast_exp(-gate_up[i])) * gate_up[hidden_dim + i];
}

/* The largest magnitude among [n] numbers. Floats without their sign order as their bits do, and a compiler vectorises those. */
static inline float largest_of(const float *x, size_t n) {
    uint32_t max = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = as_bits(x[i]) & 0x7fffffff;
        max = magnitude > max ? magnitude : max;
    }
    return as_float(max);
}

/* n activations rounded to int8: x[i] is about *scale * q[i]; *sum is that of the q, by which the weights' zero is multiplied.
 * x: [n]; q: [group], 0 from n on. */
static void quantize_activations(int8_t *q, float *scale, float *sum, const float *x, size_t n, size_t group) {
    int32_t total = 0;
    float largest = largest_of(x, n), inverse = largest > 0 ? 127.0f / largest : 0;
    for (size_t i = 0; i < n; i++) {
        int32_t rounded = (int32_t)(as_bits(fmaf(x[i], inverse, ROUNDER)) - ROUNDER_BITS);
        q[i] = (int8_t)rounded;
        total += q[i];                          /* not `rounded`: where 127 / largest is infinite that is huge, and q is 0 */
    }
    memset(q + n, 0, group - n);
    *scale = largest / 127.0f;
    *sum = (float)total;
}

/* The sixteen codes of nf4 as codes of q8: quantiles of a normal distribution v (Dettmers et al. 2023, appendix E), as the whole
 * numbers nearest to 128 + 127 v. A weight is then scale * (code - 128), the largest of a group being 127 * scale. */
static const uint8_t NF4_CODES[16] __attribute__((aligned(16))) = {
    1, 40, 61, 78, 92, 105, 116, 128, 138, 148, 159, 171, 184, 199, 220, 255};

/* The codes of one group of one panel as bytes, [n / 4][32 rows][4 columns]: q8 has them so, q4 and nf4 two in a byte, of row r
 * in the low half and of row r + 16 in the high one. Returns where they are, which may be `room`. */
static const uint8_t *unpack_codes(uint8_t *room, int type, const uint8_t *packed, size_t n) {
    if (type == Q8) return packed;
    for (size_t k = 0; k < n; k += 4, packed += 2 * PANEL)
        for (size_t i = 0; i < 2 * PANEL; i++) {
            room[k * PANEL + i] = packed[i] & 15;
            room[(k + 2) * PANEL + i] = packed[i] >> 4;     /* 16 rows of 4 columns further on */
        }
    if (type == NF4) for (size_t i = 0; i < round_up(n, 4) * PANEL; i++) room[i] = NF4_CODES[room[i]];
    return room;
}

/* Codes as unpack_codes() leaves them, aligned to 4 bytes, to FP32, [n][32]. */
static void codes_to_floats(float *out, const uint8_t *codes, size_t n) {
    typedef uint32_t __attribute__((may_alias)) Word;   /* a row's four columns: what a compiler vectorises */
    const Word *words = (const Word *)codes;
    for (size_t k = 0; k < n; k++)
        for (size_t r = 0; r < PANEL; r++)
            out[k * PANEL + r] = (float)(int32_t)(words[k / 4 * PANEL + r] >> 8 * (k % 4) & 255);
}

/* (Skip this on a first reading: no result depends on it.) What a product asks memory for while it computes, a little at a
 * time, so that it is in the second-level cache when its turn comes: half of `bytes` from `at` on, and in turn with it the other
 * half from `at` + `apart` on (a multiple of 64, so that no line is in both). In two places, because in one neither instructions
 * nor the processor's own prefetching, which ends with each page of 4 KB, keep enough under way (SPEED.md, Asking in two places). A
 * number, not a pointer, since it may be an address where nothing is: asking for that is no error. */
typedef struct { uintptr_t at; size_t bytes, apart; } Ahead;

/* out[t][r] = sum over k of w[k][r] * x[t][k], added in the order of k, for T tokens and the 32 rows of a panel; with `add`
 * out[t][r] += it. w: [n][32], FP32 or FP16, as type says; x: T rows, `stride` apart; out: [T][32]. */
__attribute__((unused))
static void number_tiles_plain(size_t T, bool add, int type, float *out, const void *w, const float *x, size_t stride, size_t n,
                               Ahead ahead) {
    (void)ahead;
    for (size_t t = 0; t < T; t++) {
        float sum[PANEL] = {0}, room[PANEL];
        for (size_t k = 0; k < n; k++) {
            const float *row = type == F16 ? halves_to_floats_plain(room, (const uint16_t *)w + k * PANEL, PANEL)
                                           : (const float *)w + k * PANEL;
            for (size_t r = 0; r < PANEL; r++) sum[r] = fmaf(row[r], x[t * stride + k], sum[r]);
        }
        for (size_t r = 0; r < PANEL; r++) out[t * PANEL + r] = (add ? out[t * PANEL + r] : 0) + sum[r];
    }
}

/* Activations on their way into a product, as they are or, for quantized weights, rounded. A group's tokens lie side by
 * side: with rows a power of two apart, as a token's whole input would have them, they would share few lines of the
 * first-level cache. As matmul() lays them out; attention()'s last group may be narrower: see group_at(). */
typedef struct {
    float  *x;                          /* [n_groups, n, group] */
    int8_t *q;                          /* [n_groups, n, group]; matmul()'s in the same memory; with a cache of Q16 int16 */
    float  *scale, *sum;                /* [n_groups, n] */
} Activations;

/* A group's part of a product: total[t][r] = scale[r] * a.scale[t] * (sum over k of code[r][k] * a.q[t][k] - zero[r] * a.sum[t]);
 * with `add` total[t][r] += it. The sum over k is of integers, and exact. total: [T][32], T <= 64; codes: as in the file, or of
 * unpack_codes() and then of type Q8, aligned to 64 bytes, or of type Q16, which are int16, [n / 2][32 rows][2 columns]; scale:
 * [32], zero after it; a: of this group, q [T, n]; n: a multiple of 32. With Q16 q is int16 as well, and zero and a.sum are 0. */
__attribute__((unused))
static void group_product_plain(size_t T, bool add, float *total, int type, const uint8_t *codes, const float *scale, Activations a,
                                size_t n, Ahead ahead) {
    uint8_t room[MAX_GROUP * PANEL];
    const int16_t *wide_codes = (const int16_t *)codes, *wide_q = (const int16_t *)a.q;         /* of Q16 */
    if (type != Q16) codes = unpack_codes(room, type, codes, n);
    (void)ahead;
    for (size_t t = 0; t < T; t++, total += PANEL) {
        int32_t sum[PANEL] = {0};
        for (size_t k = 0; k < n; k++)
            for (size_t r = 0; r < PANEL; r++)
                sum[r] += type == Q16 ? wide_codes[(k / 2 * PANEL + r) * 2 + k % 2] * wide_q[t * n + k]
                                      : codes[(k / 4 * PANEL + r) * 4 + k % 4] * a.q[t * n + k];
        for (size_t r = 0; r < PANEL; r++) {
            float of_codes = fmaf(-scale[PANEL + r], a.sum[t], (float)sum[r]);
            total[r] = fmaf(scale[r] * a.scale[t], of_codes, add ? total[r] : 0);
        }
    }
}

#include "simd.h"         /* the last two and halves_to_floats() again, with vectors, without _plain: skip it on a first reading */

/* One group of one panel as FP32, out: [n][32]: the weights themselves for f32 and f16, else the codes. */
static void unpack_group(float *out, int type, const unsigned char *block, size_t n) {
    uint8_t room[MAX_GROUP * PANEL] __attribute__((aligned(4)));
    if (type == F32) memcpy(out, block, n * PANEL * sizeof(float));
    else if (type == F16) halves_to_floats(out, (const uint16_t *)block, n * PANEL);
    else codes_to_floats(out, unpack_codes(room, type, block + 4 * PANEL, n), n);
}

/* The products of panel `panel` with T <= 64 of n tokens, t from `first` on: out[t][row] = sum over k of w[row][k] * x[t][k]; out:
 * [n, rows]. Of the groups from `from` to `to` - 1, added to what `out` has of those before, group by group: its sum, or for
 * quantized weights scale * scale_x * (sum - zero * sum_x). And those of panel + apart, where there is one, with T <= 32: the two
 * panels take turns, a group each. */
static void panel_products(float *out, const Matrix *w, size_t panel, size_t apart, const Activations *a, size_t n, size_t first,
                           size_t T, size_t from, size_t to) {
    float totals[BLOCK * PANEL], scale[2 * PANEL], *total = totals;
    bool two = panel + apart < w->n_panels;     /* then the first one's products ask for the first halves of both next blocks, */
    size_t half = w->block_bytes / 2, other = apart * w->panel_bytes;               /* and the second one's for the second */
    for (size_t p = panel; p < w->n_panels && from > 0; p += apart)
        for (size_t t = 0; t < T; t++, total += PANEL)
            memcpy(total, out + (first + t) * w->rows + p * PANEL, min_size(PANEL, w->rows - p * PANEL) * sizeof(float));
    total = totals;
    for (size_t g = from; g < to; g++, total = totals)
        for (size_t p = panel; p < w->n_panels; p += apart, total += T * PANEL) {
            const unsigned char *block = w->data + p * w->panel_bytes + g * w->block_bytes;
            size_t at = g * n + first, k = g * w->group, n_k = min_size(w->group, w->cols - k);
            uintptr_t ahead = (uintptr_t)block + w->block_bytes + 8192;     /* 8 KB: SPEED.md, one sequence on a CPU */
            Ahead next = {p > panel ? ahead + half - other : ahead, w->block_bytes, two ? other : half};
            if (w->type < Q8) {
                number_tiles(T, g > 0, w->type, total, block, a->x + at * w->group, w->group, n_k, next);
                continue;
            }
            const uint8_t *codes = block + 4 * PANEL;
            Activations part = {NULL, a->q + at * w->group, a->scale + at, a->sum + at};
            halves_to_floats(scale, (const uint16_t *)block, 2 * PANEL);
            group_product(T, g > 0, total, w->type, codes, scale, part, w->group, next);
        }
    for (size_t p = panel; p < w->n_panels; p += apart)
        for (size_t t = 0; t < T; t++, total += PANEL)
            memcpy(out + (first + t) * w->rows + p * PANEL, total, min_size(PANEL, w->rows - p * PANEL) * sizeof(float));
}

/* out[t] = w x[t] for n tokens. out: [n, rows], x: [n, cols]; `a` is room for the activations. With few tokens a thread that has
 * several panels goes through two at once: some memory answers faster to readers in two places (SPEED.md). Columns are taken in
 * passes, so that the activations that all panels are multiplied with stay in a second-level cache of 2 MB. */
enum { PASS_BYTES = 1 << 20 };          /* of activations */
static void matmul(float *out, const float *x, const Matrix *w, Activations *a, size_t n) {
    #pragma omp parallel for schedule(static) if (n > 1)
    for (size_t t = 0; t < n; t++)
        for (size_t g = 0; g < w->n_groups; g++) {
            size_t at = g * n + t, k = g * w->group, n_k = min_size(w->group, w->cols - k);
            if (w->type < Q8) memcpy(a->x + at * w->group, x + t * w->cols + k, n_k * sizeof(float));
            else quantize_activations(a->q + at * w->group, a->scale + at, a->sum + at, x + t * w->cols + k, n_k, w->group);
        }
    for (size_t first = 0; first < n; first += BLOCK) {
        size_t T = min_size(BLOCK, n - first);
        bool pairs = 2 * T <= BLOCK && w->n_panels >= 4 * (size_t)omp_get_max_threads();
        size_t apart = pairs ? (w->n_panels + 1) / 2 : w->n_panels;
        size_t pass = PASS_BYTES / (T * w->group * (w->type < Q8 ? sizeof(float) : 1));
        for (size_t from = 0, to; from < w->n_groups; from = to) {
            to = min_size(from + pass, w->n_groups);
            #pragma omp parallel for schedule(guided)   /* not equal shares: a core that others use too is slower */
            for (size_t panel = 0; panel < apart; panel++) panel_products(out, w, panel, apart, a, n, first, T, from, to);
        }
    }
}

/* out[cols] = row `row` of a matrix in FP32: looks a token up in the embedding. */
static void matrix_row(float *out, const Matrix *w, size_t row) {
    float weights[MAX_GROUP * PANEL];
    size_t r = row % PANEL;
    for (size_t g = 0; g < w->n_groups; g++) {
        const unsigned char *block = w->data + row / PANEL * w->panel_bytes + g * w->block_bytes;
        size_t k = g * w->group, n_k = min_size(w->group, w->cols - k);
        unpack_group(weights, w->type, block, n_k);
        float scale = w->type >= Q8 ? half_to_float(((const uint16_t *)block)[r]) : 1;
        float zero = w->type >= Q8 ? half_to_float(((const uint16_t *)block)[PANEL + r]) : 0;
        for (size_t i = 0; i < n_k; i++) out[k + i] = scale * (weights[i * PANEL + r] - zero);
    }
}

/* The cache of one key head of one sequence: a ring of positions, p at place p % ring, cut into blocks of KEYS places. Both keys
 * and values are panels of 32 rows, so that attention is two products: keys are [KEYS / 32][width][32], the rows being positions;
 * values are [width / 32][KEYS][32], the rows being a head's elements. They are FP32, or codes behind the block's KEYS FP16
 * scales, one of each position, the columns that fill 4 bytes side by side for each row:
 *   Q8    x is about scale * (code - 128), as weights are
 *   Q16   x is about scale * code / 64, the code an int16 of at most 64 * 127 = 8128 in magnitude. It takes the place of FP16: its
 *         products are as exact or more so, and made twice as fast, by instructions that add two (SPEED.md, Long prompts).
 * The other factor of a product, queries or shares of values, is rounded as well. With Q16 to int16, with a scale for each group
 * of up to 128 that keeps each code within 32767 and the sum of their magnitudes within 264128: times 8128 that is less than 2^31,
 * so that every sum is exact. The 64 above shares the 31 bits out: 13 to the codes of the cache, and to the other factor 11 where
 * all of a group are of one size (264128 / 128 = 2063), up to 15 where few are large. */
enum { KEYS = 128 };
typedef struct {
    unsigned char *keys, *values;
    int    type;                        /* F32, Q16 or Q8 */
    size_t ring;                        /* places, a multiple of KEYS */
    size_t head_dim, width;             /* width: head_dim rounded up to a multiple of 32 */
    size_t position_bytes;              /* of a position's key, or value */
} Cache;

static size_t number_bytes(int type) { return type == Q8 ? 1 : type == F32 ? 4 : 2; }          /* of a number of a cache */
static size_t scale_bytes(int type) { return type < Q8 ? 0 : sizeof(uint16_t); }               /* of a position of a cache */
static size_t position_bytes(int type, size_t width) { return width * number_bytes(type) + scale_bytes(type); }

/* x as whole numbers up to 127 * steps and its scale, an FP16 number, which is returned, rounded up so that the largest fits: x[i]
 * is about scale * q[i] / steps. [n] each. */
static uint16_t quantize_kv(int16_t *q, const float *x, size_t n, float steps) {
    float least = largest_of(x, n) / 127.0f, end = 127.0f * steps;
    uint16_t scale = float_to_half(least);
    scale += half_to_float(scale) < least && scale < 0x7bff;
    float inverse = scale ? steps / half_to_float(scale) : 0;
    for (size_t i = 0; i < n; i++) {
        float v = x[i] * inverse;
        v = v < end ? v : end;                  /* beyond what FP16 can scale, and NaN */
        v = (v > -end ? v : -end) + ROUNDER;
        q[i] = (int16_t)(as_bits(v) - ROUNDER_BITS);
    }
    return scale;
}

/* Stores the key, rotated, and the value of a position, [head_dim] each. Elements from head_dim to width are left as they are:
 * queries have zeros there, and what becomes of the values there is not read. */
static void cache_store(Cache c, size_t pos, const float *key, const float *value) {
    size_t place = pos % c.ring, j = place % KEYS, side = 4 / number_bytes(c.type);     /* side: columns side by side */
    int16_t q[MAX_HEAD_DIM];
    for (int i = 0; i < 2; i++) {           /* the position is a row of the keys and a column of each 32 elements of the values */
        unsigned char *block = (i ? c.values : c.keys) + (place - j) * c.position_bytes;
        const float *x = i ? value : key;
        if (c.type != F32) ((uint16_t *)block)[j] = quantize_kv(q, x, c.head_dim, c.type == Q8 ? 1 : 64);
        block += KEYS * scale_bytes(c.type);
        for (size_t d = 0; d < c.head_dim; d++) {
            size_t panel = i ? d / PANEL * KEYS * PANEL : j / PANEL * c.width * PANEL;
            size_t row = (i ? d : j) % PANEL, column = i ? j : d, at = panel + (column / side * PANEL + row) * side + column % side;
            if (c.type == Q8) block[at] = (unsigned char)(q[d] + 128);
            else if (c.type == Q16) ((int16_t *)block)[at] = q[d];
            else ((float *)block)[at] = x[d];
        }
    }
}

/* The first position that the token at pos attends to; window 0 is none. */
static inline size_t first_seen(size_t pos, size_t window) { return window && pos >= window ? pos - window + 1 : 0; }

/* Of a query's scores over a set of keys: the largest, or a number up to 16 below it, and the sum of e^(score - max). The sum of
 * e^(score - max) times the values stands beside it, in an `out`; the one divided by the other is attention's result. */
typedef struct { float max, sum; } Softmax;

/* Adds what a query found among other keys, so that a then stands for both sets: with max the larger of both maxima, out_a becomes
 * e^(a.max - max) out_a + e^(b.max - max) out_b, and the sums likewise. out_a: [head_dim]; out_b: pieces of 32 elements, `apart`
 * floats from one another. */
static void merge_softmax(Softmax *a, float *out_a, Softmax b, const float *out_b, size_t apart, size_t head_dim) {
    if (b.sum == 0) return;             /* it may see none of them */
    float max = a->max > b.max ? a->max : b.max, shrink_a = fast_exp(a->max - max), shrink_b = fast_exp(b.max - max);
    for (size_t d = 0; d < head_dim; d += PANEL, out_b += apart)
        for (size_t i = d; i < min_size(d + PANEL, head_dim); i++) out_a[i] = fmaf(out_b[i - d], shrink_b, out_a[i] * shrink_a);
    a->sum = fmaf(b.sum, shrink_b, a->sum * shrink_a);
    a->max = max;
}

/* The sum of [32] numbers, four sums side by side: in this order everywhere, and gcc, left to itself, takes them one by one. */
static inline float sum_lanes(const float *x) {
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    const Four *v = (const Four *)x;
    Four sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The largest of a query's scores for a block's n keys. scores: in panels of 32, `apart` floats from one another; the keys j0 to
 * j1 - 1 are seen, and of the others the scores become -INFINITY. Found among integers, which a compiler vectorises: floats order
 * as their bits do, once all bits of negative ones but the sign are inverted. */
static float largest_score(float *scores, size_t apart, size_t n, size_t j0, size_t j1) {
    int32_t largest[PANEL], most = INT32_MIN;
    for (size_t r = 0; r < PANEL; r++) largest[r] = most;
    for (size_t j = 0; j < n; j += PANEL, scores += apart) {
        if (j < j0 || j + PANEL > j1)
            for (size_t r = 0; r < PANEL; r++) scores[r] = j + r < j0 || j + r >= j1 ? -INFINITY : scores[r];
        for (size_t r = 0; r < PANEL; r++) {
            int32_t bits = (int32_t)as_bits(scores[r]), ordered = bits ^ (bits >> 31 & INT32_MAX);
            largest[r] = ordered > largest[r] ? ordered : largest[r];
        }
    }
    for (size_t r = 0; r < PANEL; r++) most = largest[r] > most ? largest[r] : most;
    return as_float((uint32_t)(most ^ (most >> 31 & INT32_MAX)));
}

/* Of numbers: the largest magnitude, and the sum of all magnitudes. */
typedef struct { float largest, sum; } Magnitude;

/* Of x [n], n a multiple of 32. */
static Magnitude magnitude(const float *x, size_t n) {
    float sum[PANEL] = {0};
    for (size_t i = 0; i < n; i += PANEL)
        for (size_t r = 0; r < PANEL; r++) sum[r] += fabsf(x[i + r]);
    Magnitude m = {largest_of(x, n), sum_lanes(sum)};
    return m;
}

/* A query's shares e^(score - max) of a block's n keys, 0 where nothing is seen: added to lanes [32], that of key j to lane j % 32;
 * and times the scales of the values [n] to out [n], whose magnitude is returned (found in the same pass: SPEED.md, Long prompts).
 * scores, apart, j0, j1: as above. */
static Magnitude exponentials(float *out, float *lanes, const float *scores, size_t apart, size_t n, const float *scale, float max,
                              size_t j0, size_t j1) {
    float e[PANEL], sum[PANEL], sum_out[PANEL] = {0};
    uint32_t largest_out[PANEL] = {0}, most_out = 0;
    for (size_t r = 0; r < PANEL; r++) sum[r] = lanes[r];
    for (size_t j = 0; j < n; j += PANEL, scores += apart, scale += PANEL, out += PANEL) {
        for (size_t r = 0; r < PANEL; r++) e[r] = fast_exp(scores[r] - max);
        if (j < j0 || j + PANEL > j1)   /* fast_exp(-INFINITY) is e^-87; where nothing was seen yet, -INFINITY - -INFINITY is NaN */
            for (size_t r = 0; r < PANEL; r++) e[r] = j + r < j0 || j + r >= j1 ? 0 : e[r];
        for (size_t r = 0; r < PANEL; r++) {
            out[r] = e[r] * scale[r];
            sum[r] += e[r];
            sum_out[r] = fmaf(e[r], scale[r], sum_out[r]);
            largest_out[r] = as_bits(out[r]) > largest_out[r] ? as_bits(out[r]) : largest_out[r];
        }
    }
    for (size_t r = 0; r < PANEL; r++) most_out = largest_out[r] > most_out ? largest_out[r] : most_out;
    for (size_t r = 0; r < PANEL; r++) lanes[r] = sum[r];
    Magnitude m = {as_float(most_out), sum_lanes(sum_out)};
    return m;
}

/* Of activations in groups of up to 128 for T queries, q being [n / 128][T][up to 128], scale and sum [n / 128][T]: the group of
 * column k on, k a multiple of 128. */
static Activations group_at(const Activations *a, int type, size_t T, size_t k) {
    size_t at = k / MAX_GROUP * T;
    Activations group = {NULL, a->q + T * k * number_bytes(type), a->scale + at, a->sum + at};
    return group;
}

/* A group of a query, or of its shares, as a cache of this type is multiplied with it, as row r of the group. x: [n], of magnitude
 * m; n: a multiple of 32. 264000 and 1/2 for each of 128 is 264064; what FP32 loses is less than 1. Where a scale would be so
 * small that FP32 has few digits for it, and codes might not fit, or is no number, all codes are 0. Of Q8 the largest is found
 * again. */
static void quantize_query(int type, Activations group, size_t r, const float *x, size_t n, Magnitude m) {
    if (type == Q8) { quantize_activations(group.q + r * n, group.scale + r, group.sum + r, x, n, n); return; }
    int16_t *q = (int16_t *)group.q + r * n;
    float by_sum = m.sum * (1.0f / 264000), by_largest = m.largest * (1.0f / INT16_MAX);
    float scale = by_sum > by_largest ? by_sum : by_largest, inverse = 1.0f / scale;
    for (size_t i = 0; i < n; i++) q[i] = (int16_t)(as_bits(fmaf(x[i], inverse, ROUNDER)) - ROUNDER_BITS);
    if (!(scale > 1e-30f)) memset(q, 0, n * sizeof *q);
    group.scale[r] = scale * (1.0f / 64);       /* in which the cache counts */
    group.sum[r] = 0;                           /* no code has a zero to take off */
}

enum { QUERIES = BLOCK,     /* most queries in one call of attention() */
       SPAN = 512 };        /* positions that are summed by themselves and then merged, so that threads can share a long context */

/* out[t][r] = sum over k of panel[k][r] * x[t][k], for T <= 64 queries and the 32 rows r of a cache's panel, [n][32]; with `add`
 * out[t][r] += it. Of FP32 x is a->x, `stride` apart; of codes it is what quantize_query() made of it, 0 from n up to a multiple of
 * 32, and scale has the rows' 32 scales, then their 32 zeros. out: [T][32]. */
static void cache_product(size_t T, bool add, float *out, int type, const unsigned char *panel, const float *scale,
                          const Activations *a, size_t stride, size_t n, Ahead ahead) {
    if (type == F32) number_tiles(T, add, F32, out, panel, a->x, stride, n, ahead);
    else for (size_t k = 0; k < n; k += MAX_GROUP) {
        size_t n_k = min_size(n - k, MAX_GROUP);
        Ahead of_group = {ahead.at + ahead.bytes * k / n / 2, ahead.bytes * n_k / n, ahead.apart};
        group_product(T, add || k > 0, out, type, panel + k * PANEL * number_bytes(type), scale, group_at(a, type, T, k),
                      round_up(n_k, PANEL), of_group);
    }
}

/* scores[j / 32][query][32] = queries times the keys of positions j < n of a block; n: a multiple of 32. */
static void block_scores(float *scores, const Activations *queries, size_t n_queries, Cache c, const unsigned char *keys,
                         size_t n) {
    float scale[2 * PANEL];                                     /* and zeros: of Q8 the code 128 */
    const uint16_t *scales = (const uint16_t *)keys;
    size_t panel_bytes = PANEL * c.width * number_bytes(c.type);
    for (size_t i = 0; i < PANEL; i++) scale[PANEL + i] = c.type == Q8 ? 128 : 0;
    keys += KEYS * scale_bytes(c.type);
    for (size_t j = 0; j < n; j += PANEL, keys += panel_bytes, scores += n_queries * PANEL) {
        Ahead next = {(uintptr_t)keys + panel_bytes, panel_bytes, panel_bytes / 2};
        if (c.type != F32) halves_to_floats(scale, scales + j, PANEL);
        cache_product(n_queries, false, scores, c.type, keys, scale, queries, c.width, c.head_dim, next);
    }
}

/* sums[d / 32][query][32] = shares times the values of the first n positions of a block, whose scales, if they have some, are in
 * the shares; with `add` += it. */
static void add_values(float *sums, bool add, const Activations *shares, size_t n_queries, Cache c, const unsigned char *values,
                       size_t n) {
    float scale[2 * PANEL];                                     /* 1, and zeros: of Q8 the code 128 */
    size_t panel_bytes = KEYS * PANEL * number_bytes(c.type);
    for (size_t i = 0; i < PANEL; i++) { scale[i] = 1; scale[PANEL + i] = c.type == Q8 ? 128 : 0; }
    values += KEYS * scale_bytes(c.type);
    for (size_t d = 0; d < c.width; d += PANEL, values += panel_bytes) {
        size_t bytes = round_up(panel_bytes * n / KEYS, 128);      /* whole lines in both halves */
        Ahead next = {(uintptr_t)values + panel_bytes, bytes, bytes / 2};
        cache_product(n_queries, add, sums + d * n_queries, c.type, values, scale, shares, KEYS, n, next);
    }
}

/* Attention of n_tokens neighbouring tokens of a sequence, the first at position pos, in n_heads query heads that share a key
 * head, n_tokens * n_heads <= 64, over the positions from `from` to `to` - 1, multiples of SPAN but for the ends.
 *   q        [n_tokens][q_stride], of which the first n_heads * head_dim are the queries
 *   softmax  [n_tokens][stride], out: [n_tokens][stride][head_dim], of which the first n_heads are written
 *   window   0 for none
 * By the book, of each query: sum over s of e^(q . k_s / sqrt(head_dim)) v_s, divided by the sum of e^(q . k_s / sqrt(head_dim)),
 * s being the positions that it sees (Vaswani et al. 2017, eq. 1; test_all.c has it so).
 * Streams over blocks of keys with a running maximum (Milakov and Gimelshein 2018, algorithm 3; FlashAttention, Dao et al. 2022),
 * anew in each span, so that spans may be given to several threads. Blocks and spans lie at multiples of KEYS and SPAN: the order
 * of addition does not depend on how the prompt was cut. The maximum that shares e^(score - max) are relative to is raised only
 * where a block's is more than 16 above it: all that matters is that e^ stays within FP32. A block's places that a token does not
 * see hold 0, or what cache_store() left there. With a cache of codes queries are rounded to integers too, and so are, of each
 * block, the shares times the values' scales (with Q8 to int8, so that what is lost is at most 1/254 of the block's largest for
 * each key). Takes some 450 KB of the thread's stack, with what it calls. */
static void attention(Softmax *softmax, float *out, size_t stride, const float *q, size_t q_stride, Cache c, size_t n_tokens,
                      size_t n_heads, size_t pos, size_t window, size_t from, size_t to) {
    float query[QUERIES * MAX_HEAD_DIM], scores[QUERIES * KEYS], share[QUERIES * KEYS], sums[QUERIES * MAX_HEAD_DIM],
          lanes[QUERIES][PANEL], value_scale[KEYS], max[QUERIES], factor = 1.0f / sqrtf((float)c.head_dim);
    int16_t query_codes[QUERIES * MAX_HEAD_DIM], share_codes[QUERIES * KEYS];
    float query_scale[QUERIES * MAX_HEAD_DIM / MAX_GROUP], query_sum[QUERIES * MAX_HEAD_DIM / MAX_GROUP];
    float share_scale[QUERIES], share_sum[QUERIES];             /* of one group: KEYS <= MAX_GROUP */
    Activations queries = {query, (int8_t *)query_codes, query_scale, query_sum};
    Activations shares = {share, (int8_t *)share_codes, share_scale, share_sum};
    size_t n_queries = n_tokens * n_heads;
    for (size_t j = 0; j < KEYS; j++) value_scale[j] = 1;
    for (size_t r = 0; r < n_queries; r++) {
        const float *from_q = q + r / n_heads * q_stride + r % n_heads * c.head_dim;
        float *x = query + r * c.width;
        size_t at = r / n_heads * stride + r % n_heads;
        for (size_t d = 0; d < c.width; d++) x[d] = d < c.head_dim ? factor * from_q[d] : 0;
        for (size_t k = 0; k < c.width && c.type != F32; k += MAX_GROUP) {
            size_t n = min_size(c.width - k, MAX_GROUP);
            quantize_query(c.type, group_at(&queries, c.type, n_queries, k), r, x + k, n, magnitude(x + k, n));
        }
        memset(out + at * c.head_dim, 0, c.head_dim * sizeof(float));
        softmax[at].max = -INFINITY;
        softmax[at].sum = 0;
    }
    for (size_t span = from / SPAN * SPAN; span < to; span += SPAN) {
        size_t begin = max_size(span, from / KEYS * KEYS);      /* where sums begin, which need not be 0 before */
        memset(lanes, 0, n_queries * sizeof *lanes);
        for (size_t r = 0; r < n_queries; r++) max[r] = -INFINITY;
        for (size_t start = begin; start < min_size(to, span + SPAN); start += KEYS) {
            size_t n_keys = min_size(KEYS, to - start), n = round_up(n_keys, PANEL);
            size_t at = start % c.ring * c.position_bytes;
            const unsigned char *keys = c.keys + at, *values = c.values + at;
            block_scores(scores, &queries, n_queries, c, keys, n);
            if (c.type != F32) halves_to_floats(value_scale, (const uint16_t *)values, KEYS);
            for (size_t r = 0; r < n_queries; r++) {
                float *of_keys = scores + r * PANEL, *of_r = share + (c.type == F32 ? r * KEYS : 0);     /* codes use one row up */
                size_t p = pos + r / n_heads, first = first_seen(p, window), apart = n_queries * PANEL;
                size_t j1 = p < start ? 0 : min_size(p - start + 1, n), j0 = first > start ? min_size(first - start, j1) : 0;
                float largest = largest_score(of_keys, apart, n, j0, j1);
                if (largest > max[r] + 16) {
                    float shrink = fast_exp(max[r] - largest);
                    max[r] = largest;
                    for (size_t i = 0; i < PANEL; i++) lanes[r][i] *= shrink;
                    for (size_t d = 0; d < c.width && start > begin; d += PANEL)
                        for (size_t i = 0; i < PANEL; i++) sums[d * n_queries + r * PANEL + i] *= shrink;
                }
                Magnitude m = exponentials(of_r, lanes[r], of_keys, apart, n, value_scale, max[r], j0, j1);
                if (c.type != F32) quantize_query(c.type, shares, r, of_r, n, m);
            }
            add_values(sums, start > begin, &shares, n_queries, c, values, n_keys);
        }
        for (size_t r = 0; r < n_queries; r++) {
            size_t at = r / n_heads * stride + r % n_heads;
            Softmax of_span = {max[r], sum_lanes(lanes[r])};
            merge_softmax(&softmax[at], out + at * c.head_dim, of_span, sums + r * PANEL, n_queries * PANEL, c.head_dim);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. The model                                                                                                      */

enum { EMBEDDING, NORM, WQKV, ROPE, ATTENTION, WO, W13, SWIGLU, W2, CLASSIFIER, SAMPLING, N_OPERATIONS };
static const char *const OPERATION_NAMES[] = {"embedding", "norms, residuals", "wqkv", "rope, cache", "attention", "wo", "w13",
                                              "swiglu", "w2", "classifier", "sampling"};
typedef struct { double seconds, operations, bytes; } Profile;

/* Tokens of one forward that follow one another in a sequence: they share its keys in attention. */
typedef struct { size_t first, n; } Run;
enum { UNITS = 64 };                    /* attention is split over keys where tokens and heads make fewer than so many pieces */

/* What a model needs to run: the caches of n_slots sequences and the activations of one forward. */
struct State {
    const Model *model;
    size_t n_slots, chunk;              /* sequences at once; most tokens in one forward */
    void *device;                       /* what another backend than the CPU keeps here; it has no use for most of the rest */
    bool decoding;                      /* this step is no prefill: matters to a GPU */
    bool profiled;                      /* -P: a backend that would lose time by measuring times may do so */
    size_t ring;                        /* cached positions of a sequence */
    size_t head_width;                  /* head_dim rounded up to a multiple of 32 (a GPU: to 32, 64 or 128) */
    size_t kv_bytes, position_bytes;    /* of all caches; of a position's key, or value */
    unsigned char *keys, *values;       /* [n_layers, n_slots, n_kv_heads, ring * position_bytes] */
    double  *frequencies;               /* [head_dim / 2], radians a position */
    float   *rotations;                 /* [chunk, head_dim / 2][cos, sin] */
    float   *x, *xb;                    /* [chunk, dim]: the residual stream; its norm, or what is added to it */
    float   *qkv;                       /* [chunk, (n_heads + 2 n_kv_heads) head_dim] */
    float   *att;                       /* [spans, n, n_heads head_dim]; attention over one span of positions, or all */
    Softmax *softmax;                   /* [spans, n, n_heads] */
    Run     *runs;                      /* [chunk] */
    float   *h13, *h;                   /* [BLOCK, 2 hidden_dim], [BLOCK, hidden_dim] */
    Activations activations;            /* room for the widest input of a product */
    Profile profile[N_OPERATIONS];
    double  clock;                      /* when the last operation ended */
    double  bytes;                      /* of weights and caches, read so far */
    float  *logits;                     /* of step(), [logits_room] */
    size_t  logits_room;
    /* NULL, or sees each product, out and x being of n tokens from `first` on: for calibrate.h */
    void   (*watch)(void *watcher, int operation, const float *out, const float *x, size_t first, size_t n);
    void    *watcher;
};

/* Room for n_slots sequences of up to `context` positions and forwards of up to `chunk` tokens, CHUNK of one sequence. With a
 * window the ring holds window + CHUNK - 1 positions: when the last of CHUNK tokens is stored, the first still finds its window. */
static State new_state(const Model *m, size_t n_slots, size_t context, size_t chunk) {
    const Header *c = &m->c;
    State s;
    memset(&s, 0, sizeof s);
    s.model = m;
    s.n_slots = n_slots;
    s.chunk = chunk;
    s.head_width = round_up(c->head_dim, PANEL);
    s.ring = round_up(c->window ? min_size(context, (size_t)c->window + min_size(chunk, CHUNK) - 1) : context, KEYS);
    s.position_bytes = position_bytes(m->kv_type, s.head_width);
    s.runs = (Run *)allocate(chunk, sizeof(Run), m->path);
    s.frequencies = (double *)allocate(c->head_dim / 2, sizeof(double), m->path);
    for (size_t i = 0; i < c->head_dim / 2; i++) s.frequencies[i] = pow(c->rope_theta, -2.0 * (double)i / c->head_dim);
    m->backend->open(&s);
    return s;
}

static void free_state(State *s) {
    free(s->runs);
    free(s->frequencies);
    s->model->backend->close(s);
}

/* Bytes of the caches, or dies if they are more than `memory`, which `machine` has. */
static size_t cache_bytes(const State *s, double memory, const char *machine) {
    const Header *c = &s->model->c;
    size_t position = s->position_bytes * 2 * c->n_layers * c->n_kv_heads, bytes = 0;
    double need = (double)position * (double)s->ring * (double)s->n_slots;
    if (__builtin_mul_overflow(s->ring * s->n_slots, position, &bytes) || need > memory)
        die("%s: the KV cache of %zu sequences of %zu positions takes %.1f GB, %s has %.1f: lower -b or -c",
            s->model->path, s->n_slots, s->ring, need / 1e9, machine, memory / 1e9);
    return bytes;
}

/* Query heads of a key head that one call of attention() takes: all of them, but where they are more than QUERIES. */
static size_t heads_at_once(const Header *c) { return min_size(c->n_heads / c->n_kv_heads, QUERIES); }

static double memory_bytes(void) { return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE); }    /* of the machine */

static void cpu_open(State *s) {
    const Model *m = s->model;
    const Header *c = &m->c;
    size_t chunk = s->chunk, q_dim = (size_t)c->n_heads * c->head_dim, kv_dim = (size_t)c->n_kv_heads * c->head_dim;
    size_t heads = heads_at_once(c);
    s->kv_bytes = cache_bytes(s, memory_bytes(), "this machine");
    /* mapped: zeros that take no place until they are written */
    s->keys = (unsigned char *)mmap(NULL, s->kv_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s->keys == MAP_FAILED) die("%s: no memory for a KV cache of %.1f GB: lower -b or -c", m->path, (double)s->kv_bytes / 1e9);
    s->values = s->keys + s->kv_bytes / 2;

    size_t widest = round_up(max_size(max_size(q_dim, c->hidden_dim), c->dim), MAX_GROUP);
    /* as many tokens as attention splits over keys (see forward), times their spans */
    size_t split = max_size(min_size((UNITS - 1) / c->n_kv_heads * (QUERIES / heads), chunk) * (s->ring / SPAN + 2), chunk);
    s->att = (float *)calloc(split * q_dim, sizeof(float));     /* zeros that take no place, as the caches */
    if (!s->att) die("%s: no memory for the attention of %zu positions: lower -c", m->path, s->ring);
    s->softmax = (Softmax *)allocate(split * c->n_heads, sizeof(Softmax), m->path);
    struct { float **array; size_t width; } of_tokens[] = {     /* [chunk, width] */
        {&s->rotations, c->head_dim}, {&s->x, c->dim}, {&s->xb, c->dim}, {&s->qkv, q_dim + 2 * kv_dim},
        {&s->activations.x, widest}, {&s->activations.scale, widest / 32}, {&s->activations.sum, widest / 32}};
    for (size_t i = 0; i < sizeof of_tokens / sizeof *of_tokens; i++)
        *of_tokens[i].array = (float *)allocate(chunk * of_tokens[i].width, sizeof(float), m->path);
    s->activations.q = (int8_t *)s->activations.x;
    s->h13 = (float *)allocate((size_t)BLOCK * 2 * c->hidden_dim, sizeof(float), m->path);
    s->h = (float *)allocate((size_t)BLOCK * c->hidden_dim, sizeof(float), m->path);
}

static void cpu_close(State *s) {
    munmap(s->keys, s->kv_bytes);
    void *all[] = {s->rotations, s->x, s->xb, s->qkv, s->att, s->softmax, s->h13, s->h,
                   s->activations.x, s->activations.scale, s->activations.sum, s->logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* The process's largest resident size. Linux's getrusage counts what it was before exec, too. */
static double cpu_peak(const State *s) {
    struct rusage usage;
    char line[128];
    double kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    (void)s;
    while (f && !kb && fgets(line, sizeof line, f)) sscanf(line, "VmHWM: %lf", &kb);
    if (f) fclose(f);
    if (kb) return kb * 1024;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_maxrss;     /* bytes on macOS, which has no /proc */
}

static Cache slot_cache(const State *s, size_t layer, size_t slot, size_t kv_head) {
    const Header *c = &s->model->c;
    size_t at = ((layer * s->n_slots + slot) * c->n_kv_heads + kv_head) * s->ring * s->position_bytes;
    Cache cache = {s->keys + at, s->values + at, s->model->kv_type, s->ring, c->head_dim, s->head_width, s->position_bytes};
    return cache;
}

/* Books what was computed and read under an operation. */
static void count(State *s, int operation, double operations, double bytes) {
    s->profile[operation].operations += operations;
    s->profile[operation].bytes += bytes;
    s->bytes += bytes;
}

/* The same, and the time since the last call. */
static void book(State *s, int operation, double operations, double bytes) {
    double t = now();
    count(s, operation, operations, bytes);
    s->profile[operation].seconds += t - s->clock;
    s->clock = t;
}

/* A product of n of the step's tokens, from `first` on, where out and x begin (the classifier's are those that are wanted). What is
 * booked as read is the weights, once for all parts: what must be read. */
static void product(State *s, int operation, float *out, const float *x, const Matrix *w, size_t first, size_t n) {
    matmul(out, x, w, &s->activations, n);
    if (s->watch) s->watch(s->watcher, operation, out, x, first, n);
    book(s, operation, 2.0 * (double)n * (double)w->rows * (double)w->cols, first ? 0 : (double)w->bytes);
}

/* x += xb, then xb = norm of x, for n tokens: what an operation left in xb joins the residual stream, which is then the
 * next one's input. */
static void add_and_norm(State *s, const Matrix *weight, size_t n) {
    const Header *c = &s->model->c;
    #pragma omp parallel for schedule(static) if (n > 1)
    for (size_t i = 0; i < n; i++) {
        float *x = s->x + i * c->dim, *xb = s->xb + i * c->dim;
        for (size_t j = 0; j < c->dim; j++) x[j] += xb[j];
        rms_norm(xb, x, (const float *)weight->data, c->dim, c->norm_eps);
    }
    book(s, NORM, 0, 0);
}

/* Finds the runs among the n tokens of a forward, of `most` tokens at most, and returns their number. n_keys: how many keys the
 * tokens see; n_reads: how many are read from memory, for a run once; n_spans: over how many spans of positions a run's keys go
 * at most. */
static size_t find_runs(Run *runs, const Token *tokens, size_t n, size_t most, size_t window, size_t span, double *n_keys,
                        double *n_reads, size_t *n_spans) {
    size_t n_runs = 0;
    *n_keys = *n_reads = 0;
    *n_spans = 1;
    for (size_t i = 0; i < n; i++) {
        Run *r = n_runs ? &runs[n_runs - 1] : NULL;
        size_t pos = tokens[i].pos, first = first_seen(pos, window);
        if (!r || r->n == most || tokens[i].slot != tokens[i - 1].slot || pos != tokens[i - 1].pos + 1) {
            r = &runs[n_runs++];
            r->first = i;
            r->n = 0;
        }
        *n_reads += r->n++ ? 1 : (double)(pos + 1 - first);
        *n_keys += (double)(pos + 1 - first);
        size_t run_spans = pos / span - first_seen(tokens[r->first].pos, window) / span + 1;
        *n_spans = max_size(*n_spans, run_spans);
    }
    return n_runs;
}

/* One step of the model over n <= s->chunk tokens, of one sequence CHUNK at most, their ids below vocab_size. Prefill is n tokens
 * of one sequence, decoding one token of each sequence; any mixture is fine, as long as a sequence's tokens come in the order of
 * their positions and none is left out. A token sees what its sequence has cached, and the tokens of this call before it. logits:
 * [count of want, vocab_size], in the tokens' order; NULL if none is wanted. */
static void forward(State *s, const Token *tokens, size_t n, float *logits) {
    const Model *m = s->model;
    const Header *c = &m->c;
    size_t dim = c->dim, head_dim = c->head_dim, q_dim = c->n_heads * head_dim, kv_dim = c->n_kv_heads * head_dim;
    size_t qkv_dim = q_dim + 2 * kv_dim, q_per_kv = c->n_heads / c->n_kv_heads, n_spans;
    size_t heads = heads_at_once(c), parts = (q_per_kv + heads - 1) / heads;
    double n_keys, n_reads;
    s->clock = now();
    /* attention's work is cut into units: a run of tokens, a key head, and up to `heads` of its query heads; where these are fewer
     * than UNITS, each is cut further, into its spans of positions */
    size_t n_runs = find_runs(s->runs, tokens, n, QUERIES / heads, c->window, SPAN, &n_keys, &n_reads, &n_spans);
    size_t units = n_runs * c->n_kv_heads * parts;
    if (units >= UNITS) n_spans = 1;

    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        matrix_row(s->x + i * dim, &m->token_embedding, (size_t)tokens[i].id);
        memset(s->xb + i * dim, 0, dim * sizeof(float));            /* add_and_norm() adds it first */
        for (size_t j = 0; j < head_dim / 2; j++) {
            double angle = (double)tokens[i].pos * s->frequencies[j];
            s->rotations[i * head_dim + 2 * j] = (float)cos(angle);
            s->rotations[i * head_dim + 2 * j + 1] = (float)sin(angle);
        }
    }
    book(s, EMBEDDING, 0, 0);

    for (size_t l = 0; l < c->n_layers; l++) {
        const Layer *w = &m->layers[l];

        /* attention: norm, queries, keys and values of all heads, their rotation */
        add_and_norm(s, &w->rms_att_weight, n);
        product(s, WQKV, s->qkv, s->xb, &w->wqkv, 0, n);
        #pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n * c->n_kv_heads; i++) {        /* a token's key head and its query heads */
            size_t t = i / c->n_kv_heads, h = i % c->n_kv_heads;
            float *q = s->qkv + t * qkv_dim + h * q_per_kv * head_dim, *k = s->qkv + t * qkv_dim + q_dim + h * head_dim;
            for (size_t j = 0; j < q_per_kv; j++) rope(q + j * head_dim, s->rotations + t * head_dim, head_dim / 2);
            rope(k, s->rotations + t * head_dim, head_dim / 2);
            cache_store(slot_cache(s, l, tokens[t].slot, h), tokens[t].pos, k, k + kv_dim);
        }
        book(s, ROPE, 0, 0);

        #pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < units * n_spans; i++) {          /* i: [key head][part of its query heads][run][span] */
            size_t span = i % n_spans, unit = i / n_spans, part = unit / n_runs % parts, kv_head = unit / n_runs / parts;
            const Run *r = &s->runs[unit % n_runs];
            size_t h = kv_head * q_per_kv + part * heads, n_heads = min_size(heads, (kv_head + 1) * q_per_kv - h);
            size_t pos = tokens[r->first].pos, from = first_seen(pos, c->window), to = pos + r->n;
            if (n_spans > 1) {
                to = min_size(to, (from / SPAN + span + 1) * SPAN);
                from = span ? (from / SPAN + span) * SPAN : from;
            }
            size_t at = (span * n + r->first) * c->n_heads + h;
            attention(s->softmax + at, s->att + at * head_dim, c->n_heads, s->qkv + r->first * qkv_dim + h * head_dim, qkv_dim,
                      slot_cache(s, l, tokens[r->first].slot, kv_head), r->n, n_heads, pos, c->window, from, to);
        }
        #pragma omp parallel for schedule(static) if (n > 1)
        for (size_t i = 0; i < n * c->n_heads; i++) {
            float *out = s->att + i * head_dim;
            for (size_t j = i + n * c->n_heads; j < n_spans * n * c->n_heads; j += n * c->n_heads)
                merge_softmax(&s->softmax[i], out, s->softmax[j], s->att + j * head_dim, PANEL, head_dim);
            float inverse = 1.0f / s->softmax[i].sum;
            for (size_t d = 0; d < head_dim; d++) out[d] *= inverse;
        }
        book(s, ATTENTION, 4.0 * n_keys * (double)q_dim, 2.0 * n_reads * (double)(c->n_kv_heads * s->position_bytes));
        product(s, WO, s->xb, s->att, &w->wo, 0, n);

        /* feed-forward: norm, gate and up, SwiGLU, down; BLOCK tokens at a time, so that what is widest stays in the third-level
         * cache */
        add_and_norm(s, &w->rms_ffn_weight, n);
        for (size_t first = 0; first < n; first += BLOCK) {
            size_t some = min_size(BLOCK, n - first);
            product(s, W13, s->h13, s->xb + first * dim, &w->w13, first, some);
            #pragma omp parallel for schedule(static) if (some > 1)
            for (size_t i = 0; i < some; i++) swiglu(s->h + i * c->hidden_dim, s->h13 + i * 2 * c->hidden_dim, c->hidden_dim);
            book(s, SWIGLU, 0, 0);
            product(s, W2, s->xb + first * dim, s->h, &w->w2, first, some);
        }
    }

    size_t n_want = 0;                  /* the wanted tokens move together, then the final norm and their logits */
    for (size_t i = 0; i < n; i++)
        if (tokens[i].want) {
            memmove(s->x + n_want * dim, s->x + i * dim, dim * sizeof(float));
            memmove(s->xb + n_want++ * dim, s->xb + i * dim, dim * sizeof(float));
        }
    add_and_norm(s, &m->rms_final_weight, n_want);
    if (n_want) product(s, CLASSIFIER, logits, s->xb, &m->wcls, 0, n_want);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. The sampler                                                                                                    */

/* A uniform number in [0, 1). SplitMix64 (Steele et al. 2014): neighbouring seeds give unrelated streams. */
static double uniform(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

/* The next id, drawn from softmax(logits / temperature) cut to the smallest set of most probable ids that holds top_p
 * of the mass (Holtzman et al. 2019); of temperature or top_p 0 it is the most probable. logits: [n],
 * overwritten; random: from [0, 1). Nothing is sorted. Positive FP32 numbers order as their bits do, and those up to 1 have 30; the
 * smallest probability in the set is found by 10 of them at a time, from the top, summing the mass above each digit. */
static int sample(float *logits, size_t n, float temperature, float top_p, double random) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++) if (logits[i] > logits[best]) best = i;
    if (temperature == 0 || top_p == 0) return (int)best;

    float *p = logits, max = logits[best], scale = fminf(1.0f / temperature, 1e38f);      /* no infinity, which times 0 is NaN */
    double total = 0, above = 0;        /* mass of all ids, and of those that are known to be in the set */
    for (size_t i = 0; i < n; i++) p[i] = fast_exp((logits[i] - max) * scale);
    for (size_t i = 0; i < n; i++) total += p[i];
    double limit = top_p < 1 ? top_p * total : INFINITY;
    uint32_t smallest = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        double mass[1024] = {0};
        for (size_t i = 0; i < n; i++)
            if (as_bits(p[i]) >> shift >> 10 == smallest) mass[as_bits(p[i]) >> shift & 1023] += p[i];
        uint32_t digit = 1023;
        while (digit && above + mass[digit] < limit) above += mass[digit--];
        smallest = smallest << 10 | digit;
    }
    /* of the ids that have just this probability as many as are needed, in the order of ids */
    double each = as_float(smallest), equal = top_p < 1 ? ceil((limit - above) / each) : (double)n;
    double end = top_p < 1 ? fmin(fma(equal, each, above), total) : total, r = random * end, passed = 0;
    for (size_t i = 0; i < n && passed <= r; i++) {
        uint32_t bits = as_bits(p[i]);
        if (bits < smallest || (bits == smallest && equal-- < 1))
            continue;                   /* not in the set, or one of this probability too many */
        passed += p[i];
        best = i;                       /* the last of the set, should rounding leave r beyond it */
    }
    return (int)best;
}

/* forward(), and of each wanted token the next id. */
static void cpu_step(State *s, const Token *tokens, size_t n, Draw *draws, float temperature, float top_p) {
    size_t vocab = s->model->c.vocab_size, n_want = 0;
    for (size_t i = 0; i < n; i++) n_want += tokens[i].want;
    s->logits = (float *)grow(s->logits, n_want * vocab, &s->logits_room, sizeof(float));
    forward(s, tokens, n, s->logits);
    #pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n_want; i++)
        draws[i].id = sample(s->logits + i * vocab, vocab, temperature, top_p, draws[i].random);
    book(s, SAMPLING, 0, 0);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 4. The batch                                                                                                      */

/* What the command line says; section 6 has the meanings. */
typedef struct {
    const char *path, *mode, *prompt, *file, *system, *output, *against, *chat_template, *kv;
    size_t   batch, tokens, prompt_tokens, seed, context, threads, warmup, repeat, skip, lookup;
    double   temperature, top_p, target;
    bool     ignore_eos, profile, quiet, no_mmap, help;
    FILE    *json;                      /* of -o, opened before the work begins */
} Options;

/* A prompt and what was generated after it. */
typedef struct {
    int     *ids;
    size_t   n_ids, room, n_prompt;     /* ids so far, the prompt's among them */
    size_t   n_fed;                     /* ids that the model has seen */
    size_t   n_guess, pause, wait;      /* --lookup: how many to guess next; steps without after none was right; left of them */
    size_t   limit;                     /* stops when n_ids reaches it */
    uint64_t rng;
    double   last;                      /* when its last token came */
    const char *finish;                 /* NULL while it runs; "eos", "length" or "context" */
} Sequence;

static void push_id(Sequence *q, int id) {
    q->ids = (int *)grow(q->ids, q->n_ids, &q->room, sizeof(int));
    q->ids[q->n_ids++] = id;
}

static void push_text(Sequence *q, const Tokenizer *t, const char *text, size_t n) {
    size_t n_ids;
    int *ids = encode(t, text, n, &n_ids);
    for (size_t i = 0; i < n_ids; i++) push_id(q, ids[i]);
    free(ids);
}

/* Guesses what comes next (prompt lookup, Saxena 2023; speculative decoding, Leviathan et al. 2023): where the last three ids
 * stood before, the last time, what followed them there, up to `most` ids. Puts them behind the ids, uncounted; returns how many. A
 * step that checks guesses takes longer than one that does not, so they become more while they are right, and after a step with
 * none right there are none for a while, 3 steps, then 9, up to 63. */
static size_t guess(Sequence *q, size_t most) {
    enum { MATCH = 3 };
    if (!most || q->n_ids <= MATCH || q->n_ids == q->n_prompt || q->n_ids + 1 >= q->limit) return 0;
    if (q->wait) { q->wait--; return 0; }
    size_t last = q->n_ids - MATCH, at = last, n = 0;
    do {
        if (!at) return 0;
    } while (memcmp(q->ids + --at, q->ids + last, MATCH * sizeof(int)));
    most = min_size(min_size(most, q->n_guess ? q->n_guess : 1), q->limit - 1 - q->n_ids);
    q->ids = (int *)grow(q->ids, q->n_ids + most, &q->room, sizeof(int));
    for (; n < most; n++) q->ids[q->n_ids + n] = q->ids[at + MATCH + n];      /* may run on into what it guessed itself */
    return n;
}

/* After a step that checked guesses: how many to make next, and for how many steps none. */
static void learn(Sequence *q, size_t n_guessed, size_t n_right) {
    if (!n_guessed) return;
    q->n_guess = n_right == n_guessed ? 2 * n_right : n_right;
    q->pause = n_right ? 0 : min_size(2 * q->pause + 3, 63);
    q->wait = q->pause;
}

static volatile sig_atomic_t interrupted;            /* by this signal, which asks for an end */

#include "report.h"       /* what a run counts, shows and reports; perplexity, accuracy */

/* Runs sequences until each has finished: the loop of this program. A sequence takes a slot (a place in the KV cache)
 * and leaves it to the next one when it ends. A step feeds the model, of each slot, the ids it has not seen: one id of
 * a sequence that generates, many of a prompt. While any slot has prompt left, only prompts are fed: a step is either
 * prefill or decoding, and can be timed as such. The last id's logits give the next id; where the next ones were guessed
 * (--lookup) they are fed with it, and stay as far as they are what is drawn. d: NULL to show nothing. */
static void generate(State *s, Sequence *sequences, size_t n_sequences, const Options *o, Statistics *statistics, Display *d) {
    const Tokenizer *t = &s->model->tokenizer;
    size_t next = 0, n_running = 0, most = min_size(o->lookup, s->chunk / s->n_slots - 1);       /* guesses a sequence */
    Sequence **slots = (Sequence **)allocate(s->n_slots, sizeof *slots, "slots");
    Sequence **wanted = (Sequence **)allocate(s->n_slots * (most + 1), sizeof *wanted, "slots");      /* whose logits come back */
    Token *tokens = (Token *)allocate(s->chunk, sizeof *tokens, "tokens");
    Draw *draws = (Draw *)allocate(s->n_slots * (most + 1), sizeof *draws, "draws");
    Pass *pass = &statistics->pass;
    double start = now(), before = start, all = 0, done = 0;
    for (size_t i = 0; i < n_sequences; i++) all += (double)(sequences[i].limit - sequences[i].n_fed);

    while (!interrupted) {
        bool prefill = false;
        size_t n = 0, n_want = 0;
        for (size_t i = 0; i < s->n_slots; i++) {
            if (!slots[i] && next < n_sequences) { slots[i] = &sequences[next++]; n_running++; }
            prefill |= slots[i] && slots[i]->n_fed < slots[i]->n_prompt;
        }
        if (!n_running) break;
        for (size_t i = 0; i < s->n_slots; i++) {
            Sequence *q = slots[i];
            if (!q || (prefill && q->n_fed >= q->n_prompt)) continue;
            uint64_t rng = q->rng;      /* from a copy, because guesses may be wrong */
            size_t n_ids = q->n_ids + guess(q, most);
            for (size_t fed = 0; q->n_fed < n_ids && n < s->chunk && fed < CHUNK; n++, fed++) {
                Token token = {q->ids[q->n_fed], q->n_fed, i, q->n_fed + 1 >= q->n_ids && q->n_ids < q->limit};
                tokens[n] = token;
                q->n_fed++;
                if (!token.want) continue;
                draws[n_want].random = uniform(&rng);
                wanted[n_want++] = q;
            }
        }
        double bytes = s->bytes;
        s->decoding = !prefill;
        s->model->backend->step(s, tokens, n, draws, (float)o->temperature, (float)o->top_p);

        double after = now();
        size_t n_new = 0;
        for (size_t i = 0, end; i < n_want; i = end) {      /* a sequence's draws: of its last id, and of those it guessed */
            Sequence *q = wanted[i];
            size_t n_right = 0;
            bool right = true;
            for (end = i + 1; end < n_want && wanted[end] == q; end++) {}
            for (size_t j = i; j < end && right && !q->finish; j++) {
                int id = draws[j].id;
                bool first = q->n_ids == q->n_prompt;
                add_sample(first ? &statistics->ttft : &statistics->itl, after - (first ? start : q->last));
                q->last = after;
                uniform(&q->rng);
                right = j + 1 < end && q->ids[q->n_ids] == id;      /* where a guess stands, the next draw was made after it */
                n_right += right;
                n_new++;
                push_id(q, id);
                if (!o->ignore_eos && id >= 0 && (id == t->eos[0] || id == t->eos[1] || id == t->eos[2])) q->finish = "eos";
            }
            learn(q, end - i - 1, n_right);
            q->n_fed = q->n_ids - 1;
        }
        done += (double)(prefill ? n : n_new);
        for (size_t i = 0; i < s->n_slots; i++) {
            Sequence *q = slots[i];
            if (!q) continue;
            if (!q->finish && q->n_ids >= q->limit && q->n_fed >= q->n_prompt)
                q->finish = q->n_ids - q->n_prompt >= o->tokens ? "length" : "context";
            if (q->finish) { slots[i] = NULL; n_running--; done += (double)(q->limit - q->n_fed); }
        }
        pass->generated_tokens += n_new;
        if (prefill) { pass->prompt_tokens += n; pass->prefill_seconds += after - before; }
        else { pass->decode_tokens += n_new; pass->decode_seconds += after - before; pass->decode_bytes += s->bytes - bytes; }
        before = after;
        if (d) display(d, t, sequences, n_sequences);
        progress(!o->quiet && !isatty(STDOUT_FILENO), "generating", done, all);
    }
    pass->total_seconds += now() - start;
    for (size_t i = 0; i < n_sequences; i++) if (!sequences[i].finish) sequences[i].finish = "length";   /* Ctrl-C */
    if (d) display(d, t, sequences, n_sequences);
    free(slots);
    free(wanted);
    free(tokens);
    free(draws);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 5. The modes                                                                                                      */

/* BOS and the prompt's ids; with -l repeated or cut to so many. */
static Sequence new_sequence(const Tokenizer *t, const Text *prompt, const Options *o, size_t index) {
    Sequence q;
    memset(&q, 0, sizeof q);
    if (t->bos >= 0) push_id(&q, t->bos);
    push_text(&q, t, prompt->text, prompt->length);
    if (!q.n_ids) die("prompt %zu: is empty, and the model has no token that begins a sequence", index + 1);
    if (o->prompt_tokens) {
        /* BOS stands once; what is repeated is the text. An empty text repeats BOS. */
        size_t from = q.n_ids > 1 && q.ids[0] == t->bos, period = q.n_ids - from;
        while (q.n_ids < o->prompt_tokens) push_id(&q, q.ids[from + (q.n_ids - from) % period]);
        q.n_ids = o->prompt_tokens;
    }
    q.n_prompt = q.n_ids;
    q.rng = o->seed + index;
    return q;
}

/* Back to the prompt, with the sequence's own stream of random numbers. */
static void start_sequence(Sequence *q, const Options *o, size_t index, size_t context) {
    q->n_ids = q->n_prompt;
    q->n_fed = 0;
    q->n_guess = q->pause = q->wait = 0;
    q->limit = min_size(q->n_prompt + o->tokens, context);
    q->rng = o->seed + index;
    q->finish = NULL;
}

/* The prompts: of -i, -b times; or the lines of -f; or what is typed, or what comes through a pipe, -b times. */
static Sequence *read_prompts(const Tokenizer *t, const Options *o, size_t *n) {
    Text text = {NULL, 0, 0};
    Sequence *sequences = NULL;
    size_t room = 0;
    FILE *f = o->file ? fopen(o->file, "rb") : NULL;
    if (o->file && !f) die("%s: %s", o->file, strerror(errno));
    if (o->prompt) append(&text, o->prompt, strlen(o->prompt));
    else if (!f && isatty(STDIN_FILENO)) { fputs("prompt: ", stderr); read_line(stdin, &text); }
    else if (!f) {
        text = read_stream(stdin, "standard input");
        if (text.length && text.text[text.length - 1] == '\n') text.text[--text.length] = 0;
    }
    for (*n = 0; f ? read_line(f, &text) : *n < o->batch; ++*n) {
        sequences = (Sequence *)grow(sequences, *n, &room, sizeof *sequences);
        sequences[*n] = new_sequence(t, &text, o, *n);
    }
    if (f ? ferror(f) : ferror(stdin) && !interrupted)
        die("%s: cannot be read: %s", f ? o->file : "standard input", strerror(errno));
    if (!*n) die("%s: holds no prompt", o->file);
    if (f) fclose(f);
    free(text.text);
    return sequences;
}

/* to becomes what from is, with ids of its own. [n] each. */
static void copy_sequences(Sequence *to, const Sequence *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        Sequence q = from[i];
        q.room = to[i].room;
        q.ids = (int *)grow(to[i].ids, q.n_ids, &q.room, sizeof(int));
        memcpy(q.ids, from[i].ids, q.n_ids * sizeof(int));
        to[i] = q;
    }
}

static bool generate_mode(const Model *m, const Options *o) {
    size_t n, need = 0, done = 0;
    Sequence *sequences = read_prompts(&m->tokenizer, o, &n);
    Sequence *kept = (Sequence *)allocate(n, sizeof *kept, "prompts");        /* as the last whole pass left them */
    Statistics statistics;
    Display d;
    memset(&statistics, 0, sizeof statistics);
    memset(&d, 0, sizeof d);
    for (size_t i = 0; i < n; i++) {
        if (o->context && sequences[i].n_prompt > o->context)
            die("prompt %zu: %zu tokens do not fit in a context of %zu: raise -c or shorten it",
                i + 1, sequences[i].n_prompt, o->context);
        if (sequences[i].n_prompt + o->tokens > need) need = sequences[i].n_prompt + o->tokens;
    }
    size_t context = o->context ? min_size(o->context, need) : need, n_slots = min_size(o->batch, n);
    State s = new_state(m, n_slots, context, max_size(n_slots, m->backend->best_chunk));
    s.profiled = o->profile;
    do {
        Pass before = statistics.pass;
        if (done == o->warmup) {
            memset(s.profile, 0, sizeof s.profile);
            statistics.ttft.n = statistics.itl.n = 0;
        }
        memset(&statistics.pass, 0, sizeof statistics.pass);
        for (size_t i = 0; i < n; i++) start_sequence(&sequences[i], o, i, context);
        generate(&s, sequences, n, o, &statistics, done ? NULL : &d);
        if (interrupted && statistics.total.n) {    /* a pass that was cut does not count, unless it is all there is */
            statistics.pass = before;
            copy_sequences(sequences, kept, n);
        } else if (interrupted || done >= o->warmup) {
            end_pass(&statistics);
            copy_sequences(kept, sequences, n);
        }
    } while (++done < o->warmup + o->repeat && !interrupted);
    bool met = report(&s, sequences, n, &statistics, o);
    for (size_t i = 0; i < n; i++) { free(sequences[i].ids); free(kept[i].ids); }
    free(sequences);
    free(kept);
    free(d.decoder.text.text);
    free_statistics(&statistics);
    free_state(&s);
    return met;
}

/* A conversation in Mistral's instruction format, one forward of new tokens after the other.
 *   v1: <s> encode("[INST] question [/INST]") answer </s> encode("[INST] ...
 *   v3: <s> [INST] encode("question") [/INST] answer </s> [INST] ...          where [INST] is a control token
 * The system prompt and an empty line stand before the first question. */
static bool chat_mode(const Model *m, const Options *o) {
    const Tokenizer *t = &m->tokenizer;
    bool v1 = o->chat_template ? !strcmp(o->chat_template, "v1") : m->c.chat_template == 1;
    int begin = find_control(t, "[INST]"), end = find_control(t, "[/INST]");
    if (!o->chat_template && !m->c.chat_template)
        die("%s: a base model, without a chat template: use -m generate, or --chat-template v1 or v3 to force one", m->path);
    if (!v1 && (begin < 0 || end < 0))
        die("%s: the tokenizer has no control tokens [INST] and [/INST]: use --chat-template v1", m->path);
    size_t context = m->c.max_positions;
    if (m->c.window || !context) context = (size_t)1 << 24;     /* as good as no end: of a window it takes no more memory */
    if (o->context) context = o->context;
    State s = new_state(m, 1, context, CHUNK);
    Text line = {NULL, 0, 0}, no_text = {NULL, 0, 0};
    Sequence q = new_sequence(t, &no_text, o, 0);
    Statistics statistics;
    bool fits = true;
    memset(&statistics, 0, sizeof statistics);
    q.finish = "length";
    for (bool first = true; !interrupted; first = false) {
        Text text = {NULL, 0, 0};
        Display d;
        memset(&d, 0, sizeof d);
        d.answers = true;
        if (isatty(STDIN_FILENO)) fputs("> ", stderr);
        if (!read_line(stdin, &line)) {
            if (ferror(stdin) && !interrupted) die("standard input: cannot be read: %s", strerror(errno));
            break;
        }
        if (!first && t->eos[0] >= 0 && strcmp(q.finish, "eos")) push_id(&q, t->eos[0]);    /* an answer that was cut */
        if (v1) append(&text, "[INST] ", 7);
        else push_id(&q, begin);
        if (first && o->system) { append(&text, o->system, strlen(o->system)); append(&text, "\n\n", 2); }
        append(&text, line.text, line.length);
        if (v1) append(&text, " [/INST]", 8);
        push_text(&q, t, text.text, text.length);
        if (!v1) push_id(&q, end);
        free(text.text);
        q.n_prompt = q.n_ids;
        fits = q.n_ids < context;
        if (!fits) break;
        q.limit = min_size(q.n_ids + o->tokens, context);
        q.finish = NULL;
        generate(&s, &q, 1, o, &statistics, &d);
        free(d.decoder.text.text);
    }
    end_pass(&statistics);
    if (!fits) fprintf(stderr, "%s: the conversation no longer fits in a context of %zu positions: raise -c\n", program, context);
    bool met = report(&s, &q, 1, &statistics, o);
    free(line.text);
    free(q.ids);
    free_statistics(&statistics);
    free_state(&s);
    return met && fits;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 6. The command line                                                                                               */

enum { MOST_THREADS = 4096 };           /* of -j; more, as of OMP_NUM_THREADS, are not tried */
enum { FLAG, TEXT, WHOLE, REAL };       /* what an option takes, and the type of its field: bool, char *, size_t, double */
typedef struct {
    int letter;                         /* 0: has a long name only */
    const char *name, *value, *help, *modes;     /* modes: first letters of those it means something in */
    int kind;
    size_t field;                       /* where in Options */
    uint64_t low, high;                 /* of numbers */
} Option;
#define FIELD(name) offsetof(Options, name)
static const Option OPTIONS[] = {
    {'m', "mode", "MODE", "generate (default), chat, perplexity, score", "gcps", TEXT, FIELD(mode), 0, 0},
    {'i', "prompt", "TEXT", "without -i a terminal is asked, a pipe is read to its end", "g", TEXT, FIELD(prompt), 0, 0},
    {'f', "file", "FILE", "generate: one prompt a line; perplexity: the text; score: items", "gps", TEXT, FIELD(file), 0, 0},
    {'b', "batch", "N", "sequences at once (1); a prompt of -i is replicated N times", "g", WHOLE, FIELD(batch), 1, 65536},
    {'n', "tokens", "N", "new tokens a sequence (128)", "gc", WHOLE, FIELD(tokens), 0, 1 << 30},
    {'l', "prompt-tokens", "N", "repeat or cut each prompt to exactly N tokens", "g", WHOLE, FIELD(prompt_tokens), 1, 1 << 30},
    {'t', "temperature", "X", "0 is greedy (0.8)", "gc", REAL, FIELD(temperature), 0, 1000},
    {'p', "top-p", "X", "sample from the most probable X of the mass (0.95)", "gc", REAL, FIELD(top_p), 0, 1},
    {'s', "seed", "N", "sequence i draws from the stream of seed N + i (42)", "gc", WHOLE, FIELD(seed), 0, UINT64_MAX},
    {'c', "context", "N", "positions a sequence (as needed; perplexity: 512, score: 4096)", "gcps", WHOLE, FIELD(context), 2,
     1 << 30},
    {'j', "threads", "N", "(the cores)", "gcps", WHOLE, FIELD(threads), 1, MOST_THREADS},
    {'w', "warmup", "N", "passes before the measured one (0)", "g", WHOLE, FIELD(warmup), 0, 1000000},
    {'r', "repeat", "N", "measured passes, the median is reported (1)", "g", WHOLE, FIELD(repeat), 1, 1000000},
    {'E', "ignore-eos", "", "generate -n tokens whatever comes", "gc", FLAG, FIELD(ignore_eos), 0, 0},
    {'y', "system", "TEXT", "chat: system prompt", "c", TEXT, FIELD(system), 0, 0},
    {0, "chat-template", "v1|v3", "chat: instead of the checkpoint's own", "c", TEXT, FIELD(chat_template), 0, 0},
    {0, "skip", "N", "perplexity: leave the first N positions of a window unscored", "p", WHOLE, FIELD(skip), 0, 1 << 30},
    {0, "against", "REF.bin", "perplexity: and divergence from this model", "p", TEXT, FIELD(against), 0, 0},
    {0, "kv", "TYPE", "KV cache: q8, or f16, which on a CPU is q16 (f16; of f32 models f32)", "gcps", TEXT, FIELD(kv), 0, 0},
    {0, "lookup", "N", "guess N tokens from the text so far: the same output, sooner (0)", "gc", WHOLE, FIELD(lookup), 0, 64},
    {0, "no-mmap", "", "read the checkpoint into memory instead of mapping it", "gcps", FLAG, FIELD(no_mmap), 0, 0},
    {'T', "target", "X", "tokens a second, in and out, to pass; prints PASS or FAIL", "gc", REAL, FIELD(target), 0, 1ull << 40},
    {'P', "profile", "", "time by operation", "gcps", FLAG, FIELD(profile), 0, 0},
    {'o', "output", "FILE", "statistics and sequences as JSON", "gcps", TEXT, FIELD(output), 0, 0},
    {'q', "quiet", "", "text only, no statistics", "gcps", FLAG, FIELD(quiet), 0, 0},
    {'h', "help", "", "", "gcps", FLAG, FIELD(help), 0, 0}};
enum { N_OPTIONS = sizeof OPTIONS / sizeof *OPTIONS };

__attribute__((noreturn, format(printf, 1, 2)))
static void usage(const char *format, ...) {        /* wrong usage: one line, exit status 2 */
    va_list args;
    char end[64];
    snprintf(end, sizeof end, " (%s --help lists the options)", program);
    va_start(args, format);
    complain(format, args, end);
    exit(2);
}

/* The number that option `name` was given as text; wrong usage unless it is one from low to high. */
static uint64_t whole_argument(const char *name, const char *text, uint64_t low, uint64_t high) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value < low || value > high)
        usage("%s %s: not a whole number from %llu to %llu", name, text, (unsigned long long)low, (unsigned long long)high);
    return value;
}

static double real_argument(const char *name, const char *text, uint64_t low, uint64_t high) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *text == ' ' || *end || !(value >= (double)low && value <= (double)high))
        usage("%s %s: not a number from %llu to %llu", name, text, (unsigned long long)low, (unsigned long long)high);
    return value;
}

static void print_help(void) {
    printf("usage: %s MODEL.bin [options]        runs a batch of prompts through a Mistral model\n", program);
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const Option *p = &OPTIONS[i];
        char name[64];
        snprintf(name, sizeof name, "--%s %s", p->name, p->value);
        if (p->letter) printf("  -%c, %-22s %s\n", p->letter, name, p->help);
        else printf("      %-22s %s\n", name, p->help);
    }
    flush_stdout();
    exit(0);
}

/* -b, or --skip where there is no letter. */
static const char *option_name(const Option *p) {
    static char name[64];
    if (p->letter) snprintf(name, sizeof name, "-%c", p->letter);
    else snprintf(name, sizeof name, "--%s", p->name);
    return name;
}

static Options read_options(int argc, char **argv) {
    Options o;
    struct option names[N_OPTIONS + 1];
    char letters[2 * N_OPTIONS + 2] = ":";
    const Option *given[N_OPTIONS] = {NULL};
    int found;
    memset(&o, 0, sizeof o);
    memset(names, 0, sizeof names);
    o.mode = "generate";
    o.batch = o.repeat = 1;
    o.tokens = 128;
    o.temperature = 0.8;
    o.top_p = 0.95;
    o.seed = 42;
    o.target = -1;
    for (int i = 0; i < N_OPTIONS; i++) {
        names[i].name = OPTIONS[i].name;
        names[i].has_arg = OPTIONS[i].kind != FLAG;
        names[i].val = 256 + i;
        if (OPTIONS[i].letter) sprintf(letters + strlen(letters), "%c%s", OPTIONS[i].letter, OPTIONS[i].kind != FLAG ? ":" : "");
    }
    opterr = 0;
    while ((found = getopt_long(argc, argv, letters, names, NULL)) != -1) {
        const char *argument = argv[optind - 1];
        if (found == ':') usage("%s: needs a value", argument);
        if (found == '?' && optopt > 0 && optopt < 256 && strncmp(argument, "--", 2)) usage("-%c: unknown option", optopt);
        if (found == '?') usage("%s: unknown option, or one that takes no value", argument);
        size_t i = 0;
        while (found < 256 ? OPTIONS[i].letter != found : (int)i + 256 != found) i++;
        const Option *p = given[i] = &OPTIONS[i];
        char *field = (char *)&o + p->field;
        if (p->kind == FLAG) *(bool *)field = true;
        if (p->kind == TEXT) *(const char **)field = optarg;
        if (p->kind == WHOLE) *(size_t *)field = whole_argument(option_name(p), optarg, p->low, p->high);
        if (p->kind == REAL) *(double *)field = real_argument(option_name(p), optarg, p->low, p->high);
    }
    if (o.help) print_help();
    if (optind == argc) usage("which MODEL.bin?");
    if (optind + 1 < argc) usage("%s: one MODEL.bin only", argv[optind + 1]);
    o.path = argv[optind];
    static const char *const MODES[] = {"generate", "chat", "perplexity", "score"};
    size_t mode = 0;
    while (mode < 4 && strcmp(o.mode, MODES[mode])) mode++;
    if (mode == 4) usage("-m %s: not generate, chat, perplexity or score", o.mode);
    for (size_t i = 0; i < N_OPTIONS; i++) {
        char modes[64] = "";
        if (!given[i] || strchr(given[i]->modes, o.mode[0])) continue;
        for (size_t k = 0; k < 4; k++)
            if (strchr(given[i]->modes, MODES[k][0])) sprintf(modes + strlen(modes), "%s-m %s", modes[0] ? ", " : "", MODES[k]);
        usage("%s: means nothing in -m %s, only in %s", option_name(given[i]), o.mode, modes);
    }
    if ((o.mode[0] == 'p' || o.mode[0] == 's') && !o.file) usage("-m %s: needs -f FILE", o.mode);
    if (o.chat_template && strcmp(o.chat_template, "v1") && strcmp(o.chat_template, "v3"))
        usage("--chat-template %s: not v1 or v3", o.chat_template);
    if (o.kv && strcmp(o.kv, "f16") && strcmp(o.kv, "q8")) usage("--kv %s: not f16 or q8", o.kv);
    if (o.file && o.prompt) usage("-i and -f: one of them");
#ifdef _OPENMP
    if (!o.threads) o.threads = (size_t)omp_get_max_threads();
    omp_set_num_threads((int)o.threads);
#else
    o.threads = 1;                      /* built without OpenMP */
#endif
    return o;
}

/* Puts a copy of the checkpoint in memory of our own where it was mapped, so that all that points there stays right. On
 * virtual machines one sequence was some 9% faster then, for a reason not found (SPEED.md). */
static void read_into_memory(const Model *m, bool quiet) {
    size_t size = (size_t)m->c.file_size, done = 0;
    if ((double)size > memory_bytes())
        die("--no-mmap: %s has %.1f GB, this machine %.1f GB of memory", m->path, (double)size / 1e9, memory_bytes() / 1e9);
    int fd = open(m->path, O_RDONLY);
    char *to = (char *)mmap((void *)m->map, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (fd < 0 || to == MAP_FAILED) die("--no-mmap: %s: %s", m->path, strerror(errno));
    while (done < size) {
        ssize_t n = pread(fd, to + done, min_size(size - done, (size_t)64 << 20), (off_t)done);
        if (n <= 0) die("%s: cannot be read: %s", m->path, n ? strerror(errno) : "it became shorter");
        if (interrupted) die("%s: interrupted while it was read", m->path);
        done += (size_t)n;
        progress(!quiet, "reading", (double)done, (double)size);
    }
    if (memcmp(to, &m->c, sizeof m->c)) die("%s: was replaced while it was read", m->path);
    close(fd);
    mprotect(to, size, PROT_READ);
}

/* Ctrl-C and the like: the generation ends after this step; the second one, or that nobody reads on (SIGPIPE), ends the program.
 * SIGBUS: a mapped file was cut while it is read; the first thread that meets it says so and exits with 1. No file is left. */
static void on_signal(int number) {
    static const char shorter[] = ": a file became shorter while it was read\n";
    static int told;
    if (!interrupted && number != SIGPIPE && number != SIGBUS) { interrupted = number; return; }
    if (number == SIGBUS && __sync_lock_test_and_set(&told, 1)) for (;;) pause();       /* another thread tells it */
    if (number == SIGBUS && write(STDERR_FILENO, program, strlen(program)) && write(STDERR_FILENO, shorter, sizeof shorter - 1)) {}
    remove_temporary();
    if (number == SIGBUS) _exit(1);
    signal(number, SIG_DFL);
    raise(number);
}

static void catch_signals(void) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGBUS};
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;      /* no SA_RESTART: a question that waits for its answer ends too */
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        struct sigaction before;
        sigaction(numbers[i], NULL, &before);
        if (before.sa_handler != SIG_IGN) sigaction(numbers[i], &action, NULL);     /* nohup's stay ignored */
    }
    signal(SIGXFSZ, SIG_IGN);           /* a file may not be so large: writing fails instead, and says so */
}

/* What threads and options need of the process, for a program's main to call first. */
static void prepare_process(char **argv) {
    const rlim_t least = 1 << 20;       /* attention() takes half of that */
    struct rlimit stack;
    unsetenv("POSIXLY_CORRECT");        /* options may stand behind MODEL.bin */
    if (getrlimit(RLIMIT_STACK, &stack) == 0 && stack.rlim_cur < least) {
        if (stack.rlim_max < least) die("a stack of %.0f kB is too small (ulimit -s 1024)", (double)stack.rlim_max / 1024);
        stack.rlim_cur = least;
        setrlimit(RLIMIT_STACK, &stack);
    }
    (void)argv;
#ifdef _OPENMP
    /* gcc's threads wait for one another spinning, up to some 20 ms: as soon as another program wants a core, that keeps
     * from running whom they wait for (SPEED.md: 7 tok/s instead of 750). How long is read from the environment before
     * main begins, hence a second start, with about 0.1 ms. */
    bool again = !getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY") && !setenv("GOMP_SPINCOUNT", "1000", 1);
    again |= !getenv("OMP_STACKSIZE") && !setenv("OMP_STACKSIZE", "2M", 1);     /* some systems give threads less than attention()
                                                                                   takes, a quarter of that */
    if (again) execv("/proc/self/exe", argv);
    if (omp_get_max_threads() > MOST_THREADS) omp_set_num_threads(MOST_THREADS);
#endif
}

/* The program, on whichever backend; returns the exit status. */
static int run(int argc, char **argv) {
    prepare_process(argv);
    /* where the shell closed a standard stream, the first file to be opened would take its place */
    if (fcntl(STDIN_FILENO, F_GETFD) < 0) open("/dev/null", O_WRONLY);
    if (fcntl(STDOUT_FILENO, F_GETFD) < 0) die("standard output: %s", strerror(errno));
    if (fcntl(STDERR_FILENO, F_GETFD) < 0) open("/dev/null", O_WRONLY);
    Options o = read_options(argc, argv);
    catch_signals();
    if (o.lookup && backend != &CPU)
        die("--lookup: a GPU adds in another order for several tokens than for one, so that the output would not stay the same; "
            "run has it");
    if (o.no_mmap && backend != &CPU) die("--no-mmap: means nothing on a GPU, which has the weights in its own memory");
    Model m = load_model(o.path);
    if (o.no_mmap) read_into_memory(&m, o.quiet);
    if (o.kv) m.kv_type = o.kv[0] == 'q' ? Q8 : backend == &CPU ? Q16 : F16;
    const char *others[] = {o.path, o.file, o.against, "/dev/stdin", "/dev/stdout", "/dev/stderr"};
    size_t n = o.output && (!strncmp(o.output, "/dev/", 5) || !strncmp(o.output, "/proc/", 6)) ? 4 : 6;    /* /dev/stdout may be */
    for (size_t i = 0; i < n; i++)
        if (o.output && others[i] && same_file(others[i], o.output))
            die("%s: is %s as well, and would be lost: give -o another name", o.output, i < 4 ? "read" : "written");
    if (o.output) o.json = open_output(o.output);
    bool met = o.mode[0] == 'c' ? chat_mode(&m, &o) : o.mode[0] == 'p' ? perplexity_mode(&m, &o)
             : o.mode[0] == 's' ? score_mode(&m, &o) : generate_mode(&m, &o);
    free_model(&m);
    flush_stdout();
    if (interrupted && interrupted != SIGINT) die("signal %d ended it", (int)interrupted);      /* Ctrl-C is the user's wish */
    return met ? 0 : 1;
}

#ifndef RUN_NO_MAIN
int main(int argc, char **argv) { return run(argc, argv); }
#endif
#endif
