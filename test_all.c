/* test_all.c - the tests that are in C: the mathematics against FP64, every kind of matrix, the forward against a
 * reference that has no cache, determinism, the sampler, the batch, damaged files.
 *
 *   make build/test_all && build/test_all [NAME ...]      all tests, or those named
 *   build/test_all logits MODEL.bin                       logits that must be the same bits from every build
 *   build/test_all tokenize MODEL.bin                     encodes and decodes what tests/test_tokenizer.py sends
 *
 * Prints a line a test and last "N passed, N failed"; exit status 1 if any failed. Comparisons are written so that NaN
 * fails. Random numbers are seeded: a failure comes again. */
#define TESTING
#define RUN_NO_MAIN
#ifdef __CUDACC__              /* make test_cuda: the same tests, and those of the GPU */
#include "run_cuda.cu"
#endif
#include "quantize.c"
#include <sys/wait.h>     /* waitpid */

static int failures;                    /* in the test that runs */
#define CHECK(condition, ...) do { if (!(condition) && ++failures <= 5) { \
    printf("    %s:%d: %s: ", __FILE__, __LINE__, #condition); printf(__VA_ARGS__); putchar('\n'); } } while (0)

static uint64_t rng = 1;
static float random_float(void) { return (float)(2 * uniform(&rng) - 1); }
static size_t random_below(size_t n) { return (size_t)(uniform(&rng) * (double)n); }

/* The larger of two errors; what is not a number stays the worst. */
static double worse(double worst, double off) { return off <= worst ? worst : isnan(off) ? INFINITY : off; }

static char directory[] = "/tmp/mistral-test-XXXXXX";

/* A checkpoint of random weights in the test's directory. */
static const char *random_model(const char *shape, const char *type, uint32_t group) {
    static char path[4][128];
    static int turn;
    char *p = path[turn++ % 4];
    uint32_t t = F32;
    while (strcmp(TYPE_NAMES[t], type)) t++;
    snprintf(p, sizeof path[0], "%s/%s-%s-%u.bin", directory, shape, type, group);
    Source source = {"random weights", NULL, 0};
    if (access(p, R_OK) == 0) return p;
    int saved = dup(2);                 /* convert() says what it wrote */
    if (!freopen("/dev/null", "w", stderr)) exit(1);
    convert(&source, shape, p, t, group);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
    return p;
}

/* No dimension a multiple of anything, window 24. */
static const char *odd_model(const char *type, uint32_t group) { return random_model("odd", type, group); }

static const struct { const char *type; uint32_t group; } KINDS[] = {
    {"f32", 32}, {"f16", 32}, {"q8", 32}, {"q8", 64}, {"q8", 128}, {"q4", 32}, {"q4", 64}, {"q4", 128},
    {"nf4", 64}, {"nf4", 128}};
enum { N_KINDS = sizeof KINDS / sizeof *KINDS };

/* ---- the mathematics ---------------------------------------------------------------------------------------------- */

static void test_half(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        if ((h & 0x7c00) == 0x7c00) continue;           /* infinities and NaN: the format has none */
        int e = (h >> 10) & 31;
        double expect = e ? ldexp(1024 + (h & 1023), e - 25) : ldexp(h & 1023, -24);
        if (h & 0x8000) expect = -expect;
        CHECK((double)half_to_float((uint16_t)h) == expect, "%04x", h);
        CHECK(float_to_half((float)expect) == h, "%04x gives %04x", h, float_to_half((float)expect));
    }
    for (int i = 0; i < 200000; i++) {                  /* to nearest, ties to even: the neighbours are not nearer */
        float x = ldexpf(random_float(), (int)random_below(44) - 28);
        if (i % 4 == 0) x = 0.5f * (half_to_float((uint16_t)(i / 4 % 0x7bff)) + half_to_float((uint16_t)(i / 4 % 0x7bff + 1)));
        uint16_t h = float_to_half(x);
        double error = fabs((double)x - half_to_float(h));
        for (int d = -1; d <= 1; d += 2) {
            uint16_t other = (uint16_t)(h + d);
            if ((h & 0x7fff) == 0 || (other & 0x7c00) == 0x7c00) continue;
            double e = fabs((double)x - half_to_float(other));
            CHECK(error < e || (error == e && !(h & 1)), "%a gives %04x", x, h);
        }
    }
    CHECK(float_to_half(1e30f) == 0x7bff && float_to_half(-INFINITY) == 0xfbff, "saturates");
}

static void test_exp(void) {
    double worst = 0;
    for (float x = -87; x < 88; x += 0.0007f) worst = fmax(worst, fabs(fast_exp(x) / exp(x) - 1));
    CHECK(worst < 2e-7, "relative error %g", worst);
    CHECK(fast_exp(0) == 1, "%g", fast_exp(0));
    CHECK(fast_exp(-1e30f) > 0 && fast_exp(-1e30f) < 2e-38f, "%g", fast_exp(-1e30f));
    CHECK(fast_exp(1e30f) > 1e38f && isfinite(fast_exp(1e30f)), "%g", fast_exp(1e30f));
}

static void test_norm_rope_swiglu(void) {
    enum { N = 77 };
    float x[N], w[N], out[N], rotation[10], head[10], gate_up[2 * N];
    double squares = 0;
    for (int i = 0; i < N; i++) { x[i] = random_float(); w[i] = random_float(); squares += (double)x[i] * x[i]; }
    rms_norm(out, x, w, N, 1e-5f);
    for (int i = 0; i < N; i++) CHECK(fabs(out[i] - w[i] * x[i] / sqrt(squares / N + 1e-5)) < 1e-6, "%d", i);
    for (int i = 0; i < 5; i++) { rotation[2 * i] = (float)cos(i); rotation[2 * i + 1] = (float)sin(i); }
    for (int i = 0; i < 10; i++) head[i] = x[i];
    rope(head, rotation, 5);
    for (int i = 0; i < 5; i++) {       /* (a + bi) e^(i angle) */
        CHECK(fabs(head[i] - (x[i] * cos(i) - x[i + 5] * sin(i))) < 1e-6, "%d", i);
        CHECK(fabs(head[i + 5] - (x[i] * sin(i) + x[i + 5] * cos(i))) < 1e-6, "%d", i);
    }
    for (int i = 0; i < 2 * N; i++) gate_up[i] = 30 * random_float();
    swiglu(out, gate_up, N);
    for (int i = 0; i < N; i++) {
        double expect = gate_up[i] / (1 + exp(-(double)gate_up[i])) * gate_up[N + i];
        CHECK(fabs(out[i] - expect) <= 1e-6 * fabs(expect) + 1e-9, "%d: %g, not %g", i, out[i], expect);
    }
}

/* Keys and values, and what is multiplied with them, as whole numbers: off by half a step at most, and never so large that a sum
 * would not fit. Flat and peaked groups, zeros, numbers too small and too large to scale, and what is no number. */
static void test_cache_codes(void) {
    static const float SIZES[] = {1, 0, 1e-6f, 1e-32f, 1e-44f, 100, 60000, 1e30f, INFINITY, NAN};
    enum { N = MAX_GROUP };
    for (int turn = 0; turn < 400; turn++) {
        float x[N], size = SIZES[turn < 100 ? turn % 10 : 0], peak = turn % 4 ? 1 : 1000, scale, sum, steps = turn % 2 ? 64 : 1;
        int16_t q[N];
        long total = 0;
        if (isnan(size)) size = as_float(0x7fc07fff);       /* one whose low bits would be a large code */
        for (size_t i = 0; i < N; i++) x[i] = size * (turn % 3 ? random_float() : turn % 2 ? 1 : -1);
        x[random_below(N)] *= peak;
        float step = half_to_float(quantize_kv(q, x, N, steps)) / steps;
        for (size_t i = 0; i < N; i++) {
            CHECK(abs(q[i]) <= 127 * steps, "%g became %d", x[i], q[i]);
            if (!(fabsf(x[i]) < 8e6f)) continue;
            CHECK(fabsf(x[i] - step * q[i]) <= 0.50001f * step + 3e-8f, "%g became %d of %g", x[i], q[i], step);
        }
        Activations group = {NULL, (int8_t *)q, &scale, &sum};
        quantize_query(Q16, group, 0, x, N, magnitude(x, N));
        for (size_t i = 0; i < N; i++) {
            total += abs(q[i]);
            if (!isfinite(size)) continue;
            CHECK(fabsf(x[i] - 64 * scale * q[i]) <= 33 * scale + 1e-30f, "%g became %d of %g", x[i], q[i], scale);
        }
        CHECK(total <= 264128, "sum %ld", total);
        CHECK(isfinite(size) || !isfinite(scale), "%g has scale %g", size, scale);
    }
}

static void test_activations(void) {
    float x[128], scale, sum;
    int8_t q[128];
    for (int turn = 0; turn < 300; turn++) {
        size_t group = (size_t)32 << random_below(3), n = 1 + random_below(group);
        float total = 0;
        for (size_t i = 0; i < n; i++) x[i] = turn == 0 ? 0 : random_float() * (i % 50 == 0 ? 30 : 1);
        memset(q, 99, sizeof q);
        quantize_activations(q, &scale, &sum, x, n, group);
        for (size_t i = 0; i < group; i++) {
            total += q[i];
            if (i < n) CHECK(fabsf(x[i] - scale * q[i]) <= 0.5001f * scale, "%zu: %g is %d times %g", i, x[i], q[i], scale);
            else CHECK(q[i] == 0, "padding %zu is %d", i, q[i]);
        }
        CHECK(total == sum, "%g, not %g", sum, total);
    }
}

/* The version of group_product for this machine against the plain one, and with scale 1 and zero 0 against the whole number
 * that the format's definition gives. What is not added to is not a number. */
static void test_group_product(void) {
    static uint8_t codes[128 * 32] __attribute__((aligned(64))), room[128 * 32] __attribute__((aligned(64)));
    static int8_t q[64 * 128];
    float fast[64 * PANEL], plain[64 * PANEL], unpacked[64 * PANEL], scale[2 * PANEL], scale_q[64], sum_q[64];
    for (int turn = 0; turn < 400; turn++) {
        int type = turn % 3 == 0 ? Q8 : turn % 3 == 1 ? Q4 : NF4;
        bool extremes = turn < 12, whole = turn < 100;
        size_t n = (size_t)32 << random_below(3), T = 1 + random_below(64);
        for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(extremes ? turn < 6 ? 255 : 0 : random_below(256));
        for (size_t i = 0; i < sizeof q; i++)
            q[i] = (int8_t)(extremes ? (turn % 6 < 3 ? -127 : 127) : (int)random_below(255) - 127);
        for (size_t r = 0; r < 2 * PANEL; r++) scale[r] = whole ? r < PANEL : random_float();
        for (size_t t = 0; t < 64; t++) {
            scale_q[t] = whole ? 1 : random_float();
            sum_q[t] = 0;
            for (size_t k = 0; k < n; k++) sum_q[t] += q[t * n + k];
        }
        bool add = turn % 2;
        for (size_t i = 0; i < T * PANEL; i++) fast[i] = plain[i] = unpacked[i] = !add ? NAN : whole ? 0 : random_float();
        Activations a = {NULL, q, scale_q, sum_q};
        Ahead none = {(uintptr_t)q, 0, 0};
        group_product(T, add, fast, type, codes, scale, a, n, none);
        group_product_plain(T, add, plain, type, codes, scale, a, n, none);
        group_product(T, add, unpacked, Q8, unpack_codes(room, type, codes, n), scale, a, n, none);
        for (size_t t = 0; t < T; t++)
            for (size_t r = 0; r < PANEL; r++) {
                long sum = 0;
                for (size_t k = 0; k < n; k++) {
                    const uint8_t *four = codes + k / 4 * (type == Q8 ? 128 : 64);
                    int code = type == Q8 ? four[4 * r + k % 4]
                             : r < 16 ? four[4 * r + k % 4] & 15 : four[4 * (r - 16) + k % 4] >> 4;
                    sum += (type == NF4 ? NF4_CODES[code] : code) * q[t * n + k];
                }
                size_t i = t * PANEL + r;
                if (whole) CHECK(plain[i] == (float)sum, "plain %s, %zu: %g, not %ld", TYPE_NAMES[type], n, plain[i], sum);
                CHECK(fast[i] == plain[i], "%s, %zu: fast %.9g, plain %.9g", TYPE_NAMES[type], n, fast[i], plain[i]);
                CHECK(unpacked[i] == plain[i], "%s, %zu: unpacked %.9g, plain %.9g", TYPE_NAMES[type], n, unpacked[i], plain[i]);
            }
    }
}

