/* simd.h - the products' inner loops with vectors and integer instructions. Skip this on a first reading: run.c, which includes it,
 * has them in plain C, as number_tiles_plain(), group_product_plain() and halves_to_floats_plain(), and nothing else depends on how
 * they are done.
 *
 * Sums of whole numbers are exact, and those of others are added in the plain order, so that all versions give the same bits
 * (test_all.c and tests/test_variants.py compare them). One loop, tile(), is for numbers and codes alike. It takes activations by
 * words of 32 bits - a number, two codes of 16 bits or four of 8 -, each in every lane of a register, and multiplies it with what
 * stands in its place in WIDTH rows. What an instruction set brings for that:
 *   multiply_add(sum, w, x)     sum[r] + w[r] * x[r], FP32, rounded once
 *   dot(sum, w, x)              sum[r] + (w[4r + i] - BIAS) * x[4r + i], i from 0 to 3, of 8 bits, those of w without sign
 *   wide_dot(sum, w, x)         sum[r] + w[2r + i] * x[2r + i], i from 0 to 1, of 16 bits
 *   of_halves(p)                WIDTH FP16 numbers from p on as FP32
 *   of_nf4(codes)               the codes of q8 for those of nf4, in every byte
 * and how many sums its registers hold: TOKENS by VECTORS of rows; how many words such a full tile takes between asking memory for
 * more (TURNS: 1, 2, 4 or 8; SPEED.md, Fewer turns); and from how many tokens on it pays to unpack q4 and FP16 into memory instead
 * of in registers for each tile (UNPACK; BLOCK + 1: never). Some instructions stand here as assembly, because gcc 12 otherwise
 * moves every sum to another register and back, which costs a quarter of the speed. */
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)                  /* before a loop of up to 8 turns: so that its arrays can be registers */
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__CUDACC__)               /* nvcc does not know it */
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define INLINE static inline __attribute__((always_inline))    /* so that arguments which are constants choose the code */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { WIDTH = 16, VECTORS = 2, TOKENS = 8, TURNS = 4, UNPACK = 16, BIAS = 0 };
#define VNNI ""
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#if defined(__AVXVNNI__)
#define VNNI "%{vex%} "                 /* AVX's own encoding, which assemblers do not choose by themselves */
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VNNI ""
#else
#define PAIRS                           /* sums of two products are all it has: see dot() and pair_tile() */
#endif
enum { WIDTH = 8, VECTORS = 2, TOKENS = 4, TURNS = 1, UNPACK = BLOCK + 1 };
#ifdef PAIRS
enum { BIAS = 128 };
#else
enum { BIAS = 0 };
#endif
#elif defined(__aarch64__)
enum { WIDTH = 4, VECTORS = 4, TOKENS = 4, TURNS = 1, UNPACK = 16, BIAS = 128 };      /* BIAS: its factors are both signed */
#else                                   /* none that is known */
#define number_tiles number_tiles_plain
#define group_product group_product_plain
#define halves_to_floats halves_to_floats_plain
#endif
#ifndef group_product
/* WIDTH words, of whole numbers or of whatever; the same as FP32, at any multiple of 4. */
typedef int32_t Lanes __attribute__((vector_size(4 * WIDTH), may_alias));
typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#ifndef __aarch64__
static inline Lanes multiply_add(Lanes sum, Lanes a, Lanes b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#ifdef VNNI
static inline Lanes dot(Lanes sum, Lanes codes, Lanes x) {
    __asm__(VNNI "vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
}
static inline Lanes wide_dot(Lanes sum, Lanes codes, Lanes x) {
    __asm__(VNNI "vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
}
#else
static inline Lanes dot(Lanes sum, Lanes codes, Lanes x) {
    /* one factor must be unsigned, and two products must fit 16 bits: |code - 128| times x, which is not -128, with the sign of
     * code - 128 */
    __m256i c = _mm256_xor_si256((__m256i)codes, _mm256_set1_epi8((char)BIAS));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8((__m256i)x, c));
    return sum + (Lanes)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
static inline Lanes wide_dot(Lanes sum, Lanes codes, Lanes x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16((__m256i)codes, (__m256i)x)));
    return sum;
}
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
static inline Floats of_halves(const uint16_t *p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline Lanes of_nf4(Lanes codes) {
    return (Lanes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(*(const __m128i *)NF4_CODES), (__m512i)codes);
}
#else
static inline Floats of_halves(const uint16_t *p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline Lanes of_nf4(Lanes codes) {
    return (Lanes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(*(const __m128i *)NF4_CODES), (__m256i)codes);
}
#endif
#else
static inline Lanes multiply_add(Lanes sum, Lanes a, Lanes b) {
    return (Lanes)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
}
static inline Floats of_halves(const uint16_t *p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline Lanes of_nf4(Lanes codes) { return (Lanes)vqtbl1q_u8(vld1q_u8(NF4_CODES), (uint8x16_t)codes); }
static inline Lanes dot(Lanes sum, Lanes codes, Lanes x) {
    int8x16_t c = (int8x16_t)(codes ^ (Lanes)vdupq_n_u8(BIAS)), a = (int8x16_t)x;
#ifdef __ARM_FEATURE_DOTPROD
    return (Lanes)vdotq_s32((int32x4_t)sum, c, a);
#else
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(c), vget_low_s8(a))), high = vpaddlq_s16(vmull_high_s8(c, a));
    return sum + (Lanes)vpaddq_s32(low, high);
#endif
}
static inline Lanes wide_dot(Lanes sum, Lanes codes, Lanes x) {
    int16x8_t c = (int16x8_t)codes, a = (int16x8_t)x;
    return sum + (Lanes)vpaddq_s32(vmull_s16(vget_low_s16(c), vget_low_s16(a)), vmull_high_s16(c, a));
}
#endif

/* n: a multiple of 16. */
static const float *halves_to_floats(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i += WIDTH) *(Floats *)(out + i) = of_halves(in + i);
    return out;
}

/* Registers of rows that a tile of T tokens, a power of two, takes at a time: as many as there are, or as there is room for. */
#define AT_ONCE(T) (TOKENS * VECTORS / (T) < PANEL / WIDTH ? TOKENS * VECTORS / (T) : PANEL / WIDTH)

/* x in every lane: minus 0, which a compiler leaves out; plus 0 it must compute, since that makes +0 of -0. */
static inline Floats every(float x) { return x - (Floats){0}; }

/* A tile's share of what Ahead names: each line of 64 bytes is asked for once (one that is missed is waited for, one asked for
 * twice is in the way of others), one in each of the two places at a time, evenly over all the bytes of activations that the tile
 * goes over, n for each round over some of the rows: if the first round asked for everything, memory would stand still in the
 * others. Each byte makes `due` larger by `pairs`, the pairs of lines that there are, and a pair that is asked for takes off
 * `total`, the bytes of all rounds. It begins with 0, so that tiles with as many pairs ask at the same turns of their loops: a
 * processor then foresees which. */
typedef struct { uintptr_t at; size_t apart; ptrdiff_t due, pairs, total; } Lines;

/* Asks for what is due once so many more bytes of activations are gone over. */
INLINE void ask(Lines *s, ptrdiff_t bytes) {
    for (s->due += bytes * s->pairs; s->due > 0; s->due -= s->total, s->at += 64) {
        __builtin_prefetch((const void *)s->at, 0, 2);
        __builtin_prefetch((const void *)(s->at + s->apart), 0, 2);
    }
}

/* Takes the share of a tile of T tokens, `bytes` for each, off *all, half of it from the front of either half: the lines that begin
 * there. n: bytes of a token's activations. */
INLINE Lines lines(Ahead *all, size_t bytes, size_t T, size_t n) {
    uintptr_t first = (all->at + 63) / 64, end = (all->at + bytes * T / 2 + 63) / 64;       /* of lines, by their numbers */
    size_t rounds = PANEL / WIDTH / AT_ONCE(T);
    Lines part = {first * 64, all->apart, 0, (ptrdiff_t)(end - first), (ptrdiff_t)(n * rounds)};
    all->at += bytes * T / 2;
    return part;
}

/* A word of activations in every lane. */
static inline Lanes load_activations(const int8_t *q) {
    int32_t x;
    memcpy(&x, q, 4);
    return (Lanes){0} + x;
}

/* What is multiplied with the word at byte k of a token's activations, of the rows from `row` on. With `whole`, codes of q4 for
 * rows from 16 on are left as the whole bytes they stand in: 16 * code + the code of the row 16 before. */
INLINE Lanes load_weights(const int type, const uint8_t *w, size_t k, size_t row, const bool whole) {
    if (type == F16) return (Lanes)of_halves((const uint16_t *)(w + k * (PANEL / 2) + 2 * row));
    if (type != Q4 && type != NF4) return (Lanes)*(const Floats *)(w + k * PANEL + 4 * row);    /* numbers need not be aligned */
    Lanes bytes = *(const Lanes *)(w + k * (PANEL / 2) + 4 * (row % 16));
    if (whole && row >= 16) return bytes;
    bytes = bytes >> row / 16 * 4 & 0x0f0f0f0f;
    return type == NF4 ? of_nf4(bytes) : bytes;
}

/* The end of a tile, with codes as in group_product_plain(): sum[t][r] of T tokens t, r being the register of the rows from `row`
 * on, scaled if they are of codes, are added to `before`, which may be `out`, and stored in `out`; both [T][32]. */
INLINE void add_sums(const size_t T, const int type, float *out, const float *before, const float *scale, Activations a, size_t row,
                     Lanes sum[][PANEL / WIDTH], size_t r) {
    const bool codes = type >= Q8;
    Floats of_rows = codes ? *(const Floats *)(scale + row) : (Floats){0};
    Floats zero = codes ? -*(const Floats *)(scale + PANEL + row) : (Floats){0};
    UNROLL for (size_t t = 0; t < T; t++) {
        Floats *to = (Floats *)(out + t * PANEL + row), from = *(const Floats *)(before + t * PANEL + row);
        if (!codes) { *to = from + (Floats)sum[t][r]; continue; }
        Lanes of_codes = (Lanes)__builtin_convertvector(sum[t][r], Floats);
        if (type != Q16) of_codes = multiply_add(of_codes, (Lanes)zero, (Lanes)every(a.sum[t]));       /* Q16's zero is 0 */
        *to = (Floats)multiply_add((Lanes)from, (Lanes)(of_rows * a.scale[t]), of_codes);
    }
}

#ifdef PAIRS
/* tile() for q4, faster: of 32 columns 16 bits hold the sum of every other pair, 32 / 2 * 15 * 127 < 2^15. A byte has codes of two
 * rows, 16 from one another: the sums r of even number are of the lower ones, the next of the upper ones. */
INLINE void pair_tile(const size_t T, float *out, const float *before, const uint8_t *codes, const float *scale, Activations a,
                      size_t n, Lines ahead) {
    const size_t R = AT_ONCE(T);
    for (size_t row = 0; row < PANEL / 2; row += WIDTH * R / 2) {
        Lanes sum[TOKENS][PANEL / WIDTH];
        UNROLL for (size_t t = 0; t < T; t++)
            UNROLL for (size_t r = 0; r < R; r++) sum[t][r] = (Lanes){0};
        for (size_t start = 0; start < n; start += 32) {
            Lanes part[TOKENS][PANEL / WIDTH];
            UNROLL for (size_t t = 0; t < T; t++)
                UNROLL for (size_t r = 0; r < R; r++) part[t][r] = (Lanes){0};
            ask(&ahead, 32);
            UNROLL for (size_t k = 0; k < 32; k += 4) {
                Lanes half[PANEL / WIDTH];
                UNROLL for (size_t r = 0; r < R; r++) {
                    const uint8_t *bytes = codes + (start + k) / 2 * PANEL + 4 * (row + r / 2 * WIDTH);
                    half[r] = *(const Lanes *)bytes >> r % 2 * 4 & 0x0f0f0f0f;
                }
                UNROLL for (size_t t = 0; t < T; t++) {
                    __m256i x = (__m256i)load_activations(a.q + t * n + start + k);
                    UNROLL for (size_t r = 0; r < R; r++)
                        __asm__("vpaddw %1, %0, %0" : "+x"(part[t][r]) : "x"(_mm256_maddubs_epi16((__m256i)half[r], x)));
                }
            }
            UNROLL for (size_t t = 0; t < T; t++) {
                UNROLL for (size_t r = 0; r < R; r++)
                    sum[t][r] += (Lanes)_mm256_madd_epi16((__m256i)part[t][r], _mm256_set1_epi16(1));
                __asm__("" : "+m"(sum[t]));         /* in memory, while registers are needed for the parts */
            }
        }
        UNROLL for (size_t r = 0; r < R; r++) add_sums(T, Q4, out, before, scale, a, row + r / 2 * WIDTH + r % 2 * 16, sum, r);
    }
}
#endif

/* number_tiles_plain(), or with codes group_product_plain(), for T tokens, whose activations, a.q, are n bytes, `stride` apart. T
 * and type are constants wherever this is inlined, so that the sums stay in registers. With few tokens each sum of codes is split
 * into PARTS over the columns, so that as many additions are under way. It begins with BIAS times the sum of the activations,
 * which dot() takes off. A tile that takes all rows of a panel at once does not unpack q4's upper halves: the sum over whole
 * bytes, less that over their lower halves, is 16 times the sum over the upper ones. */
INLINE void tile(const size_t T, const int type, float *out, const float *before, const uint8_t *w, const float *scale,
                 Activations a, size_t stride, size_t n, Lines ahead) {
#ifdef PAIRS
    if (type == Q4) { pair_tile(T, out, before, w, scale, a, n, ahead); return; }
#endif
    const bool numbers = type < Q8;
    const size_t R = AT_ONCE(T), PARTS = numbers ? 1 : TOKENS * VECTORS / (T * R), STEP = 4 * PARTS;
    const size_t N_TURNS = T == TOKENS ? TURNS : 1;             /* of STEP bytes, between two times of asking */
    const bool whole = type == Q4 && R * WIDTH == PANEL;
    for (size_t row = 0; row < PANEL; row += WIDTH * R) {
        Lanes sum[TOKENS][PANEL / WIDTH];
        UNROLL for (size_t i = 0; i < T * PARTS; i++)
            UNROLL for (size_t r = 0; r < R; r++)
                sum[i][r] = (Lanes){0} + (!numbers && i < T ? BIAS * (int32_t)a.sum[i] : 0);
        for (size_t k = 0; k < n;) {
            ask(&ahead, N_TURNS * STEP);        /* not between the sums: there gcc 12 moves each to another register */
            UNROLL for (size_t turn = 0; turn < N_TURNS && (!numbers || k < n); turn++, k += STEP)    /* codes: n % 32 is 0 */
                UNROLL for (size_t i = 0; i < T * PARTS; i++) {
                    size_t at = k + i / T * 4;
                    Lanes x = load_activations(a.q + i % T * stride + at);
                    UNROLL for (size_t r = 0; r < R; r++) {
                        Lanes of_rows = load_weights(type, w, at, row + r * WIDTH, whole);
                        sum[i][r] = numbers ? multiply_add(sum[i][r], of_rows, x)
                                  : type == Q16 ? wide_dot(sum[i][r], of_rows, x) : dot(sum[i][r], of_rows, x);
                    }
                }
        }
        UNROLL for (size_t r = 0; r < R; r++) {
            UNROLL for (size_t t = 0; t < T; t++) {
                UNROLL for (size_t i = t + T; i < T * PARTS; i += T) sum[t][r] += sum[i][r];
                if (whole && r >= R / 2) sum[t][r] = (sum[t][r] - sum[t][r - R / 2]) >> 4;
            }
            add_sums(T, type, out, before, scale, a, row + r * WIDTH, sum, r);
        }
    }
}

/* T > 0 tokens, tile by tile. */
INLINE void tiles(size_t T, bool add, const int type, float *out, const void *w, const float *scale, Activations a, size_t stride,
                  size_t n, Ahead ahead) {
    size_t bytes = ahead.bytes / T;
    const uint8_t *weights = (const uint8_t *)w;
    static const float zeros[TOKENS * PANEL] = {0};
    for (size_t t; T; T -= t, out += t * PANEL) {
        const float *before = add ? out : zeros;
        if (T >= (t = TOKENS)) tile(TOKENS, type, out, before, weights, scale, a, stride, n, lines(&ahead, bytes, TOKENS, n));
        else if (T >= (t = 4)) tile(4, type, out, before, weights, scale, a, stride, n, lines(&ahead, bytes, 4, n));
        else if (T >= (t = 2)) tile(2, type, out, before, weights, scale, a, stride, n, lines(&ahead, bytes, 2, n));
        else if (T >= (t = 1)) tile(1, type, out, before, weights, scale, a, stride, n, lines(&ahead, bytes, 1, n));
        a.q += t * stride;
        if (type >= Q8) { a.scale += t; a.sum += t; }
    }
}

/* number_tiles_plain(), n <= MAX_GROUP where w is FP16. */
static void number_tiles(size_t T, bool add, int type, float *out, const void *w, const float *x, size_t stride, size_t n,
                         Ahead ahead) {
    float floats[MAX_GROUP * PANEL];
    Activations a = {NULL, (int8_t *)x, NULL, NULL};
    if (type == F16 && T >= UNPACK) { w = halves_to_floats(floats, (const uint16_t *)w, n * PANEL); type = F32; }
    if (type == F16) tiles(T, add, F16, out, w, NULL, a, 4 * stride, 4 * n, ahead);
    else tiles(T, add, F32, out, w, NULL, a, 4 * stride, 4 * n, ahead);
}

static void group_product(size_t T, bool add, float *total, int type, const uint8_t *codes, const float *scale, Activations a,
                          size_t n, Ahead ahead) {
    uint8_t room[MAX_GROUP * PANEL] __attribute__((aligned(64)));
    if (type == Q4 && T >= UNPACK) { codes = unpack_codes(room, Q4, codes, n); type = Q8; }
    if (type == Q4) tiles(T, add, Q4, total, codes, scale, a, n, n, ahead);
    else if (type == NF4) tiles(T, add, NF4, total, codes, scale, a, n, n, ahead);
    else if (type == Q8) tiles(T, add, Q8, total, codes, scale, a, n, n, ahead);
    else tiles(T, add, Q16, total, codes, scale, a, 2 * n, 2 * n, ahead);
}
#endif