/* The same for Q16, with the largest codes and other factors that there may be. */
static void test_group_product_wide(void) {
    static int16_t codes[128 * PANEL] __attribute__((aligned(64))), q[BLOCK * 128];
    float fast[BLOCK * PANEL], plain[BLOCK * PANEL], scale[2 * PANEL] = {0}, scale_q[BLOCK], sum_q[BLOCK] = {0};
    for (int turn = 0; turn < 200; turn++) {
        bool extremes = turn < 20, whole = turn < 100;
        size_t n = (size_t)32 << random_below(3), T = 1 + random_below(BLOCK);
        int sign = turn % 2 ? 1 : -1, most = (int)min_size(264128 / n, INT16_MAX);
        for (size_t i = 0; i < n * PANEL; i++) codes[i] = (int16_t)(extremes ? 8128 : (int)random_below(2 * 8128 + 1) - 8128);
        for (size_t i = 0; i < T * n; i++)
            q[i] = (int16_t)(extremes ? sign * most : (int)random_below(2 * (uint32_t)most + 1) - most);
        if (turn < 4) for (size_t i = 0; i < T * n; i++) q[i] = (int16_t)(i % n < 8 ? sign * INT16_MAX : 0);
        for (size_t r = 0; r < PANEL; r++) scale[r] = whole ? 1 : random_float();
        for (size_t t = 0; t < T; t++) scale_q[t] = whole ? 1 : random_float();
        bool add = turn / 2 % 2;
        for (size_t i = 0; i < T * PANEL; i++) fast[i] = plain[i] = !add ? NAN : whole ? 0 : random_float();
        Activations a = {NULL, (int8_t *)q, scale_q, sum_q};
        Ahead none = {(uintptr_t)q, 0, 0};
        group_product(T, add, fast, Q16, (const uint8_t *)codes, scale, a, n, none);
        group_product_plain(T, add, plain, Q16, (const uint8_t *)codes, scale, a, n, none);
        CHECK(!memcmp(fast, plain, T * PANEL * sizeof *plain), "%zu tokens of %zu columns, turn %d", T, n, turn);
        for (size_t t = 0; t < T && whole; t++)
            for (size_t r = 0; r < PANEL; r++) {
                long sum = 0;
                for (size_t k = 0; k < n; k++) sum += (long)codes[(k / 2 * PANEL + r) * 2 + k % 2] * q[t * n + k];
                CHECK(plain[t * PANEL + r] == (float)sum, "turn %d: %g, not %ld", turn, plain[t * PANEL + r], sum);
            }
    }
}

/* The version of number_tiles for this machine against the plain one, bit for bit. */
static void test_number_tiles(void) {
    static float w[MAX_HEAD_DIM * PANEL], x[BLOCK * MAX_HEAD_DIM], fast[BLOCK * PANEL], plain[BLOCK * PANEL];
    static uint16_t halves[MAX_HEAD_DIM * PANEL];
    for (size_t i = 0; i < MAX_HEAD_DIM * PANEL; i++) { w[i] = random_float(); halves[i] = float_to_half(w[i]); }
    for (size_t i = 0; i < BLOCK * MAX_HEAD_DIM; i++) x[i] = random_below(20) ? random_float() : -0.0f;
    for (size_t turn = 0; turn < 4 * BLOCK; turn++) {
        int type = turn / BLOCK % 2 ? F16 : F32;
        size_t T = turn % BLOCK + 1, n = 1 + random_below(type == F16 ? MAX_GROUP : MAX_HEAD_DIM);
        size_t stride = n + random_below(MAX_HEAD_DIM - (uint32_t)n + 1);
        bool add = turn / BLOCK / 2;
        Ahead none = {(uintptr_t)w, 0, 0};
        for (size_t i = 0; i < T * PANEL; i++) fast[i] = plain[i] = add ? random_float() : NAN;
        number_tiles(T, add, type, fast, type == F16 ? (const void *)halves : w, x, stride, n, none);
        number_tiles_plain(T, add, type, plain, type == F16 ? (const void *)halves : w, x, stride, n, none);
        CHECK(!memcmp(fast, plain, T * PANEL * sizeof *plain), "%s, %zu tokens of %zu columns", TYPE_NAMES[type], T, n);
    }
}

/* A matrix of this kind with these weights [rows, cols], made through quantize.c; its data is to be freed. */
static Matrix make_matrix(const char *type, uint32_t group, const float *w, size_t rows, size_t cols) {
    Matrix from, to;
    uint32_t t = F32;
    while (strcmp(TYPE_NAMES[t], type)) t++;
    matrix_layout(&from, F32, 0, rows, cols);
    matrix_layout(&to, t, tensor_group(t, group, cols), rows, cols);
    float *panels = (float *)allocate(from.bytes, 1, "test");
    unsigned char *data = (unsigned char *)allocate(to.bytes, 1, "test");
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < cols; k++) panels[(r / PANEL * cols + k) * PANEL + r % PANEL] = w[r * cols + k];
    for (size_t p = 0; p < to.n_panels; p++)
        CHECK(convert_panel(data + p * to.panel_bytes, &to, (unsigned char *)panels + p * from.panel_bytes, &from), "panel %zu", p);
    free(panels);
    to.data = data;
    return to;
}

/* Every kind of matrix in many shapes: its rows are near the weights it was made of; its product is the product of its rows
 * with the (quantized) activations, in FP64, and a token's has the same bits by itself. The last shape's activations take several
 * passes, whatever the kind. */
static void test_matrices(void) {
    static const size_t SHAPES_TO_TRY[][2] = {{1, 1}, {32, 128}, {33, 31}, {70, 200}, {31, 257}, {64, 96}, {100, 14}, {34, 16700}};
    for (size_t kind = 0; kind < N_KINDS; kind++)
        for (size_t shape = 0; shape < 8; shape++) {
            size_t rows = SHAPES_TO_TRY[shape][0], cols = SHAPES_TO_TRY[shape][1], n = shape == 7 ? 65 : 1 + random_below(75);
            float *w = (float *)allocate(rows * cols, 4, "test"), *row = (float *)allocate(rows * cols, 4, "test");
            float *x = (float *)allocate(n * cols, 4, "test"), *out = (float *)allocate(n * rows, 4, "test");
            for (size_t i = 0; i < rows * cols; i++) w[i] = 0.1f * random_float() * random_float() + 0.02f;
            for (size_t i = 0; i < n * cols; i++) x[i] = random_float();
            Matrix m = make_matrix(KINDS[kind].type, KINDS[kind].group, w, rows, cols);
            size_t padded = m.n_groups * m.group;
            Activations a = {(float *)allocate(n * padded, 4, "test"), NULL,
                             (float *)allocate(n * m.n_groups, 4, "test"), (float *)allocate(n * m.n_groups, 4, "test")};
            a.q = (int8_t *)a.x;
            /* half a step of the range, nearly 0.24; nf4's is 0.24, its steps unequal */
            double tolerance = m.type == F32 ? 0 : m.type == F16 ? 1e-4
                             : m.type == Q8 ? 0.12 / 255 : m.type == Q4 ? 0.12 / 15 : 0.013;
            for (size_t r = 0; r < rows; r++) {
                matrix_row(row + r * cols, &m, r);
                double error = 0;
                for (size_t k = 0; k < cols; k++) error += pow(row[r * cols + k] - w[r * cols + k], 2);
                CHECK(sqrt(error / (double)cols) <= tolerance, "%s %zu: row %zu is off by %g",
                      KINDS[kind].type, m.group, r, sqrt(error / (double)cols));
            }
            memset(out, 0xff, n * rows * 4);
            matmul(out, x, &m, &a, n);
            for (size_t t = 0; t < n; t++)
                for (size_t r = 0; r < rows; r++) {
                    double expect = 0, size = 0;
                    for (size_t k = 0; k < cols; k++) {
                        double xk = m.type < Q8 ? x[t * cols + k]
                                  : (double)a.scale[k / m.group * n + t] * a.q[(k / m.group * n + t) * m.group + k % m.group];
                        expect += xk * row[r * cols + k];
                        size += fabs(xk * row[r * cols + k]);
                    }
                    CHECK(fabs(out[t * rows + r] - expect) <= 2e-6 * size + 1e-9, "%s %zu [%zu, %zu]: %g, not %g",
                          KINDS[kind].type, m.group, rows, cols, out[t * rows + r], expect);
                }
            for (size_t t = 0; t < n; t += 32) {
                matmul(row, x + t * cols, &m, &a, 1);
                CHECK(!memcmp(row, out + t * rows, rows * 4), "%s %zu [%zu, %zu]: token %zu of %zu has other bits alone",
                      KINDS[kind].type, m.group, rows, cols, t, n);
            }
            void *all[] = {w, row, x, out, a.x, a.scale, a.sum, (void *)m.data};
            for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
        }
}

/* The search for scales: never worse than the range's ends, for bell-shaped weights clearly better; constant, zero and
 * tiny groups survive. */
static void test_scales(void) {
    float w[128 * PANEL], scale[PANEL], zero[PANEL];
    double plain_sum = 0, best_sum = 0;
    for (size_t i = 0; i < 128 * PANEL; i++) {
        size_t r = i % PANEL;
        float bell = random_float() + random_float() + random_float();
        w[i] = r == 0 ? 0 : r == 1 ? 0.7f : r == 2 ? -0.003f : r == 3 ? 1e-7f * bell : r == 4 ? 5 + 0.01f * bell : 0.02f * bell;
    }
    best_scales(scale, zero, w, ONES, 128, 15);
    Fit fit;
    fit_codes(&fit, NULL, w, ONES, 128, scale, zero, 15);
    for (size_t r = 0; r < PANEL; r++) {
        float low = w[r], high = w[r];
        double plain = 0;
        for (size_t k = 0; k < 128; k++) { low = fminf(low, w[k * PANEL + r]); high = fmaxf(high, w[k * PANEL + r]); }
        for (size_t k = 0; k < 128; k++) {
            double step = (high - low) / 15.0, code = step > 0 ? rint((w[k * PANEL + r] - low) / step) : 0;
            plain += pow(low + step * code - w[k * PANEL + r], 2);
        }
        if (r == 0) CHECK(fit.error[r] == 0, "zeros: %g", fit.error[r]);
        else if (r < 3) CHECK(fit.error[r] <= 128 * pow(0.0005 * w[r], 2), "constant: %g", fit.error[r]);
        else if (r == 3) CHECK(fit.error[r] <= 128 * 1e-13, "tiny: %g", fit.error[r]);
        else if (r == 4) CHECK(fit.error[r] <= 128 * pow(0.003, 2), "far from 0: %g", fit.error[r]);
        else {
            CHECK(fit.error[r] <= plain * 1.0001, "row %zu: %g, plainly %g", r, fit.error[r], plain);
            plain_sum += plain;
            best_sum += fit.error[r];
        }
    }
    CHECK(best_sum < 0.9 * plain_sum, "%g of the plain error", best_sum / plain_sum);
}

/* ---- the model ---------------------------------------------------------------------------------------------------- */

static void product64(double *out, const Matrix *w, const double *x) {
    float *row = (float *)allocate(w->cols, 4, "test");
    for (size_t r = 0; r < w->rows; r++) {
        matrix_row(row, w, r);
        out[r] = 0;
        for (size_t k = 0; k < w->cols; k++) out[r] += row[k] * x[k];
    }
    free(row);
}

static void norm64(double *out, const double *x, const float *w, size_t n, double eps) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (size_t i = 0; i < n; i++) out[i] = w[i] * x[i] / sqrt(sum / (double)n + eps);
}

enum { LENGTH = 200 };                  /* tokens; the window is 24, and the ring, of 128 or more, is gone around */

/* Logits of all n tokens, in FP64, by the book: no cache, no ring, no running maximum. logits: [n, vocab_size]. */
static void reference_forward(const Model *m, const int *ids, size_t n, double *logits) {
    const Header *c = &m->c;
    enum { W = 256 };                   /* wide enough for the shape "odd" */
    static double x[LENGTH][W], xb[W], qkv[LENGTH][W], att[W], h13[W], h[W];
    size_t q_dim = (size_t)c->n_heads * c->head_dim, kv_dim = (size_t)c->n_kv_heads * c->head_dim, hd = c->head_dim;
    for (size_t t = 0; t < n; t++) {
        float row[W];
        matrix_row(row, &m->token_embedding, (size_t)ids[t]);
        for (size_t i = 0; i < c->dim; i++) x[t][i] = row[i];
    }
    for (size_t l = 0; l < c->n_layers; l++) {
        const Layer *w = &m->layers[l];
        for (size_t t = 0; t < n; t++) {
            norm64(xb, x[t], (const float *)w->rms_att_weight.data, c->dim, c->norm_eps);
            product64(qkv[t], &w->wqkv, xb);
            for (size_t head = 0; head < c->n_heads + c->n_kv_heads; head++)
                for (size_t i = 0; i < hd / 2; i++) {
                    double angle = (double)t * pow(c->rope_theta, -2.0 * (double)i / (double)hd), *v = qkv[t] + head * hd;
                    double a = v[i] * cos(angle) - v[i + hd / 2] * sin(angle), b = v[i] * sin(angle) + v[i + hd / 2] * cos(angle);
                    v[i] = a;
                    v[i + hd / 2] = b;
                }
        }
        for (size_t t = 0; t < n; t++) {
            for (size_t head = 0; head < c->n_heads; head++) {
                size_t kv = head / (c->n_heads / c->n_kv_heads), first = c->window && t >= c->window ? t - c->window + 1 : 0;
                double weight[LENGTH], sum = 0;
                for (size_t s = first; s <= t; s++) {
                    double score = 0;
                    for (size_t i = 0; i < hd; i++) score += qkv[t][head * hd + i] * qkv[s][q_dim + kv * hd + i];
                    sum += weight[s] = exp(score / sqrt((double)hd));
                }
                for (size_t i = 0; i < hd; i++) {
                    att[head * hd + i] = 0;
                    for (size_t s = first; s <= t; s++)
                        att[head * hd + i] += weight[s] / sum * qkv[s][q_dim + kv_dim + kv * hd + i];
                }
            }
            product64(xb, &w->wo, att);
            for (size_t i = 0; i < c->dim; i++) x[t][i] += xb[i];
            norm64(xb, x[t], (const float *)w->rms_ffn_weight.data, c->dim, c->norm_eps);
            product64(h13, &w->w13, xb);
            for (size_t i = 0; i < c->hidden_dim; i++) h[i] = h13[i] / (1 + exp(-h13[i])) * h13[c->hidden_dim + i];
            product64(xb, &w->w2, h);
            for (size_t i = 0; i < c->dim; i++) x[t][i] += xb[i];
        }
    }
    for (size_t t = 0; t < n; t++) {
        norm64(xb, x[t], (const float *)m->rms_final_weight.data, c->dim, c->norm_eps);
        product64(logits + t * c->vocab_size, &m->wcls, xb);
    }
}

/* Logits of a sequence that is fed in chunks, in slot `slot` of `n_slots`; the other slots run sequences of random ids,
 * of other lengths, in the same forwards. logits: [n, vocab_size]. */
static void chunked_forward(const Model *m, const int *ids, size_t n, size_t chunk, size_t slot, size_t n_slots, float *logits) {
    enum { MOST = 512 };
    size_t fed[64] = {0}, done = 0, vocab = m->c.vocab_size, room = chunk + n_slots * 3;
    State s = new_state(m, n_slots, n + 8, room);
    float *got = (float *)allocate(room * vocab, sizeof(float), "test");
    while (done < n) {
        Token tokens[MOST];
        size_t count = 0, n_own = 0;
        for (size_t i = 0; i < n_slots; i++) {
            size_t n_feed = i == slot ? min_size(chunk, n - done) : random_below(chunk == 1 ? 2 : 4);
            for (size_t j = 0; j < n_feed && fed[i] < n; j++, count++) {
                tokens[count].id = i == slot ? ids[fed[i]] : (int)random_below(vocab);
                tokens[count].pos = fed[i]++;
                tokens[count].slot = i;
                tokens[count].want = i == slot;
                n_own += i == slot;
            }
        }
        s.decoding = chunk == 1;        /* matters to a GPU alone */
        m->backend->forward(&s, tokens, count, got);
        memcpy(logits + done * vocab, got, n_own * vocab * sizeof(float));
        done += n_own;
    }
    free_state(&s);
    free(got);
}

static void test_forward(void) {
    int ids[LENGTH];
    for (size_t i = 0; i < LENGTH; i++) ids[i] = (int)random_below(300);
    for (size_t k = 0; k < 2 * N_KINDS; k++) {         /* of each type, with the cache it has unasked and with one of codes */
        Model m = load_model(odd_model(KINDS[k / 2].type, KINDS[k / 2].group));
        m.kv_type = k % 2 ? Q8 : m.kv_type;
        size_t n = LENGTH * m.c.vocab_size;
        double *expect = (double *)allocate(n, sizeof(double), "test"), error = 0, size = 0;
        float *logits = (float *)allocate(n, sizeof(float), "test");
        reference_forward(&m, ids, LENGTH, expect);
        chunked_forward(&m, ids, LENGTH, 1, 0, 1, logits);
        for (size_t i = 0; i < n; i++) { error += pow(logits[i] - expect[i], 2); size += expect[i] * expect[i]; }
        /* FP32 rounds at 6e-8; a cache of 16 bits at some 1e-4, less than which arrives; int8 activations, keys and values at
         * 1/254 of a group's largest */
        int type = m.layers[0].wqkv.type;
        double tolerance = type >= Q8 || m.kv_type == Q8 ? 2e-2 : type == F32 ? 2e-6 : 4e-4;
        CHECK(sqrt(error / size) < tolerance, "%s, cache %s: logits off by %g of their size",
              m.path, TYPE_NAMES[m.kv_type], sqrt(error / size));
        free(expect);
        free(logits);
        free_model(&m);
    }
}

static double dot64(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* attention() by itself, in FP64 by the book, where scores rise from block to block, by less than the maximum is left as it is and
 * by more; fall; and where one is beyond all others. Of three tokens, in one span or, without a window, two; and of each alone, bit
 * for bit. */
static void test_attention(void) {
    enum { POSITIONS = 900, DIM = 176, WIDE = 192, N_TOKENS = 3, N_HEADS = 2, N = N_TOKENS * N_HEADS };
    static const double slopes[] = {0, 0.05, 0.3, -1, 0};     /* of scores, for each position */
    static const int types[] = {F32, Q16, Q8};
    static unsigned char cache[2][1024 * WIDE * 4] __attribute__((aligned(64)));
    static float keys[POSITIONS][DIM], values[POSITIONS][DIM], q[N][DIM], out[N * DIM];
    for (size_t turn = 0; turn < 30; turn++) {
        size_t kind = turn % 5, window = turn / 5 % 2 ? 300 : 0, pos = POSITIONS - N_TOKENS, from = first_seen(pos, window);
        int type = types[turn / 10];
        Cache c = {cache[0], cache[1], type, 1024, DIM, WIDE, position_bytes(type, WIDE)};
        Softmax softmax[N];
        double most = 0, worst = 0;
        memset(cache, 0, sizeof cache);
        for (size_t i = 0; i < N; i++)          /* the second group is of another size */
            for (size_t d = 0; d < DIM; d++) q[i][d] = d == 0 ? sqrtf((float)DIM) : (d < MAX_GROUP ? 1 : 8) * random_float();
        for (size_t p = 0; p < POSITIONS; p++) {
            for (size_t d = 0; d < DIM; d++) { keys[p][d] = random_float(); values[p][d] = random_float(); }
            keys[p][0] = (float)(slopes[kind] * (type == Q8 ? 0.1 : 1) * (double)p) + (kind == 4 && p == 700 ? 60 : 0);
            cache_store(c, p, keys[p], values[p]);
        }
        attention(softmax, out, N_HEADS, q[0], N_HEADS * DIM, c, N_TOKENS, N_HEADS, pos, window, from, POSITIONS);
        for (size_t t = 0; t < N_TOKENS; t++) {
            Softmax alone[N_HEADS];
            float out_alone[N_HEADS * DIM];
            attention(alone, out_alone, N_HEADS, q[t * N_HEADS], N_HEADS * DIM, c, 1, N_HEADS, pos + t, window,
                      first_seen(pos + t, window), pos + t + 1);
            CHECK(!memcmp(alone, softmax + t * N_HEADS, sizeof alone)
                  && !memcmp(out_alone, out + t * N_HEADS * DIM, sizeof out_alone), "%s, kind %zu, token %zu alone",
                  TYPE_NAMES[type], kind, t);
        }
        for (size_t i = 0; i < N; i++) {
            double score[POSITIONS], max = -INFINITY, sum = 0, expect[DIM] = {0};
            size_t last = pos + i / N_HEADS;
            for (size_t p = first_seen(last, window); p <= last; p++) {
                score[p] = dot64(q[i], keys[p], DIM) / sqrt((double)DIM);
                if (score[p] > max) max = score[p];
                if (fabs(score[p]) > most) most = fabs(score[p]);
            }
            for (size_t p = first_seen(last, window); p <= last; p++) {
                sum += exp(score[p] - max);
                for (size_t d = 0; d < DIM; d++) expect[d] += exp(score[p] - max) * values[p][d];
            }
            for (size_t d = 0; d < DIM; d++) {
                double off = fabs(out[i * DIM + d] / softmax[i].sum - expect[d] / sum);
                worst = worse(worst, off);
            }
        }
        /* values are below 1; a score is off by its rounding, and e^score by as much of itself */
        double tolerance = type == F32 ? 1e-6 + 5e-7 * most : 1e-4 * (1 + most) * (type == Q16 ? 1 : 60);
        CHECK(worst < tolerance, "%s, kind %zu, window %zu: off by %g, not %g", TYPE_NAMES[type], kind, window, worst, tolerance);
    }
}

/* The contract: the same bits however a sequence is run. */
static void test_determinism(void) {
    int ids[LENGTH];
    for (size_t i = 0; i < LENGTH; i++) ids[i] = (int)random_below(300);
    for (size_t k = 0; k < 2 * N_KINDS; k++) {
        Model m = load_model(odd_model(KINDS[k / 2].type, KINDS[k / 2].group));
        m.kv_type = k % 2 ? Q8 : m.kv_type;
        size_t bytes = LENGTH * m.c.vocab_size * sizeof(float);
        float *alone = (float *)allocate(bytes, 1, "test"), *logits = (float *)allocate(bytes, 1, "test");
        chunked_forward(&m, ids, LENGTH, 1, 0, 1, alone);
        for (int threads = 1; threads <= 2; threads++)
            for (size_t run = 0; run < 8; run++) {
                static const size_t chunks[] = {1, 7, 64, LENGTH};
                size_t n_slots = run < 4 ? 1 : 32, slot = run < 4 ? 0 : random_below(32);
#ifdef _OPENMP
                omp_set_num_threads(threads);
#endif
                chunked_forward(&m, ids, LENGTH, chunks[run % 4], slot, n_slots, logits);
                CHECK(!memcmp(alone, logits, bytes), "%s, cache %s: %d threads, chunks of %zu, slot %zu of %zu",
                      m.path, TYPE_NAMES[m.kv_type], threads, chunks[run % 4], slot, n_slots);
            }
        free(alone);
        free(logits);
        free_model(&m);
    }
    /* attention over several spans of positions: by themselves where there are few tokens, one after another where many */
    enum { LONG = 2 * SPAN + 300 };
    static const uint32_t windows[] = {0, SPAN + 100};
    int long_ids[LONG];
    for (size_t i = 0; i < LONG; i++) long_ids[i] = (int)random_below(300);
    for (size_t k = 0; k < 4; k++) {
        Model m = load_model(odd_model("q8", 32));
        m.c.window = windows[k / 2];
        m.kv_type = k % 2 ? Q8 : m.kv_type;
        size_t bytes = LONG * m.c.vocab_size * sizeof(float);
        float *alone = (float *)allocate(bytes, 1, "test"), *logits = (float *)allocate(bytes, 1, "test");
        chunked_forward(&m, long_ids, LONG, 1, 0, 1, alone);
        chunked_forward(&m, long_ids, LONG, 40, 20, 50, logits);
        CHECK(!memcmp(alone, logits, bytes), "window %u, cache %s: 40 tokens among those of 49 other slots",
              windows[k / 2], TYPE_NAMES[m.kv_type]);
        chunked_forward(&m, long_ids, LONG, 150, 0, 1, logits);
        CHECK(!memcmp(alone, logits, bytes), "window %u, cache %s: chunks of 150", windows[k / 2], TYPE_NAMES[m.kv_type]);
        free(alone);
        free(logits);
        free_model(&m);
    }
}

/* Writes the logits of a prefill of 96 tokens and of six steps of three sequences to stdout, as they lie in memory, with both kinds
 * of cache: tests/test_variants.py compares builds. */
static int write_logits(const char *path) {
    Model m = load_model(path);
    size_t vocab = m.c.vocab_size, n;
    float *logits = (float *)allocate(96 * vocab, sizeof(float), "logits");
    for (size_t step = 0; step < 14; step++) {
        static State s;
        Token tokens[96];
        if (step == 7) { free_state(&s); m.kv_type = Q8; }
        if (step % 7 == 0) s = new_state(&m, 3, 120, 96);
        for (n = 0; n < (step % 7 ? 3u : 96u); n++) {       /* first 80, 10 and 6 tokens of the three */
            size_t slot = step % 7 ? n : n < 80 ? 0 : n < 90 ? 1 : 2;
            size_t start = slot == 0 ? 0 : slot == 1 ? 80 : 90, length = slot == 0 ? 80 : slot == 1 ? 10 : 6;
            Token token = {(int)random_below(vocab), step % 7 ? length + step % 7 - 1 : n - start, slot, true};
            tokens[n] = token;
        }
        forward(&s, tokens, n, logits);
        fwrite(logits, sizeof(float), n * vocab, stdout);
    }
    flush_stdout();
    return 0;
}

/* ---- sampler and batch -------------------------------------------------------------------------------------------- */

static void test_sampler(void) {
    enum { N = 1000, DRAWS = 200000 };
    float logits[N], copy[N];
    double p[N], total = 0;
    uint64_t state = 5;
    for (int i = 0; i < N; i++) logits[i] = 4 * random_float();
    logits[17] = logits[18] = logits[19];                               /* equal ones */
    size_t best = 0;
    for (size_t i = 0; i < N; i++) if (logits[i] > logits[best]) best = i;
    memcpy(copy, logits, sizeof copy);
    CHECK(sample(copy, N, 0, 0.9f, 0.999) == (int)best, "temperature 0 is greedy");
    memcpy(copy, logits, sizeof copy);
    CHECK(sample(copy, N, 1, 0, 0.999) == (int)best, "top_p 0 is greedy");

    float tops[] = {0.3f, 0.9f, 1.0f};
    for (int k = 0; k < 3; k++) {
        /* the set by sorting: the fewest most probable ids with a mass of top_p */
        size_t order[N], kept = 0;
        double mass = 0, count[N] = {0}, chi = 0;
        total = 0;
        for (size_t i = 0; i < N; i++) { p[i] = exp((logits[i] - logits[best]) / 0.7); total += p[i]; order[i] = i; }
        for (size_t i = 1; i < N; i++)
            for (size_t j = i; j && p[order[j]] > p[order[j - 1]]; j--) {
                size_t t = order[j]; order[j] = order[j - 1]; order[j - 1] = t;
            }
        while (kept < N && mass < tops[k] * total - 1e-6) mass += p[order[kept++]];
        for (int d = 0; d < DRAWS; d++) {
            memcpy(copy, logits, sizeof copy);
            count[sample(copy, N, 0.7f, tops[k], uniform(&state))]++;
        }
        for (size_t i = kept; i < N; i++)
            CHECK(count[order[i]] == 0, "top_p %g: id %zu is outside the set of %zu", tops[k], order[i], kept);
        for (size_t i = 0; i < kept; i++) {
            double e = DRAWS * p[order[i]] / mass;
            chi += (count[order[i]] - e) * (count[order[i]] - e) / e;
        }
        /* chi-square with kept - 1 degrees of freedom: mean kept - 1, deviation sqrt(2 (kept - 1)); 5 of them */
        CHECK(fabs(chi - (double)(kept - 1)) < 5 * sqrt(2.0 * (double)kept), "top_p %g: chi-square %g for %zu ids",
              tops[k], chi, kept);
    }
    for (int i = 0; i < N; i++) copy[i] = NAN;
    int id = sample(copy, N, 1, 0.9f, uniform(&state));
    CHECK(id >= 0 && id < N, "NaN logits give id %d", id);
    for (int i = 0; i < N; i++) copy[i] = i == 7 ? INFINITY : -INFINITY;
    id = sample(copy, N, 1, 0.9f, uniform(&state));
    CHECK(id >= 0 && id < N, "infinite logits give id %d", id);
}

static Options test_options(size_t batch, size_t tokens) {
    Options o;
    memset(&o, 0, sizeof o);
    o.batch = batch;
    o.tokens = tokens;
    o.temperature = 0.9f;
    o.top_p = 0.95f;
    o.seed = 7;
    o.quiet = true;
    return o;
}

/* n sequences of prompts of many lengths through so many slots; to be freed with free_sequences. */
static Sequence *run_batch(const Model *m, size_t n, size_t first, size_t slots, size_t tokens, size_t context, size_t longest) {
    Options o = test_options(slots, tokens);
    Sequence *sequences = (Sequence *)allocate(n, sizeof *sequences, "test");
    State s = new_state(m, slots, min_size(context, longest + tokens), slots > 40 ? slots : 40);
    Statistics statistics;
    memset(&statistics, 0, sizeof statistics);
    for (size_t i = 0; i < n; i++) {
        size_t index = first + i, length = 1 + index * 7919 % longest;
        for (size_t j = 0; j < length; j++) push_id(&sequences[i], (int)((index * 31 + j * 17) % 300));
        sequences[i].n_prompt = length;
        start_sequence(&sequences[i], &o, index, context);
    }
    generate(&s, sequences, n, &o, &statistics, NULL);
    free_statistics(&statistics);
    free_state(&s);
    return sequences;
}

static void free_sequences(Sequence *sequences, size_t n) {
    for (size_t i = 0; i < n; i++) free(sequences[i].ids);
    free(sequences);
}

static bool same_sequence(const Sequence *a, const Sequence *b) {
    return a->n_ids == b->n_ids && !memcmp(a->ids, b->ids, a->n_ids * sizeof(int)) && !strcmp(a->finish, b->finish);
}

static void test_batch(void) {
    Model m = load_model(odd_model("q4", 32));
    Sequence *all = run_batch(&m, 32, 0, 32, 40, 110, 90);
    int n_finish[3] = {0};
    for (size_t i = 0; i < 32; i++) {
        Sequence *one = run_batch(&m, 1, i, 1, 40, 110, 90);
        CHECK(same_sequence(&all[i], one), "sequence %zu alone differs from the batch", i);
        free_sequences(one, 1);
        size_t made = all[i].n_ids - all[i].n_prompt;
        const char *f = all[i].finish;
        bool eos = made && all[i].ids[all[i].n_ids - 1] == m.tokenizer.eos[0];
        n_finish[0] += eos;
        if (eos) CHECK(!strcmp(f, "eos"), "%s", f);
        else if (made == 40) { CHECK(!strcmp(f, "length"), "%s", f); n_finish[1]++; }
        else { CHECK(all[i].n_ids == 110 && !strcmp(f, "context"), "%zu ids: %s", all[i].n_ids, f); n_finish[2]++; }
    }
    CHECK(n_finish[1] && n_finish[2], "the test's lengths reach both ends");
    static const size_t slot_counts[] = {1, 2, 5, 31};
    for (size_t k = 0; k < 4; k++) {    /* continuous batching: sequences take slots that others left */
        Sequence *fewer = run_batch(&m, 32, 0, slot_counts[k], 40, 110, 90);
        for (size_t i = 0; i < 32; i++)
            CHECK(same_sequence(&all[i], &fewer[i]), "sequence %zu differs in %zu slots", i, slot_counts[k]);
        free_sequences(fewer, 32);
    }
    free_sequences(all, 32);
    Sequence *none = run_batch(&m, 3, 0, 2, 0, 4000, 90);
    for (size_t i = 0; i < 3; i++)
        CHECK(none[i].n_ids == none[i].n_prompt && none[i].n_fed == none[i].n_prompt, "no tokens asked for");
    free_sequences(none, 3);
    for (size_t batch = 1; batch <= 64; batch *= 4) {
        Sequence *many = run_batch(&m, batch + 3, 0, batch, 3, 4000, batch > 4 ? 300 : 3000);
        for (size_t i = 0; i < batch + 3; i++)
            CHECK(many[i].finish && many[i].n_ids > many[i].n_prompt, "batch %zu, prompt of %zu", batch, many[i].n_prompt);
        free_sequences(many, batch + 3);
    }
    free_model(&m);
}

static size_t n_steps;
static void counting_step(State *s, const Token *tokens, size_t n, Draw *draws, float temperature, float top_p) {
    n_steps++;
    cpu_step(s, tokens, n, draws, temperature, top_p);
}

/* --lookup: whatever is guessed, the sequences are what they are without it, alone and in a batch, greedy and drawn; and where
 * the text repeats itself, as greedy text of such a model soon does, it takes fewer steps. */
static void test_lookup(void) {
    enum { TOKENS = 300, SLOTS = 3 };
    Backend counting = CPU;
    counting.step = counting_step;
    Model m = load_model(odd_model("q8", 32));
    m.backend = &counting;
    for (int greedy = 0; greedy < 2; greedy++) {
        static const size_t lookups[] = {0, 1, 7, 64};
        Sequence sequences[4][SLOTS];
        size_t steps[4];
        memset(sequences, 0, sizeof sequences);
        for (size_t k = 0; k < 4; k++) {
            Options o = test_options(SLOTS, TOKENS);
            State s = new_state(&m, SLOTS, 2000, 40);
            Statistics statistics;
            memset(&statistics, 0, sizeof statistics);
            o.temperature = greedy ? 0 : 0.2;
            o.lookup = lookups[k];
            o.ignore_eos = true;
            n_steps = 0;
            for (size_t i = 0; i < SLOTS; i++) {
                Sequence *q = &sequences[k][i];
                for (size_t j = 0; j < 20 + i; j++) push_id(q, (int)(j * j % (5 + i)));
                q->n_prompt = q->n_ids;
                start_sequence(q, &o, i, 2000);
                q->limit -= 11 * i;     /* they end one after the other */
            }
            generate(&s, sequences[k], SLOTS, &o, &statistics, NULL);
            steps[k] = n_steps;
            size_t expect = SLOTS * TOKENS - 11 * (SLOTS - 1) * SLOTS / 2;
            CHECK(statistics.pass.generated_tokens == expect && statistics.itl.n + statistics.ttft.n == expect,
                  "%zu tokens, not %zu", statistics.pass.generated_tokens, expect);
            free_statistics(&statistics);
            free_state(&s);
        }
        for (size_t k = 1; k < 4; k++)
            for (size_t i = 0; i < SLOTS; i++)
                CHECK(same_sequence(&sequences[0][i], &sequences[k][i]), "sequence %zu differs with --lookup %zu, greedy %d",
                      i, lookups[k], greedy);
        if (greedy) CHECK(steps[2] < steps[0] * 4 / 5, "%zu steps with --lookup 7, %zu without", steps[2], steps[0]);
        for (size_t k = 0; k < 4; k++) for (size_t i = 0; i < SLOTS; i++) free(sequences[k][i].ids);
    }
    free_model(&m);
}

/* ---- calibration ------------------------------------------------------------------------------------------------- */

/* H of n columns from correlated random inputs, as panels; plain[i * n + j] the same in FP64. */
static float *random_hessian(double *plain, size_t n, size_t n_tokens) {
    float *h = (float *)allocate(n * n, sizeof(float), "test"), *x = (float *)allocate(n, sizeof(float), "test");
    for (size_t t = 0; t < n_tokens; t++) {
        for (size_t k = 0; k < n; k++) x[k] = random_float() * (k % 17 == 0 ? 5 : 1) + (k ? 0.8f * x[k - 1] : 0);
        for (size_t i = 0; i < n; i++) for (size_t j = 0; j < n; j++) plain[i * n + j] += (double)x[i] * x[j];
    }
    for (size_t i = 0; i < n; i++) for (size_t j = 0; j < n; j++) *element(h, n, i, j) = j < i ? 1e30f : (float)plain[i * n + j];
    free(x);
    return h;
}

/* The factor against U^T U in FP64, and solve() against H: (G H^-1) H = G. */
static void test_cholesky(void) {
    static const size_t SIZES[] = {32, 128, 160, 288};
    for (size_t s = 0; s < 4; s++) {
        size_t n = SIZES[s], n_panels = 3;
        double *plain = (double *)allocate(n * n, sizeof(double), "test"), worst = 0;
        float *u = random_hessian(plain, n, 2 * n), *g = (float *)allocate(n_panels * n, PANEL * sizeof(float), "test");
        CHECK(cholesky(u, n), "%zu columns", n);
        for (size_t i = 0; i < n; i++)
            for (size_t j = i; j < n; j++) {
                double sum = 0;
                for (size_t k = 0; k <= i; k++) sum += (double)*element(u, n, k, i) * *element(u, n, k, j);
                worst = fmax(worst, fabs(sum - plain[i * n + j]) / sqrt(plain[i * n + i] * plain[j * n + j]));
                CHECK(*element(u, n, i, j) == *element(u, n, j, i), "%zu, %zu", i, j);
            }
        CHECK(worst < 1e-5, "%zu columns: U^T U is off by %g of the diagonal", n, worst);        /* sqrt(288) * 2^-24 * some */
        for (size_t i = 0; i < n_panels * n * PANEL; i++) g[i] = random_float();
        float *x = (float *)allocate(n_panels * n, PANEL * sizeof(float), "test");
        memcpy(x, g, n_panels * n * PANEL * sizeof(float));
        solve(x, n_panels, u, n);
        worst = 0;
        for (size_t p = 0; p < n_panels; p++)
            for (size_t j = 0; j < n; j++)
                for (size_t r = 0; r < PANEL; r++) {
                    double sum = 0;
                    for (size_t k = 0; k < n; k++) sum += x[(p * n + k) * PANEL + r] * plain[k * n + j];
                    worst = fmax(worst, fabs(sum - g[(p * n + j) * PANEL + r]));
                }
        CHECK(worst < 1e-3, "%zu columns: X H is off by %g", n, worst);         /* G is up to 1, H's condition some 1e3 */
        free(x);
        free(g);
        free(u);
        free(plain);
    }
    float *bad = (float *)allocate(64 * 64, sizeof(float), "test");     /* two columns that are the same: singular, then worse */
    for (size_t k = 0; k < 64; k++) *element(bad, 64, k, k) = 1;
    *element(bad, 64, 10, 50) = 1.001f;
    CHECK(!cholesky(bad, 64), "not positive definite, and not noticed");
    free(bad);
}

/* Rounds random weights, w, with gptq() or to nearest; the loss tr(A E H E^T) in FP64, for A (NULL: 1) and H, in plain form. */
static double round_and_lose(Rounding *q, const float *w, const float *u, const float *v, bool nearest, const double *h,
                             const double *a) {
    size_t n = q->n, m = q->n_panels * PANEL, count = m * n;
    float ones[512];
    double *eh = (double *)allocate(count, sizeof(double), "test"), loss = 0;
    for (size_t k = 0; k < n; k++) ones[k] = 1;
    memcpy(q->e, w, count * sizeof(float));
    if (nearest) round_panels(q, ones);
    else gptq(q, u, v);
    for (size_t i = 0; i < count; i++) {        /* what is left is what codes and scales do not account for */
        const float *scale = q->scales + i / PANEL / q->group * 2 * PANEL + i % PANEL;
        float left = w[i] - scale[0] * (q->codes[i] - scale[PANEL]);
        CHECK(q->codes[i] <= q->levels && (nearest || fabsf(left - q->e[i]) < 1e-5), "%zu: left %g, not %g", i, left, q->e[i]);
        q->e[i] = left;
    }
    for (size_t i = 0; i < m; i++)
        for (size_t k = 0; k < n; k++) {
            double e = *element(q->e, n, k, i);
            for (size_t j = 0; j < n; j++) eh[i * n + j] += e * h[k * n + j];
        }
    for (size_t i = 0; i < m; i++)
        for (size_t j = a ? 0 : i; j < (a ? m : i + 1); j++)
            for (size_t k = 0; k < n; k++) loss += (a ? a[i * m + j] : 1) * eh[i * n + k] * *element(q->e, n, k, j);
    free(eh);
    return loss;
}

/* With correlated inputs GPTQ loses less than rounding to nearest, with correlated gradients less again; and its codes are those of
 * its paper, with the inverse of H, in FP64. */
static void test_gptq(void) {
    enum { PANELS = 3, M = PANELS * PANEL };
    for (size_t turn = 0; turn < 3; turn++) {
        size_t n = turn == 2 ? 160 : 256, group = turn == 2 ? 32 : (size_t)128 >> turn, count = M * n, different = 0;
        double *plain = (double *)allocate(n * n, sizeof(double), "test");
        double *inverse = (double *)allocate(n * n, sizeof(double), "test");
        double *outputs = (double *)allocate(M * M, sizeof(double), "test");
        float *u = random_hessian(plain, n, 4 * n), *v = random_hessian(outputs, M, 4 * M), *w = floats(count);
        Rounding q = {n, group, PANELS, 15, floats(count), floats(count),
                      (uint8_t *)allocate(count, 1, "test"), floats(count / group * 2)};
        for (size_t i = 0; i < count; i++) w[i] = 0.02f * (random_float() + random_float() + random_float());
        CHECK(cholesky(u, n) && cholesky(v, M), "turn %zu", turn);
        double nearest = round_and_lose(&q, w, u, NULL, true, plain, outputs);
        double alone = round_and_lose(&q, w, u, NULL, false, plain, outputs);
        double both = round_and_lose(&q, w, u, v, false, plain, outputs);
        CHECK(both < 0.7 * alone && alone < 0.7 * nearest && both > 0.01 * nearest,
              "to nearest %g, with H %g, with A too %g", nearest, alone, both);
        nearest = round_and_lose(&q, w, u, NULL, true, plain, NULL);
        alone = round_and_lose(&q, w, u, NULL, false, plain, NULL);
        CHECK(alone < 0.5 * nearest && alone > 0.01 * nearest, "to nearest %g, GPTQ %g", nearest, alone);

        /* inverse of H by Gauss and Jordan, which then loses each column that was rounded: equations 2 and 3 of the paper */
        double *left = (double *)allocate(n * n, sizeof(double), "test"), *rest = (double *)allocate(count, sizeof(double), "test");
        memcpy(left, plain, n * n * sizeof(double));
        for (size_t k = 0; k < n; k++) inverse[k * n + k] = 1;
        for (size_t k = 0; k < n; k++) {
            double pivot = left[k * n + k];
            for (size_t j = 0; j < n; j++) { left[k * n + j] /= pivot; inverse[k * n + j] /= pivot; }
            for (size_t i = 0; i < n; i++) {
                double f = left[i * n + k];
                for (size_t j = 0; j < n && i != k; j++) {
                    left[i * n + j] -= f * left[k * n + j];
                    inverse[i * n + j] -= f * inverse[k * n + j];
                }
            }
        }
        for (size_t i = 0; i < count; i++) rest[i] = w[i];
        for (size_t k = n; k-- > 0;) {
            for (size_t p = 0; p < (size_t)PANELS; p++)
                for (size_t r = 0; r < PANEL; r++) {
                    const float *scale = q.scales + (p * n + k) / group * 2 * PANEL + r;
                    double x = rest[(p * n + k) * PANEL + r], code = rint(x / scale[0] + scale[PANEL]);
                    code = fmin(fmax(code, 0), 15);
                    different += code != q.codes[(p * n + k) * PANEL + r];
                    double error = (x - scale[0] * (code - scale[PANEL])) / inverse[k * n + k];
                    for (size_t j = 0; j < k; j++) rest[(p * n + j) * PANEL + r] -= error * inverse[k * n + j];
                }
            for (size_t i = 0; i < k; i++) for (size_t j = 0; j < k; j++)
                inverse[i * n + j] -= inverse[i * n + k] * inverse[k * n + j] / inverse[k * n + k];
        }
        /* a code at the edge between two may fall to the other side in FP32, and all that follow in its row may then differ */
        CHECK(different < count / 20, "%zu codes of %zu are not the paper's", different, count);
        void *all[] = {plain, inverse, outputs, u, v, w, q.e, q.f, q.codes, q.scales, left, rest};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    }
}

/* What layer_backward() gives, against the difference that a small step of the layer's input makes: of all tokens' inputs at
 * once, in several directions. And the two sums of squares of gradients that it leaves are the same. */
static void test_backward(void) {
    enum { N = 2 * SEQUENCE };
    Model m = load_model(odd_model("f32", 32));
    size_t dim = m.c.dim, count = N * dim;
    int ids[N];
    Stream s;
    Gradients of[6];
    float *x = floats(count), *g = floats(count), *dx = floats(count);
    memset(of, 0, sizeof of);
    for (size_t i = 0; i < N; i++) ids[i] = (int)random_below(m.c.vocab_size);
    start_stream(&s, &m, &m.token_embedding, ids, N);
    s.layer = copy_layer(&m.layers[1]);
    for (size_t k = 0; k < 6; k++) {            /* random weights are so small that a layer hardly does anything */
        Matrix *w = (Matrix *)&s.layer + k;
        for (size_t i = 0; i < w->bytes / sizeof(float); i++)
            ((float *)w->data)[i] *= w->cols == 1 ? 1 + 0.5f * random_float() : 10;
        of[k].rows = w->rows;
        of[k].a = floats(round_up(w->rows, PANEL) * round_up(w->rows, PANEL));
        of[k].weights = floats(N);
        of[k].in = floats(w->cols);
        of[k].out = floats(w->rows);
    }
    for (size_t i = 0; i < count; i++) { g[i] = dx[i] = random_float(); s.x[i] = random_float(); }
    memcpy(x, s.x, count * sizeof(float));
    layer_backward(&s, dx, of, N);
    for (int direction = 0; direction < 4; direction++) {
        double loss[2] = {0, 0}, expect = 0, step = 1e-2;
        uint64_t seed = (uint64_t)direction;
        for (int side = 0; side < 2; side++) {
            uint64_t same = seed;
            expect = 0;
            for (size_t i = 0; i < N; i++)
                for (size_t d = 0; d < dim; d++) {
                    double by = uniform(&same) - 0.5;
                    expect += by * dx[i * dim + d];
                    *element(s.x, dim, d, i) = *element(x, dim, d, i) + (float)(by * (side ? step : -step));
                }
            advance(&s, N);
            for (size_t i = 0; i < N; i++)
                for (size_t d = 0; d < dim; d++) loss[side] += (double)g[i * dim + d] * *element(s.x, dim, d, i);
        }
        double got = (loss[1] - loss[0]) / (2 * step), scale = 0.3 * sqrt((double)count);       /* what such a sum is like */
        CHECK(fabs(got - expect) < 2e-3 * scale + 1e-3 * fabs(expect),      /* the step's square, and FP32 */
              "direction %d: %g, not %g", direction, got, expect);
    }
    for (size_t k = 0; k < 6; k++) {
        double trace = 0, sum = 0;
        for (size_t i = 0; i < of[k].rows && OPERATIONS[k] != NORM; i++) {
            trace += *element(of[k].a, round_up(of[k].rows, PANEL), i, i);
            sum += of[k].out[i];
        }
        CHECK(fabs(trace - sum) <= 1e-4 * sum && (sum > 0) == (OPERATIONS[k] != NORM), "tensor %zu: %g, %g", k, trace, sum);
        free(of[k].a);
        free(of[k].weights);
        free(of[k].in);
        free(of[k].out);
        free((void *)((Matrix *)&s.layer)[k].data);
    }
    free(x);
    free(g);
    free(dx);
    free(s.x);
    free_state(&s.state);
    free_model(&m);
}

/* Folded scales leave the FP32 model's logits as they are. */
static void test_fold(void) {
    enum { N = 40 };
    Model m = load_model(odd_model("f32", 32)), folded = m;
    const Header *c = &m.c;
    size_t q_dim = (size_t)c->n_heads * c->head_dim, group = c->n_heads / c->n_kv_heads;
    size_t widths[4] = {c->dim, q_dim, c->dim, c->hidden_dim};
    Token tokens[N];
    float *logits[2];
    double worst = 0, largest = 0;
    folded.layers = (Layer *)allocate(c->n_layers, sizeof(Layer), "test");
    for (size_t l = 0; l < c->n_layers; l++) {
        float *s[4];
        folded.layers[l] = copy_layer(&m.layers[l]);
        for (size_t k = 0; k < 4; k++) {
            s[k] = (float *)allocate(widths[k], sizeof(float), "test");
            for (size_t i = 0; i < widths[k]; i++) s[k][i] = expf(random_float());
        }
        for (size_t i = 0; i < q_dim; i++) s[1][i] = s[1][i / (group * c->head_dim) * group * c->head_dim + i % c->head_dim];
        fold_scales(&folded.layers[l], c, s);
        for (size_t k = 0; k < 4; k++) free(s[k]);
    }
    for (size_t i = 0; i < N; i++) {
        Token t = {(int)random_below(c->vocab_size), i, 0, true};
        tokens[i] = t;
    }
    for (size_t k = 0; k < 2; k++) {
        State s = new_state(k ? &folded : &m, 1, N, N);
        logits[k] = (float *)allocate(N * c->vocab_size, sizeof(float), "test");
        forward(&s, tokens, N, logits[k]);
        free_state(&s);
    }
    for (size_t i = 0; i < N * c->vocab_size; i++) {
        double off = fabs(logits[1][i] - logits[0][i]), size = fabs(logits[0][i]);
        worst = worse(worst, off);
        if (!(size <= largest)) largest = size;
    }
    CHECK(worst < 1e-5 * largest, "logits up to %g are off by %g", largest, worst);        /* FP32 rounding of some hundred terms */
    for (size_t l = 0; l < c->n_layers; l++) {
        for (size_t i = 0; i < 2; i++) {        /* and it was not for want of a change */
            const Matrix *a = i ? &m.layers[l].w2 : &m.layers[l].wo, *b = i ? &folded.layers[l].w2 : &folded.layers[l].wo;
            CHECK(memcmp(a->data, b->data, a->bytes), "layer %zu is as it was", l);
        }
        for (size_t k = 0; k < 6; k++) free((void *)((Matrix *)&folded.layers[l])[k].data);
    }
    free(folded.layers);
    free(logits[0]);
    free(logits[1]);
    free_model(&m);
}

/* Scales of channels: important ones get larger ones, and what they then lose is less than without. */
static void test_channel_scales(void) {
    enum { COLS = 256, ROWS_ = 64 };
    Matrix w;
    matrix_layout(&w, F32, 0, ROWS_, COLS);
    float *data = (float *)allocate(w.bytes, 1, "test"), importance[COLS], s[COLS];
    double lost[2] = {0, 0}, logs = 0;
    w.data = (unsigned char *)data;
    for (size_t i = 0; i < ROWS_ * COLS; i++) data[i] = random_float() + random_float() + random_float();
    for (size_t k = 0; k < COLS; k++) importance[k] = k % 16 == 3 ? 100 : 1;
    choose_scales(s, &w, importance, 128, 15);
    for (size_t k = 0; k < COLS; k++) {
        logs += log(s[k]);
        CHECK(k % 16 == 3 ? s[k] > 1.2f : s[k] < 1, "channel %zu: %g", k, s[k]);
    }
    CHECK(fabs(logs) < 1e-3, "their geometric mean is e^%g", logs / COLS);
    for (int turn = 0; turn < 2; turn++)
        for (size_t p = 0; p < w.n_panels; p++)
            for (size_t k = 0; k < COLS; k += 128) {
                float block[128 * PANEL], left[128], scale[PANEL], zero[PANEL];
                Fit fit;
                for (size_t i = 0; i < 128 * PANEL; i++)
                    block[i] = data[(p * COLS + k) * PANEL + i] * (turn ? s[k + i / PANEL] : 1);
                for (size_t i = 0; i < 128; i++) left[i] = importance[k + i] / (turn ? s[k + i] * s[k + i] : 1);
                best_scales(scale, zero, block, left, 128, 15);
                fit_codes(&fit, NULL, block, left, 128, scale, zero, 15);
                for (size_t r = 0; r < PANEL; r++) lost[turn] += fit.error[r];
            }
    CHECK(lost[1] < 0.85 * lost[0], "%g with scales, %g without", lost[1], lost[0]);
    free(data);
}

/* ---- files -------------------------------------------------------------------------------------------------------- */

/* Loads a file and runs a step in a child process: 0 it ran, 1 it was refused, anything else is a crash. */
static int try_model(const char *path) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(99);
        Model m = load_model(path);
        State s = new_state(&m, 1, 8, 4);
        Token tokens[2] = {{1, 0, 0, false}, {2, 1, 0, true}};
        size_t n_ids;
        float *logits = (float *)allocate(m.c.vocab_size, sizeof(float), "test");
        if (m.c.vocab_size > 2) forward(&s, tokens, 2, logits);
        int *ids = encode(&m.tokenizer, "some text\xff to <s> encode", 24, &n_ids);
        Decoder d;
        memset(&d, 0, sizeof d);
        for (size_t i = 0; i < n_ids; i++) if (ids[i] < 0 || (uint32_t)ids[i] >= m.c.vocab_size) _exit(98);
        for (size_t i = 0; i < m.c.vocab_size; i++) decode(&d, &m.tokenizer, (int)i);
        decode_pending(&d, true);
        _exit(0);                       /* no leak check: what a test left behind is no matter here */
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void write_bytes(const char *path, const unsigned char *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) { perror(path); exit(1); }
}

static void test_damaged_files(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);             /* a forked child has no threads of its parent's */
#endif
    const char *good = odd_model("q4", 32);
    char path[160];
    snprintf(path, sizeof path, "%s/damaged.bin", directory);
    Text file = read_file(good);
    unsigned char *bytes = (unsigned char *)file.text;
    Header *c = (Header *)bytes;
    size_t head = c->tokenizer_offset + 400;            /* header, table, the tokenizer's start */
    CHECK(try_model(good) == 0, "an undamaged file runs");
    CHECK(try_model("/") == 1 && try_model("/nonexistent") == 1, "a directory, no file");
    for (size_t i = 0; i < 200; i++) {
        size_t n = i < 100 ? head * i / 100 : head + (file.length - head) * (i - 100) / 100;
        write_bytes(path, bytes, n);
        int status = try_model(path);
        CHECK(status == 1, "cut to %zu of %zu bytes: status %d", n, file.length, status);
        uint64_t size = c->file_size;   /* the same with a header that agrees */
        c->file_size = n;
        write_bytes(path, bytes, n);
        c->file_size = size;
        status = try_model(path);
        CHECK(status == 1, "cut to %zu bytes with that size in the header: status %d", n, status);
    }
    int refused = 0;
    for (int i = 0; i < 2000; i++) {
        size_t at = i < 1000 ? random_below(sizeof(Header)) : random_below(head);
        unsigned char saved = bytes[at];
        bytes[at] = (unsigned char)(i % 3 == 0 ? 0xff : i % 3 == 1 ? saved ^ 1 << random_below(8) : (int)random_below(256));
        write_bytes(path, bytes, file.length);
        int status = try_model(path);
        CHECK(status == 0 || status == 1, "byte %zu from %d to %d: status %d", at, saved, bytes[at], status);
        refused += status == 1;
        bytes[at] = saved;
    }
    CHECK(refused > 500, "only %d of 2000 were refused", refused);
    static const char *const PIECES[] = {"<0x41>", "<0x-1>", "<0x+1>", "<0x 1>", "<0x-0>", "<0x0x>", "<0x1>>", "<0x411"};
    size_t piece = 0;
    while (memcmp(bytes + piece, PIECES[0], 6)) piece++;
    for (size_t i = 0; i < sizeof PIECES / sizeof *PIECES; i++) {
        memcpy(bytes + piece, PIECES[i], 6);
        write_bytes(path, bytes, file.length);
        int status = try_model(path);
        CHECK(status == (i > 0), "byte piece %s: status %d", PIECES[i], status);
    }
    unlink(path);
    free(file.text);
}

/* ---- the tokenizer's decoding (encoding: tests/test_tokenizer.py) ----------------------------------------------------- */

static void test_decode(void) {
    /* ids of demo/tiny-mistral-q8.bin and what the SentencePiece library's decode() gives for them */
    static const struct { size_t n; int ids[5]; size_t length; const char *text; } CASES[] = {
        {0, {0}, 0, ""},   /*  */
        {1, {1}, 0, ""},   /* <s> */
        {1, {261}, 1, "a"},   /* ▁a */
        {2, {1, 261}, 1, "a"},   /* <s> ▁a */
        {3, {1, 2, 261}, 1, "a"},   /* <s> </s> ▁a */
        {1, {1990}, 0, ""},   /* ▁ */
        {2, {1990, 1990}, 1, " "},   /* ▁ ▁ */
        {3, {1990, 1, 261}, 2, " a"},   /* ▁ <s> ▁a */
        {2, {1990, 261}, 2, " a"},   /* ▁ ▁a */
        {2, {1993, 261}, 3, "a a"},   /* a ▁a */
        {1, {0}, 5, " \342\201\207 "},   /* <unk> */
        {2, {0, 261}, 7, " \342\201\207  a"},   /* <unk> ▁a */
        {3, {1, 0, 261}, 7, " \342\201\207  a"},   /* <s> <unk> ▁a */
        {3, {261, 0, 1993}, 7, "a \342\201\207 a"},   /* ▁a <unk> a */
        {3, {261, 1, 261}, 3, "a a"},   /* ▁a <s> ▁a */
        {2, {68, 261}, 3, "A a"},   /* <0x41> ▁a */
        {2, {35, 261}, 3, "  a"},   /* <0x20> ▁a */
        {2, {35, 1990}, 2, "  "},   /* <0x20> ▁ */
        {1, {229}, 3, "\357\277\275"},   /* <0xE2> */
        {2, {229, 153}, 6, "\357\277\275\357\277\275"},   /* <0xE2> <0x96> */
        {3, {229, 153, 132}, 3, "\342\226\201"},   /* <0xE2> <0x96> <0x81> */
        {5, {1, 229, 153, 132, 261}, 5, "\342\226\201 a"},   /* <s> <0xE2> <0x96> <0x81> ▁a */
        {4, {229, 1, 153, 132}, 9, "\357\277\275\357\277\275\357\277\275"},   /* <0xE2> <s> <0x96> <0x81> */
        {3, {229, 0, 153}, 11, "\357\277\275 \342\201\207 \357\277\275"},   /* <0xE2> <unk> <0x96> */
        {2, {229, 261}, 5, "\357\277\275 a"},   /* <0xE2> ▁a */
        {4, {243, 162, 68, 155}, 10, "\357\277\275\357\277\275A\357\277\275"},   /* <0xF0> <0x9F> <0x41> <0x98> */
        {4, {243, 162, 155, 131}, 4, "\360\237\230\200"},   /* <0xF0> <0x9F> <0x98> <0x80> */
        {2, {195, 131}, 6, "\357\277\275\357\277\275"},   /* <0xC0> <0x80> */
        {3, {240, 163, 131}, 9, "\357\277\275\357\277\275\357\277\275"},   /* <0xED> <0xA0> <0x80> */
        {4, {247, 147, 131, 131}, 12, "\357\277\275\357\277\275\357\277\275\357\277\275"},   /* <0xF4> <0x90> <0x80> <0x80> */
        {2, {3, 1993}, 2, "\000a"},   /* <0x00> a */
    };
    Model m = load_model("demo/tiny-mistral-q8.bin");
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        Decoder d;
        memset(&d, 0, sizeof d);
        append(&d.text, "", 0);
        for (size_t j = 0; j < CASES[i].n; j++) decode(&d, &m.tokenizer, CASES[i].ids[j]);
        decode_pending(&d, true);
        CHECK(d.text.length == CASES[i].length && !memcmp(d.text.text, CASES[i].text, d.text.length),
              "case %zu: '%s', not '%s'", i, d.text.text, CASES[i].text);
        free(d.text.text);
    }
    size_t n;
    int *ids = encode(&m.tokenizer, "Once upon a time", 16, &n);
    CHECK(n == 5 && ids[0] == 609 && ids[1] == 1293 && ids[2] == 595 && ids[3] == 261 && ids[4] == 579, "%zu ids", n);
    free(ids);
    char text[500];
    memset(text, 'x', sizeof text);     /* of some lengths an array of the text has just as much room: for the sanitizer */
    for (size_t length = 0; length < sizeof text; length++) {
        ids = encode(&m.tokenizer, text, length, &n);
        CHECK(n <= length + 1, "%zu ids for %zu characters", n, length);
        free(ids);
    }
    free_model(&m);
}

/* Records [u32 bytes][text] on standard input; for each [u32 n][n i32: its ids][u32 bytes][their text] on standard output. */
static int tokenize(const char *path) {
    Model m = load_model(path);
    uint32_t n;
    while (fread(&n, 4, 1, stdin) == 1) {
        char *text = (char *)allocate(n, 1, "test");
        size_t n_ids;
        if (fread(text, 1, n, stdin) != n) return 1;
        int *ids = encode(&m.tokenizer, text, n, &n_ids);
        uint32_t count = (uint32_t)n_ids;
        Decoder d;
        memset(&d, 0, sizeof d);
        append(&d.text, "", 0);
        for (size_t i = 0; i < n_ids; i++) decode(&d, &m.tokenizer, ids[i]);
        decode_pending(&d, true);
        fwrite(&count, 4, 1, stdout);
        fwrite(ids, 4, n_ids, stdout);
        count = (uint32_t)d.text.length;
        fwrite(&count, 4, 1, stdout);
        fwrite(d.text.text, 1, d.text.length, stdout);
        free(text);
        free(ids);
        free(d.text.text);
    }
    free_model(&m);
    return 0;
}

#ifdef __CUDACC__
/* ---- the GPU ------------------------------------------------------------------------------------------------------
 * What is compared was computed by the CPU, in plain C; the tolerances are shares of the largest number there. */

/* Every product kernel, in shapes that fill no tile, with from 1 to 130 tokens. Integers within a group are exact on both sides:
 * what differs is the order of the groups' FP32 sums, and with FP16 weights that activations are rounded to FP16. */
static void test_cuda_products(void) {
    static const size_t SHAPES[][2] = {{5, 7}, {33, 130}, {64, 128}, {100, 300}, {257, 1000}, {300, 4100}};
    static const size_t COUNTS[] = {1, 3, 8, 9, 17, 33, 64, 65, 130, 300};
    enum { ROOM = 512 };
    for (size_t kind = 0; kind < N_KINDS; kind++)
        for (size_t shape = 0; shape < sizeof SHAPES / sizeof *SHAPES; shape++) {
            size_t rows = SHAPES[shape][0], cols = SHAPES[shape][1];
            size_t width = round_up(cols, COLUMNS), out_width = round_up(rows, 128);
            float *w = (float *)allocate(rows * cols, 4, "test"), *x = (float *)allocate(ROOM * width, 4, "test");
            float *expect = (float *)allocate(ROOM * rows, 4, "test");
            float *got = (float *)allocate(MAX_PARTS * ROOM * out_width, 4, "test");
            float *packed = (float *)allocate(ROOM * cols, 4, "test"), *prefill = (float *)allocate(ROOM * out_width, 4, "test");
            for (size_t i = 0; i < rows * cols; i++) w[i] = random_float();
            for (size_t t = 0; t < ROOM; t++)
                for (size_t k = 0; k < cols; k++) packed[t * cols + k] = x[t * width + k] = random_float();
            Matrix m = make_matrix(KINDS[kind].type, KINDS[kind].group, w, rows, cols);
            Activations a = {(float *)allocate(ROOM * width, 4, "test"), NULL,
                             (float *)allocate(ROOM * width / 32, 4, "test"), (float *)allocate(ROOM * width / 32, 4, "test")};
            a.q = (int8_t *)a.x;
            Model model;
            State s;
            Device d;
            memset(&model, 0, sizeof model);
            memset(&s, 0, sizeof s);
            memset(&d, 0, sizeof d);
            model.layers = (Layer *)allocate(1, sizeof(Layer), "test");
            s.model = &model;
            s.device = &d;
            int hopper = built_for_wgmma();
            Memory memory = {};
            void *staging = device_allocate(m.bytes, &memory, "test");
            Weights weights = upload(&m, false, false, staging, &memory, "test");
            Weights gated = upload(&m, true, false, staging, &memory, "test");
            float *device_x = (float *)device_allocate(ROOM * width * 4, &memory, "test");
            float *device_out = (float *)device_allocate(MAX_PARTS * ROOM * out_width * 4, &memory, "test");
            d.in.q = (int8_t *)device_allocate(ROOM * width * 2, &memory, "test");
            d.in.scale = (float2 *)device_allocate(ROOM * width / 32 * 8, &memory, "test");
            d.in.stride = ROOM;
            CUDA(cudaMemcpy(device_x, x, ROOM * width * 4, cudaMemcpyHostToDevice));
            double tolerance = m.type < Q8 ? 2e-3 : 2e-5;
            for (size_t count = 0; count < sizeof COUNTS / sizeof *COUNTS; count++) {
                size_t n = COUNTS[count];
                matmul(expect, packed, &m, &a, n);
                double largest = 0;
                for (size_t i = 0; i < n * rows; i++) largest = fmax(largest, fabs(expect[i]));
                /* plainly; as decoding does, as prefill; both on a Hopper; prefill where there is work for all multiprocessors */
                for (int way = 0; way < 6; way++) {
                    d.wgmma = hopper && way > 2;
                    d.multiprocessors = way == 5 ? 1 : 20;
                    dim3 tiles((unsigned)(weights.width + 1023) / 1024, (unsigned)n);
                    s.decoding = way == 1 || way == 3;
                    s.n_slots = n;
                    quantize_input<<<tiles, 256>>>(device_x, inputs(&s, weights), weights);
                    CUDA(cudaMemset(device_out, 0xff, MAX_PARTS * ROOM * out_width * 4));       /* NaN */
                    int parts = 1, stride = weights.row_tiles * 16;
                    if (way == 0) {
                        product_plain<<<dim3((unsigned)(rows + 127) / 128, (unsigned)n), 128>>>(device_out, weights, d.in, (int)n);
                        stride = (int)rows;
                    } else parts = device_product(&s, WQKV, device_out, weights, inputs(&s, weights), (int)n);
                    CUDA(cudaMemcpy(got, device_out, MAX_PARTS * ROOM * out_width * 4, cudaMemcpyDeviceToHost));
                    if (way == 4) memcpy(prefill, got, n * stride * 4);
                    CHECK(way < 5 || !memcmp(prefill, got, n * stride * 4), "%s groups of %u [%zu, %zu], %zu tokens: other bits",
                          KINDS[kind].type, KINDS[kind].group, rows, cols, n);
                    double worst = 0;
                    for (size_t t = 0; t < n; t++)
                        for (size_t r = 0; r < rows; r++) {
                            double sum = 0;
                            for (int p = 0; p < parts; p++) sum += got[((size_t)p * n + t) * stride + r];
                            double off = fabs(sum - expect[t * rows + r]);
                            worst = worse(worst, off);
                        }
                    CHECK(worst <= tolerance * largest, "%s groups of %u [%zu, %zu], %zu tokens, way %d: off by %g of %g",
                          KINDS[kind].type, KINDS[kind].group, rows, cols, n, way, worst, largest);
                    if (rows % 2 || way == 0) continue;                                     /* SwiGLU */
                    for (int halves = 0; halves < 1 + (m.type < Q8); halves++) {            /* as the input of FP16 weights */
                        gated.to_halves = halves;
                        CUDA(cudaMemset(device_out, 0xff, ROOM * out_width * 4));
                        device_product(&s, W13, device_out, gated, inputs(&s, gated), (int)n);
                        CUDA(cudaMemcpy(got, device_out, ROOM * out_width * 4, cudaMemcpyDeviceToHost));
                        worst = 0;
                        for (size_t t = 0; t < n; t++)
                            for (size_t i = 0; i < rows / 2; i++) {
                                double gate = expect[t * rows + i], h = gate / (1 + exp(-gate)) * expect[t * rows + rows / 2 + i];
                                size_t at = t * (size_t)gated.units + i;
                                Inputs in = inputs(&s, gated);
                                in.q = NULL;
                                if (halves) at = (size_t)input_at<2>(in, gated, (int)t, (int)i) / 2;
                                double off = fabs((halves ? (double)__half2float(((const __half *)got)[at]) : (double)got[at]) - h);
                                worst = worse(worst, off);
                            }
                        CHECK(worst <= 2 * tolerance * largest * largest,
                              "%s groups of %u [%zu, %zu], %zu tokens, way %d: SwiGLU off by %g",
                              KINDS[kind].type, KINDS[kind].group, rows, cols, n, way, worst);
                    }
                }
            }
            device_free(&memory);
            void *on_host[] = {w, x, expect, got, packed, prefill, a.x, a.scale, a.sum, (void *)m.data, model.layers};
            for (size_t i = 0; i < 11; i++) free(on_host[i]);
        }
}

static Model load_on(const Backend *where, const char *path) {
    backend = where;
    Model m = load_model(path);
    backend = &CPU;
    return m;
}

/* Where weights are codes an activation may round to the other of two neighbours when its last bits differ, which moves single
 * logits by up to 2% of the largest, and their root mean square by a tenth of that (SPEED.md). A wrong kernel therefore shows with
 * FP16 weights, whose tolerance is narrow; those for codes have test_cuda_products. The shape "wide" rounds more activations: 2.2%
 * were seen (and 5.5 to 8.9% where registers were overwritten; a tile of columns left out is 16%). Where keys and values are codes
 * the CPU also rounds queries and probabilities, the GPU does not: 3.6%, and "wide" 4.7%. Otherwise the GPU's are FP16, the CPU's
 * more exact: with FP16 weights 0.21% in "wide", below 0.2% in the others. */
static double cuda_tolerance(const Model *m) {
    bool codes = m->layers[0].w2.type >= Q8, wide = m->c.head_dim == 128;
    return m->kv_type == Q8 ? (wide ? 6e-2 : 4e-2) : codes ? (wide ? 3e-2 : 2e-2) : wide ? 3e-3 : 2e-3;
}

/* The GPU's logits beside the CPU's, in prefill of all sizes and in decoding, beside other sequences and alone. */
static void compare_logits(const Model *cpu, const Model *gpu, const int *ids) {
    enum { VOCAB = 2048 };
    static float expect[LENGTH * VOCAB], got[LENGTH * VOCAB], prefill[LENGTH * VOCAB];
    size_t vocab = cpu->c.vocab_size;
    double largest = 0, tolerance = cuda_tolerance(cpu);
    if (vocab > VOCAB) die("%s: a vocabulary of %zu", cpu->path, vocab);
    chunked_forward(cpu, ids, LENGTH, 1, 0, 1, expect);
    for (size_t i = 0; i < LENGTH * vocab; i++) largest = fmax(largest, fabs(expect[i]));
    static const size_t WAYS[][3] = {{1, 0, 1}, {1, 3, 7}, {1, 11, 12}, {1, 20, 30}, {1, 5, 50}, {LENGTH, 0, 1}, {7, 1, 3},
                                     {33, 0, 2}};
    for (size_t way = 0; way < sizeof WAYS / sizeof *WAYS; way++) {
        chunked_forward(gpu, ids, LENGTH, WAYS[way][0], WAYS[way][1], WAYS[way][2], got);
        double worst = 0, squares = 0;
        for (size_t i = 0; i < LENGTH * vocab; i++) {
            double off = fabs(got[i] - expect[i]);
            worst = worse(worst, off);
            squares += off * off;
        }
        double rms = sqrt(squares / (double)(LENGTH * vocab));
                    printf("%s cache %s %zu: worst %.5f rms %.5f of largest\n",
                   cpu->path, TYPE_NAMES[cpu->kv_type], way, worst / largest, rms / largest);
        CHECK(worst <= tolerance * largest && rms <= tolerance / 5 * largest,
              "%s, cache %s, chunks of %zu in %zu slots: off by %g, rms %g, of %g",
              cpu->path, TYPE_NAMES[cpu->kv_type], WAYS[way][0], WAYS[way][2], worst, rms, largest);
        /* however a prompt is cut, a prefill's bits are the same */
        if (WAYS[way][0] == LENGTH) memcpy(prefill, got, sizeof got);
        else if (WAYS[way][0] > 1)
            CHECK(!memcmp(prefill, got, LENGTH * vocab * sizeof(float)), "%s, cache %s: chunks of %zu in %zu slots: other bits",
                  cpu->path, TYPE_NAMES[cpu->kv_type], WAYS[way][0], WAYS[way][2]);
    }
}

/* Continues ids[0 .. n_prompt - 1] by the most probable id each time. */
static void greedy(const Model *m, int *ids, size_t n_prompt, size_t n) {
    size_t vocab = m->c.vocab_size;
    State s = new_state(m, 1, n + 8, n_prompt);
    float *logits = (float *)allocate(vocab, sizeof(float), "test");
    for (size_t fed = 0, end = n_prompt; end < n; fed = end++) {
        Token tokens[LENGTH];
        for (size_t i = fed; i < end; i++) { Token token = {ids[i], i, 0, i + 1 == end}; tokens[i - fed] = token; }
        s.decoding = fed > 0;
        m->backend->forward(&s, tokens, end - fed, logits);
        ids[end] = sample(logits, vocab, 0, 1, 0);
    }
    free_state(&s);
    free(logits);
}

/* Greedy texts are the CPU's, but where the two best logits are nearer to one another than backends are. */
static void compare_greedy(const Model *cpu, const Model *gpu, const int *prompt) {
    enum { N = 240, PROMPT = 20 };
    int expect[N], got[N];
    size_t vocab = cpu->c.vocab_size, same = 0;
    memcpy(expect, prompt, PROMPT * sizeof(int));
    memcpy(got, prompt, PROMPT * sizeof(int));
    greedy(cpu, expect, PROMPT, N);
    greedy(gpu, got, PROMPT, N);
    while (same < N && got[same] == expect[same]) same++;
            printf("%s cache %s: greedy equal for %zu of %d\n", cpu->path, TYPE_NAMES[cpu->kv_type], same - PROMPT, N - PROMPT);
    if (same == N) return;
    float *logits = (float *)allocate(same * vocab, sizeof(float), "test"), *last = logits + (same - 1) * vocab, largest = 0;
    chunked_forward(cpu, expect, same, 50, 0, 1, logits);
    for (size_t i = 0; i < vocab; i++) largest = fmaxf(largest, fabsf(last[i]));
    CHECK(last[expect[same]] - last[got[same]] <= 2 * cuda_tolerance(cpu) * largest,
          "%s, cache %s: greedy differs after %zu ids, where %g and %g are no tie",
          cpu->path, TYPE_NAMES[cpu->kv_type], same - PROMPT, last[expect[same]], last[got[same]]);
    free(logits);
}

/* Models without one even dimension, whose window is crossed four times, of each type; one of several types; the demo model; and
 * one with a large dim and heads of 128, as a 7B has, in FP16 and in q8. */
static void test_cuda_forward(void) {
    int ids[LENGTH];
    for (size_t k = 0; k < 2 * N_KINDS + 8; k++) {
        size_t kind = k / 2;
        const char *path = kind < N_KINDS ? odd_model(KINDS[kind].type, KINDS[kind].group)
                         : kind == N_KINDS ? odd_model("q4", 64)
                         : kind == N_KINDS + 1 ? "demo/tiny-mistral-q8.bin"
                         : kind == N_KINDS + 2 ? random_model("wide", "f16", 32) : random_model("wide", "q8", 64);
        Model cpu = load_on(&CPU, path), gpu = load_on(&CPU, path), half = load_on(&CPU, odd_model("f16", 0));
        for (size_t i = 0; i < LENGTH; i++) ids[i] = (int)random_below(cpu.c.vocab_size);
        if (kind == N_KINDS) {                  /* each layer has another matrix in FP16 */
            Matrix *mine = (Matrix *)cpu.layers, *theirs = (Matrix *)gpu.layers, *other = (Matrix *)half.layers;
            static const size_t WHICH[] = {1, 2, 4, 5};
            for (size_t l = 0; l < cpu.c.n_layers; l++)
                mine[6 * l + WHICH[l % 4]] = theirs[6 * l + WHICH[l % 4]] = other[6 * l + WHICH[l % 4]];
        }
        if (kind == N_KINDS + 1) {
            Text text = read_file("tests/text/treasure-eval.txt");
            size_t n;
            int *of_text = encode(&cpu.tokenizer, text.text, min_size(text.length, 4000), &n);
            if (n < LENGTH) die("tests/text/treasure-eval.txt: too short");
            memcpy(ids, of_text, sizeof ids);
            free(of_text);
            free(text.text);
        }
        if (k % 2) cpu.kv_type = gpu.kv_type = Q8;
        gpu.backend = &GPU;
        GPU.load(&gpu);
        compare_logits(&cpu, &gpu, ids);
        compare_greedy(&cpu, &gpu, ids);
        free_model(&cpu);
        free_model(&gpu);
        free_model(&half);
    }
}

/* The attention of a prefill beside the plain kernel, on what a forward leaves of its last layer in the device's memory. */
static void test_cuda_attention(void) {
    enum { N = 70 };
    for (int kv = 0; kv < 2; kv++) {
        Model m = load_on(&GPU, odd_model("q8", 64));
        m.kv_type = kv ? Q8 : F16;
        State s = new_state(&m, 2, LENGTH, N);
        Device *d = (Device *)s.device;
        Token tokens[N];
        for (size_t i = 0; i < N; i++) { Token token = {(int)random_below(m.c.vocab_size), i, 1, false}; tokens[i] = token; }
        m.backend->forward(&s, tokens, N, NULL);
        size_t rows = N * m.c.n_heads, n = rows * s.head_width;
        size_t layer = (m.c.n_layers - 1) * s.n_slots * m.c.n_kv_heads * d->heads.cache;
        float *fast = (float *)allocate(n, 4, "test"), *plain = (float *)allocate(n, 4, "test");
        Memory memory = {};
        float *to = (float *)device_allocate(n * 4, &memory, "test"), worst = 0, largest = 0;
        float2 *sums = (float2 *)device_allocate(rows * 8, &memory, "test");
        float2 *fast_sums = (float2 *)allocate(rows, 8, "test"), *plain_sums = (float2 *)allocate(rows, 8, "test");
        unsigned blocks = (unsigned)(rows + 63) / 64;
        Heads c = d->heads;
        c.keys += layer;
        c.values += layer;
        c.out = to;
        c.softmax = sums;
        if (kv) attention_plain<uint8_t><<<blocks, 64>>>(c);
        else attention_plain<__half><<<blocks, 64>>>(c);
        CUDA(cudaMemcpy(plain, to, n * 4, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(fast, d->heads.out, n * 4, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(plain_sums, sums, rows * 8, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(fast_sums, d->heads.softmax, rows * 8, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < n; i++) {
            if (i % s.head_width >= m.c.head_dim) continue;
            float a = plain[i] / plain_sums[i / s.head_width].y, off = fabsf(a - fast[i] / fast_sums[i / s.head_width].y);
            worst = worse(worst, off);
            largest = fmaxf(largest, fabsf(a));
        }
        CHECK(worst <= 2e-3f * largest && largest > 0,      /* the exponentials are FP16 */
              "cache %s: off by %g of %g", TYPE_NAMES[m.kv_type], worst, largest);
        device_free(&memory);
        void *all[] = {fast, plain, fast_sums, plain_sums};
        for (int i = 0; i < 4; i++) free(all[i]);
        free_state(&s);
        free_model(&m);
    }
}

/* A sequence of a batch does not depend on the others, nor on when they end; the same batch twice is the same. */
static void test_cuda_batch(void) {
    static const size_t slot_counts[] = {1, 5, 12, 32, 40, 12};
    for (size_t k = 0; k < 12; k++) {
        Model m = load_on(&GPU, k % 2 ? odd_model("f16", 0) : odd_model("q4", 32));
        size_t slots = slot_counts[k / 2];
        m.kv_type = k / 2 < 5 ? F16 : Q8;
        Sequence *all = run_batch(&m, 32, 0, slots, 40, 110, 90), *again = run_batch(&m, 32, 0, slots, 40, 110, 90);
        for (size_t i = 0; i < 32; i++) {
            CHECK(same_sequence(&all[i], &again[i]), "%s: sequence %zu of the same batch of %zu differs", m.path, i, slots);
            Sequence *one = run_batch(&m, 1, i, slots, 40, 110, 90);
            CHECK(same_sequence(&all[i], one), "%s: sequence %zu in %zu slots differs when it is alone", m.path, i, slots);
            free_sequences(one, 1);
        }
        free_sequences(all, 32);
        free_sequences(again, 32);
        free_model(&m);
    }
    Model m = load_on(&GPU, odd_model("q4", 32));
    Sequence *none = run_batch(&m, 3, 0, 2, 0, 4000, 90);
    for (size_t i = 0; i < 3; i++)
        CHECK(none[i].n_ids == none[i].n_prompt && none[i].n_fed == none[i].n_prompt, "no tokens asked for");
    free_sequences(none, 3);
    free_model(&m);

    /* Attention leaves wo's input by itself, but for a batch where a sequence has its keys in two spans: to the others the same. */
    m = load_on(&GPU, random_model("wide", "q8", 64));
    State s = new_state(&m, 2, 400, 200);
    float *both = (float *)allocate(2 * m.c.vocab_size, 4, "test"), *alone = (float *)allocate(m.c.vocab_size, 4, "test");
    for (size_t pos = 0; pos < 257; pos++) {
        Token fed[] = {{(int)pos, pos, 1, false}, {(int)pos, pos, 0, false}};
        m.backend->forward(&s, fed, pos < 100 ? 2 : 1, NULL);
    }
    s.decoding = true;
    for (size_t i = 0; i < 20; i++) {
        Token two[] = {{17, 100 + i, 0, true}, {18, 257 + i, 1, true}};
        m.backend->forward(&s, two, 2, both);
        m.backend->forward(&s, two, 1, alone);
        CHECK(!memcmp(both, alone, m.c.vocab_size * 4), "logits differ beside a sequence with keys in two spans, step %zu", i);
    }
    free(both);
    free(alone);
    free_state(&s);
    free_model(&m);
}

/* Draws like the CPU's sampler: the same id but where a random number falls on the edge between two. */
static void test_cuda_sampler(void) {
    enum { MOST = 70000, DRAWS = 4000 };            /* ids; a warp of the sampler has 1,024 of 32,768, then more */
    static const int SIZES[] = {3001, 32000, MOST};
    static float logits[MOST], copy[MOST];
    Memory memory = {};
    float *device_logits = (float *)device_allocate(sizeof logits, &memory, "test"), tops[] = {1, 0.95f, 0.5f, 0};
    Entry *entry = (Entry *)device_allocate(sizeof(Entry), &memory, "test"), host;
    int *device_id = (int *)device_allocate(4, &memory, "test"), id;
    memset(&host, 0, sizeof host);
    for (int k = 0; k < 12; k++) {
        int n = SIZES[k / 4], draws = n == SIZES[0] ? DRAWS : DRAWS / 8, differs = 0;
        float top_p = tops[k % 4];
        for (int i = 0; i < n; i++) logits[i] = n == SIZES[1] ? floorf(96 * random_float()) / 8 : 12 * random_float();   /* ties */
        logits[17] = logits[18] = logits[19] = logits[n - 2] = 11.9f;
        for (int draw = 0; draw < draws; draw++) {
            float temperature = draw % 7 == 6 ? 0 : 0.8f;
            host.random = uniform(&rng);
            memcpy(copy, logits, sizeof copy);
            int expect = sample(copy, (size_t)n, temperature, top_p, host.random);
            CUDA(cudaMemcpy(device_logits, logits, sizeof logits, cudaMemcpyHostToDevice));
            CUDA(cudaMemcpy(entry, &host, sizeof host, cudaMemcpyHostToDevice));
            sample_kernel<<<1, 1024>>>(device_logits, n, n, temperature, top_p, entry, device_id);
            CUDA(cudaMemcpy(&id, device_id, 4, cudaMemcpyDeviceToHost));
            CHECK(id == expect || (temperature > 0 && top_p > 0), "greedy: %d, not %d", id, expect);
            differs += id != expect;
        }
        CHECK(differs <= (n == SIZES[0] ? DRAWS / 1000 : draws / 100), "top_p %g: %d of %d ids differ", top_p, differs, draws);
    }
    for (int i = 0; i < MOST; i++) copy[i] = NAN;
    CUDA(cudaMemcpy(device_logits, copy, sizeof copy, cudaMemcpyHostToDevice));
    sample_kernel<<<1, 1024>>>(device_logits, MOST, MOST, 0.8f, 0.9f, entry, device_id);
    CUDA(cudaMemcpy(&id, device_id, 4, cudaMemcpyDeviceToHost));
    CHECK(id >= 0 && id < MOST, "NaN logits give id %d", id);
    device_free(&memory);
}
#endif

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); } TESTS[] = {
        {"half", test_half}, {"exp", test_exp}, {"norm_rope_swiglu", test_norm_rope_swiglu}, {"activations", test_activations},
        {"cache_codes", test_cache_codes}, {"attention", test_attention}, {"number_tiles", test_number_tiles},
        {"group_product", test_group_product},
        {"group_product_wide", test_group_product_wide}, {"matrices", test_matrices},
        {"scales", test_scales}, {"forward", test_forward}, {"determinism", test_determinism}, {"sampler", test_sampler},
        {"batch", test_batch}, {"lookup", test_lookup},
        {"decode", test_decode}, {"damaged_files", test_damaged_files}, {"cholesky", test_cholesky}, {"gptq", test_gptq},
        {"backward", test_backward}, {"fold", test_fold}, {"channel_scales", test_channel_scales},
#ifdef __CUDACC__
        {"cuda_products", test_cuda_products}, {"cuda_forward", test_cuda_forward}, {"cuda_attention", test_cuda_attention},
        {"cuda_batch", test_cuda_batch}, {"cuda_sampler", test_cuda_sampler},
#endif
    };
    int passed = 0, failed = 0;
    program = "test_all";
    if (argc == 3 && !strcmp(argv[1], "tokenize")) return tokenize(argv[2]);
    if (argc == 3 && !strcmp(argv[1], "logits")) return write_logits(argv[2]);
    if (!mkdtemp(directory)) { perror(directory); return 1; }
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++) {
        bool wanted = argc == 1;
        for (int a = 1; a < argc; a++) wanted |= !strcmp(argv[a], TESTS[i].name);
        if (!wanted) continue;
        double start = now();
        failures = 0;
        rng = 1;
        TESTS[i].run();
        printf("%-20s %s  %.2f s\n", TESTS[i].name, failures ? "FAILED" : "ok", now() - start);
        fflush(stdout);
        failed += failures > 0;
        passed += !failures;
    }
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    if (system(command)) perror(directory);
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
