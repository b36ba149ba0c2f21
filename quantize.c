/* quantize.c - makes a smaller checkpoint of an FP32 or FP16 one: FP16, or 8 or 4 bits a weight.
 *
 *   cc -O3 -march=native -fopenmp quantize.c -lm -o quantize
 *   ./quantize model-f16.bin model-q4.bin q4
 *   python3 export.py HF_DIR - | ./quantize - model-q4.bin q4
 *
 * Round to nearest with a scale and a zero for each group of neighbouring weights, the two chosen by search so that the
 * group's squared error is small. The checkpoint goes through in pieces of some panels, in the order of the file, so that a
 * pipe will do for the input and memory stays small whatever the model's size.
 *
 *   1. Rounding a group
 *   2. Matrices           in panels, as they lie in the file; the algebra that calibration needs
 *   3. Files
 *   4. Random weights     for benchmarks and tests
 *   5. Conversion
 *   6. calibrate.h        with a text to calibrate with, --gptq and --awq: a layer at a time
 *   7. The command line */
#ifndef TESTING
#define RUN_NO_MAIN
#endif
#pragma GCC diagnostic ignored "-Wunused-function"       /* of the engine much is not needed here */
#include "run.c"

/* ------------------------------------------------------------------------------------------------------------------
 * 1. Rounding a group                                                                                               */

/* Sums over the n weights w of each of a panel's 32 rows, given a scale and a zero, each column counting by its importance h: the
 * squared error, and what a least squares fit of a better scale and zero to the same codes c needs, the sums of h c, h c^2 and
 * h w c. All [32]. */
typedef struct { float error[PANEL], c[PANEL], cc[PANEL], wc[PANEL]; } Fit;

#define EIGHT(x) x, x, x, x, x, x, x, x
static const float ONES[MAX_GROUP] = {EIGHT(EIGHT(1)), EIGHT(EIGHT(1))};     /* all columns are as important */

/* Codes that round to nearest: code = clamp(w / scale + zero, 0, levels), rounded by ROUNDER. w: [n][32];
 * importance: [n]; codes: [n][32] or NULL. */
static void fit_codes(Fit *fit, uint8_t *codes, const float *w, const float *importance, size_t n, const float *scale,
                      const float *zero, float levels) {
    float inverse[PANEL];
    memset(fit, 0, sizeof *fit);
    for (size_t r = 0; r < PANEL; r++) inverse[r] = scale[r] != 0 ? 1.0f / scale[r] : 0;
    for (size_t k = 0; k < n; k++)
        for (size_t r = 0; r < PANEL; r++) {
            float x = w[k * PANEL + r], c = fmaf(x, inverse[r], zero[r]);
            c = c < 0 ? 0 : c;          /* one at a time, or no compiler vectorises it without masks */
            c = c > levels ? levels : c;
            c = (c + ROUNDER) - ROUNDER;
            float error = fmaf(scale[r], c - zero[r], -x), h = importance[k], hc = h * c;
            fit->error[r] = fmaf(h * error, error, fit->error[r]);
            fit->c[r] = fmaf(hc, 1, fit->c[r]);      /* hc rounded, as below */
            fit->cc[r] = fmaf(hc, c, fit->cc[r]);
            fit->wc[r] = fmaf(x, hc, fit->wc[r]);
            if (codes) codes[k * PANEL + r] = (uint8_t)c;
        }
}

/* Scales and zeros, [32] each, FP16 numbers, with the least squared error found for n weights of 32 rows, w: [n][32].
 * Starts from the range of the weights, that range with 0 in it, and narrower ones (clipping the few largest weights
 * pays for finer steps); from each, rounding to codes and fitting a line through (code, weight) by turns, which would lower
 * the error at each turn if scale and zero were not FP16: the best of all turns counts. importance: [n]. */
static void best_scales(float *best_scale, float *best_zero, const float *w, const float *importance, size_t n, float levels) {
    static const float widths[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
    enum { STARTS = sizeof widths / sizeof *widths + 1, TURNS = 3 };
    float low[PANEL], high[PANEL], sum[PANEL] = {0}, count = 0, best_error[PANEL], scale[PANEL], zero[PANEL];
    for (size_t r = 0; r < PANEL; r++) { low[r] = high[r] = w[r]; best_error[r] = INFINITY; best_scale[r] = best_zero[r] = 0; }
    for (size_t k = 0; k < n; count += importance[k++])
        for (size_t r = 0; r < PANEL; r++) {
            float x = w[k * PANEL + r];
            low[r] = x < low[r] ? x : low[r];
            high[r] = x > high[r] ? x : high[r];
            sum[r] = fmaf(x, importance[k], sum[r]);
        }
    for (size_t start = 0; start < STARTS; start++) {
        Fit fit;
        for (size_t r = 0; r < PANEL; r++) {
            bool with_zero = start + 1 == STARTS;
            float l = with_zero && low[r] > 0 ? 0 : low[r], h = with_zero && high[r] < 0 ? 0 : high[r];
            float width = with_zero ? 1 : widths[start], middle = 0.5f * (l + h);
            scale[r] = width * (h - l) / levels;
            zero[r] = scale[r] > 0 ? 0.5f * levels - middle / scale[r] : 0;
        }
        for (size_t turn = 0; turn <= TURNS; turn++) {
            for (size_t r = 0; r < PANEL; r++) {
                scale[r] = half_to_float(float_to_half(scale[r]));
                zero[r] = half_to_float(float_to_half(zero[r]));
            }
            fit_codes(&fit, NULL, w, importance, n, scale, zero, levels);
            for (size_t r = 0; r < PANEL; r++) {
                bool better = fit.error[r] < best_error[r];
                best_error[r] = better ? fit.error[r] : best_error[r];
                best_scale[r] = better ? scale[r] : best_scale[r];
                best_zero[r] = better ? zero[r] : best_zero[r];
                /* w = slope * code + offset by least squares; w = scale * (code - zero) */
                float spread = fit.cc[r] - fit.c[r] * fit.c[r] / count;
                float slope = spread > 0 ? (fit.wc[r] - fit.c[r] * sum[r] / count) / spread : 0;
                if (slope > 0) {
                    zero[r] = (fit.c[r] - sum[r] / slope) / count;
                    scale[r] = slope;
                }
            }
        }
    }
}

/* Scales, zeros and codes ([n][32] or NULL) of n weights of 32 rows, rounded to nearest. */
static void round_nearest(Fit *fit, uint8_t *codes, float *scale, float *zero, const float *w, const float *importance, size_t n,
                          float levels) {
    best_scales(scale, zero, w, importance, n, levels);
    fit_codes(fit, codes, w, importance, n, scale, zero, levels);
}

/* One group of one panel as it stands in the file (FORMAT.md). codes: [group][32]; scale, zero: [32]. */
static void pack_group(unsigned char *block, int type, const uint8_t *codes, const float *scale, const float *zero, size_t group) {
    for (size_t r = 0; r < PANEL; r++) {
        ((uint16_t *)block)[r] = float_to_half(scale[r]);
        ((uint16_t *)block)[PANEL + r] = float_to_half(zero[r]);
    }
    block += 4 * PANEL;
    for (size_t k = 0; k < group; k++)
        for (size_t r = 0; r < PANEL / 2; r++) {
            uint8_t low = codes[k * PANEL + r], high = codes[k * PANEL + r + 16];
            if (type == Q8) {
                block[k / 4 * 128 + 4 * r + k % 4] = low;
                block[k / 4 * 128 + 4 * (r + 16) + k % 4] = high;
            } else block[k / 4 * 64 + 4 * r + k % 4] = (uint8_t)(low | high << 4);
        }
}

static float levels_of(int type) { return type == Q8 ? 255 : 15; }

/* Codes of nf4, nearly as bitsandbytes finds them: the largest magnitude of a row's group is 1, each weight takes the nearest of
 * 16 values, which are rounded to codes of q8 here. */
static void nf4_codes(uint8_t *codes, float *scale, float *zero, const float *w, size_t n) {
    for (size_t r = 0; r < PANEL; r++) {
        float largest = 0;
        for (size_t k = 0; k < n; k++) largest = fmaxf(largest, fabsf(w[k * PANEL + r]));
        scale[r] = half_to_float(float_to_half(largest / 127));
        zero[r] = 128;
    }
    for (size_t k = 0; k < n; k++)
        for (size_t r = 0; r < PANEL; r++) {
            float x = scale[r] > 0 ? w[k * PANEL + r] / scale[r] + 128 : 128;
            uint8_t code = 0;
            for (int c = 0; c < 15; c++) code += x > 0.5f * (NF4_CODES[c] + NF4_CODES[c + 1]);
            codes[k * PANEL + r] = code;
        }
}

/* Rounds one group of one panel to nearest, w: [group][32] of which n columns exist. */
static void round_group(unsigned char *block, int type, const float *w, size_t n, size_t group) {
    float scale[PANEL], zero[PANEL];
    uint8_t codes[MAX_GROUP * PANEL];
    Fit fit;
    if (type == NF4) nf4_codes(codes, scale, zero, w, n);
    else round_nearest(&fit, codes, scale, zero, w, ONES, n, levels_of(type));
    memset(codes + n * PANEL, 0, (group - n) * PANEL);
    pack_group(block, type, codes, scale, zero, group);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. Matrices                                                                                                       */

static const char QUANTIZED[] = "%s: %s is %s already: start from an FP32 or FP16 checkpoint";
static const char BAD_WEIGHT[] = "%s: %s has a weight that is infinite, not a number or too large for FP16";

/* One panel from an f32 or f16 matrix to a matrix of another type. Returns false, with part of it done, where a weight is not
 * finite or, but for f32, beyond 65519, the largest that rounds to an FP16 number. */
static bool convert_panel(unsigned char *out, const Matrix *to, const unsigned char *in, const Matrix *from) {
    float w[MAX_GROUP * PANEL], limit = to->type == F32 ? 3.4028235e38f : 65519;
    bool good = true;
    for (size_t g = 0; g < to->n_groups; g++) {
        size_t k = g * to->group, n = min_size(to->group, to->cols - k);
        unpack_group(w, from->type, in + k * PANEL * (from->type == F32 ? 4 : 2), n);
        for (size_t i = 0; i < n * PANEL; i++) good &= fabsf(w[i]) <= limit;           /* false for NaN */
        if (!good) return false;
        if (to->type >= Q8) round_group(out + g * to->block_bytes, to->type, w, n, to->group);
        else for (size_t i = 0; i < n * PANEL; i++) {
            if (to->type == F16) ((uint16_t *)out)[k * PANEL + i] = float_to_half(w[i]);
            else ((float *)out)[k * PANEL + i] = w[i];
        }
    }
    return true;
}

/* The group size a tensor gets when `group` is asked for: that one or the largest smaller one that divides cols; 32, with rows
 * padded, if none does. */
static uint32_t tensor_group(uint32_t type, uint32_t group, uint64_t cols) {
    if (type < Q8) return 0;
    while (group > 32 && cols % group) group /= 2;
    return group;
}

/* Dies if a weight is infinite, not a number, or, but for norms, too large for FP16; or if the matrix was quantized before. */
static void check_weights(const Matrix *m, const char *path, const char *name) {
    Matrix to;
    size_t bad = 0;
    if (m->type >= Q8) die(QUANTIZED, path, name, TYPE_NAMES[m->type]);
    matrix_layout(&to, m->cols == 1 ? F32 : F16, 0, m->rows, m->cols);
    #pragma omp parallel for schedule(static) reduction(+:bad)
    for (size_t p = 0; p < m->n_panels; p++) {
        unsigned char *nowhere = (unsigned char *)allocate(to.panel_bytes, 1, path);
        bad += !convert_panel(nowhere, &to, m->data + p * m->panel_bytes, m);
        free(nowhere);
    }
    if (bad) die(BAD_WEIGHT, path, name);
}

/* An array of zeros. */
static float *floats(size_t n) { return (float *)allocate(n, sizeof(float), "calibration"); }

/* A matrix of n rows in panels: element (i, j) stands in panel j / 32, at [i][j % 32]. What a Matrix holds is its W transposed, i
 * being W's column and j its row. */
static inline float *element(const float *m, size_t n, size_t i, size_t j) {
    return (float *)m + (j / PANEL * n + i) * PANEL + j % PANEL;
}

#define FREE(...) do { void *all_[] = {__VA_ARGS__}; \
    for (size_t i_ = 0; i_ < sizeof all_ / sizeof *all_; i_++) free(all_[i_]); } while (0)

/* Panels of a matrix in FP32, out [n_panels][n][32], columns in the order given, or as they are, zeros where there are none. An
 * order that keeps groups together lets what is unpacked serve for many. */
static void load_panels(float *out, const Matrix *m, size_t n, const size_t *order) {
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < m->n_panels; p++) {
        float w[MAX_GROUP * PANEL];
        size_t group = n;
        for (size_t i = 0; i < n; i++) {
            size_t k = order ? order[i] : i;
            float *column = out + (p * n + i) * PANEL;
            if (k / MAX_GROUP != group && k < m->cols) {
                group = k / MAX_GROUP;
                unpack_group(w, m->type, m->data + p * m->panel_bytes + group * m->block_bytes,
                             min_size(MAX_GROUP, m->cols - group * MAX_GROUP));
            }
            if (k < m->cols) memcpy(column, w + k % MAX_GROUP * PANEL, PANEL * sizeof(float));
            else memset(column, 0, PANEL * sizeof(float));
        }
    }
}

/* A matrix as FP32, to be freed. */
static Matrix copy_matrix(const Matrix *m) {
    Matrix copy;
    matrix_layout(&copy, F32, 0, m->rows, m->cols);
    copy.data = (unsigned char *)allocate(copy.bytes, 1, "a copy");
    load_panels((float *)copy.data, m, m->cols, NULL);
    return copy;
}

/* Room for a matrix of the new file, to be freed. */
static Matrix new_matrix(const Tensor *t) {
    Matrix m;
    matrix_layout(&m, t->type, t->group, t->rows, t->cols);
    m.data = (unsigned char *)allocate(m.bytes, 1, t->name);
    return m;
}

static void scale_columns(Matrix *w, const float *s) {
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < w->n_panels; p++)
        for (size_t i = 0; i < w->cols * PANEL; i++) ((float *)w->data)[p * w->cols * PANEL + i] *= s[i / PANEL];
}

/* Divides the rows from `first` on by s: [n]. Also of a norm's weight, which has one column. */
static void divide_rows(Matrix *w, size_t first, size_t n, const float *s) {
    #pragma omp parallel for schedule(static)
    for (size_t k = 0; k < w->cols; k++)
        for (size_t i = 0; i < n; i++) *element((float *)w->data, w->cols, k, first + i) /= s[i];
}

/* What rounding w to nearest costs: the sum of importance [cols] times row_importance [rows] (NULL: 1) times squared error, w's
 * columns times s [cols] and what comes in divided by it (NULL: 1); from at most 16 of its panels. */
static double rounding_error(const Matrix *w, size_t group, float levels, const float *importance, const float *row_importance,
                             const float *s) {
    enum { SAMPLE = 16 };
    size_t n_panels = min_size(w->n_panels, SAMPLE);
    double errors[SAMPLE] = {0}, sum = 0;
    #pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n_panels; i++) {
        size_t p = i * w->n_panels / n_panels;
        float *panel = floats(w->cols * PANEL), left[MAX_GROUP], scale[PANEL], zero[PANEL];
        Matrix one = *w;
        one.n_panels = 1;
        one.data += p * w->panel_bytes;
        load_panels(panel, &one, w->cols, NULL);
        for (size_t k = 0, n; k < w->cols; k += n) {
            float *block = panel + k * PANEL;
            Fit fit;
            n = min_size(group, w->cols - k);
            for (size_t j = 0; j < n * PANEL && s; j++) block[j] *= s[k + j / PANEL];
            for (size_t j = 0; j < n; j++) left[j] = importance[k + j] / (s ? s[k + j] * s[k + j] : 1);
            round_nearest(&fit, NULL, scale, zero, block, left, n, levels);
            for (size_t r = 0; r < min_size(PANEL, w->rows - p * PANEL); r++)
                errors[i] += (double)fit.error[r] * (row_importance ? row_importance[p * PANEL + r] : 1);
        }
        free(panel);
    }
    for (size_t i = 0; i < n_panels; i++) sum += errors[i] * (double)w->n_panels / (double)n_panels;
    return sum;
}

/* sum[t][r] += sum over j from j0 to j1 - 1 of panel[j][r] * m[b + t][j], t < nb <= 128; m: of n rows. */
static void add_product(float *sum, const float *panel, const float *m, size_t n, size_t b, size_t nb, size_t j0, size_t j1) {
    Ahead none = {(uintptr_t)panel, 0, 0};
    for (size_t j = j0; j < j1; j += PANEL)
        number_tiles(nb, true, F32, sum, panel + j * PANEL, element(m, n, b, j), PANEL, PANEL, none);
}

/* H = U^T U: overwrites H, of which the upper triangle is there, with U and below the diagonal U^T; blocks of 128 rows from
 * the top. false if H is not positive definite. n: a multiple of 32. */
static bool cholesky(float *h, size_t n) {
    enum { B = MAX_GROUP };
    static double d[B][B];
    bool good = true;
    for (size_t b = 0; b < n && good; b += B) {
        size_t nb = min_size(B, n - b);
        #pragma omp parallel for schedule(dynamic)
        for (size_t p = b / PANEL; p < n / PANEL; p++) {        /* less what the rows above account for */
            float sum[B * PANEL] = {0}, *rows = h + (p * n + b) * PANEL;
            add_product(sum, h + p * n * PANEL, h, n, b, nb, 0, b);
            for (size_t i = 0; i < nb * PANEL; i++) rows[i] -= sum[i];
        }
        for (size_t k = 0; k < nb; k++)                         /* the block on the diagonal */
            for (size_t j = k; j < nb; j++) {
                double s = *element(h, n, b + k, b + j);
                for (size_t i = 0; i < k; i++) s -= d[i][k] * d[i][j];
                good = good && (j > k || s > 0);
                d[k][j] = j == k ? sqrt(s > 0 ? s : 1) : s / d[k][k];
            }
        for (size_t k = 0; k < nb; k++)
            for (size_t j = k; j < nb; j++) *element(h, n, b + k, b + j) = *element(h, n, b + j, b + k) = (float)d[k][j];
        #pragma omp parallel for schedule(static)
        for (size_t p = (b + nb) / PANEL; p < n / PANEL; p++) { /* and right of it */
            float *rows = h + (p * n + b) * PANEL;
            for (size_t k = 0; k < nb; k++) {
                for (size_t i = 0; i < k; i++)
                    for (size_t r = 0; r < PANEL; r++)
                        rows[k * PANEL + r] = fmaf(-(float)d[i][k], rows[i * PANEL + r], rows[k * PANEL + r]);
                for (size_t r = 0; r < PANEL; r++) {
                    rows[k * PANEL + r] /= (float)d[k][k];
                    *element(h, n, p * PANEL + r, b + k) = rows[k * PANEL + r];
                }
            }
        }
    }
    return good;
}

/* G H^-1 in place of G, panels of n columns, given U: Y U = G from the first column to the last, then X U^T = Y back. */
static void solve(float *g, size_t n_panels, const float *u, size_t n) {
    enum { B = MAX_GROUP };
    #pragma omp parallel for schedule(dynamic)
    for (size_t p = 0; p < n_panels; p++)
        for (size_t step = 0, steps = (n + B - 1) / B; step < 2 * steps; step++) {
            bool back = step >= steps;
            size_t b = (back ? 2 * steps - 1 - step : step) * B, nb = min_size(B, n - b);
            float sum[B * PANEL] = {0}, *panel = g + p * n * PANEL;
            add_product(sum, panel, u, n, b, nb, back ? b + nb : 0, back ? n : b);
            for (size_t i = 0; i < nb; i++) {
                size_t k = back ? nb - 1 - i : i;
                float *row = panel + (b + k) * PANEL, *s = sum + k * PANEL, u_kk = *element(u, n, b + k, b + k);
                for (size_t j = back ? k + 1 : 0; j < (back ? nb : k); j++) {
                    float u_kj = *element(u, n, b + k, b + j);
                    for (size_t r = 0; r < PANEL; r++) s[r] = fmaf(u_kj, panel[(b + j) * PANEL + r], s[r]);
                }
                for (size_t r = 0; r < PANEL; r++) row[r] = (row[r] - s[r]) / u_kk;
            }
        }
}

/* sum += a^T x for n tokens. sum: panels of n_cols columns, [rows, n_cols]; a: [n, stride]; xt: [n_cols][CHUNK]. upper: only
 * what is on and above the diagonal of a symmetric sum. */
static void accumulate(float *sum, const float *a, size_t rows, size_t stride, const float *xt, size_t n_cols, size_t n,
                       bool upper) {
    #pragma omp parallel for schedule(dynamic)
    for (size_t p = 0; p < (rows + PANEL - 1) / PANEL; p++) {
        float panel[CHUNK * PANEL];
        Ahead none = {(uintptr_t)a, 0, 0};
        for (size_t t = 0; t < n; t++)
            for (size_t r = 0; r < PANEL; r++) panel[t * PANEL + r] = p * PANEL + r < rows ? a[t * stride + p * PANEL + r] : 0;
        for (size_t k = 0, nb, end = upper ? (p + 1) * PANEL : n_cols; k < end; k += nb) {
            nb = min_size(BLOCK, end - k);
            number_tiles(nb, true, F32, sum + (p * n_cols + k) * PANEL, panel, xt + k * CHUNK, CHUNK, n, none);
        }
    }
}

/* xt [cols][CHUNK] = x [n, stride] transposed, each token's numbers times its weight (NULL: 1). */
static void transpose(float *xt, const float *x, size_t cols, size_t stride, size_t n, const float *weights) {
    #pragma omp parallel for schedule(static)
    for (size_t k = 0; k < cols; k++)
        for (size_t t = 0; t < n; t++) xt[k * CHUNK + t] = x[t * stride + k] * (weights ? weights[t] : 1);
}

static void add_squares(float *sum, const float *x, size_t cols, size_t n) {
    for (size_t i = 0; i < n; i++) for (size_t k = 0; k < cols; k++) sum[k] = fmaf(x[i * cols + k], x[i * cols + k], sum[k]);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. Files                                                                                                          */

/* Where a checkpoint comes from: a file, a pipe, or nowhere (random weights). */
typedef struct {
    const char *path;
    FILE       *file;                   /* NULL: random */
    uint64_t    at;                     /* bytes read */
} Source;

static void read_exactly(Source *s, void *out, size_t n, const char *what) {
    size_t got = fread(out, 1, n, s->file);
    if (got != n)
        die("%s: ends after %llu bytes, in %s%s%s", s->path, (unsigned long long)(s->at + got), what,
            ferror(s->file) ? ": " : "", ferror(s->file) ? strerror(errno) : "");
    s->at += n;
}

static void skip_to(Source *s, uint64_t offset, const char *what) {
    unsigned char nothing[4096];
    while (s->file && s->at < offset) read_exactly(s, nothing, min_size(sizeof nothing, offset - s->at), what);
}

/* The offsets and sizes of the new file's tensors, and the header's sizes. */
static void lay_out(Header *out, Tensor *to, const char *path) {
    out->tokenizer_offset = round_up(sizeof *out + (uint64_t)out->n_tensors * sizeof(Tensor), 64);
    uint64_t end = out->tokenizer_offset + out->tokenizer_size;
    for (uint64_t i = 0; i < out->n_tensors; i++) {
        Matrix m;
        if (!matrix_layout(&m, to[i].type, to[i].group, to[i].rows, to[i].cols)) die("%s: %s is too large", path, to[i].name);
        to[i].offset = round_up(end, 64);
        to[i].size = m.bytes;
        end = to[i].offset + to[i].size;
    }
    out->file_size = end;
}

/* The table of the new file, all matrices being of one type: `group` is what is asked for. */
static void new_table(Header *out, Tensor *to, const Tensor *from, uint32_t type, uint32_t group, const char *path) {
    for (uint64_t i = 0; i < out->n_tensors; i++) {
        to[i] = from[i];
        to[i].type = from[i].cols == 1 ? (uint32_t)F32 : type;
        to[i].group = tensor_group(to[i].type, group, from[i].cols);
    }
    lay_out(out, to, path);
}

static const unsigned char PADDING[64] = {0};

/* Writes all that stands before the tensors; returns where that ends. */
static uint64_t write_head(FILE *f, const Header *out, const Tensor *to, const void *tokenizer) {
    size_t table_bytes = out->n_tensors * sizeof(Tensor);
    fwrite(out, sizeof *out, 1, f);
    fwrite(to, sizeof(Tensor), out->n_tensors, f);
    fwrite(PADDING, 1, out->tokenizer_offset - sizeof *out - table_bytes, f);
    fwrite(tokenizer, 1, out->tokenizer_size, f);
    return out->tokenizer_offset + out->tokenizer_size;
}

/* Writes a tensor where it belongs; *end is where the file ends, before and after. */
static void write_tensor(FILE *f, const Tensor *to, const Matrix *m, uint64_t *end) {
    fwrite(PADDING, 1, to->offset - *end, f);
    if (fwrite(m->data, 1, to->size, f) != to->size) die("%s: cannot be written: %s", final_path, strerror(errno));
    *end = to->offset + to->size;
}

/* The model's i-th tensor, in the order of the file. */
static const Matrix *model_tensor(const Model *m, uint64_t i) {
    uint64_t norm = 6 * (uint64_t)m->c.n_layers + 1;
    return i == 0 ? &m->token_embedding : i < norm ? (const Matrix *)m->layers + (i - 1)
         : i == norm ? &m->rms_final_weight : &m->wcls;
}

static double count_weights(const Header *c, const Tensor *t) {
    double weights = 0;
    for (uint64_t i = 0; i < c->n_tensors; i++) weights += (double)t[i].rows * (double)t[i].cols;
    return weights;
}

static void report_file(const char *path, const Header *out, const Tensor *to, uint32_t type, double start) {
    fprintf(stderr, "%s: %.1f MB, %s, %.2f bits a weight, %.1f s\n", path, (double)out->file_size / 1e6, TYPE_NAMES[type],
            8.0 * (double)out->file_size / count_weights(out, to), now() - start);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 4. Random weights                                                                                                 */

/* A panel of random weights about N(0, 0.02^2), of norms 1, in FP32, [cols][32], of which n_rows rows exist: the sum of
 * four bytes of a hash of tensor and place, so that they are the same however many threads make them. */
static void random_panel(float *out, size_t cols, size_t n_rows, uint32_t tensor, size_t panel) {
    for (size_t i = 0; i < cols * PANEL; i++) {
        uint64_t place = panel * cols * PANEL + i;
        uint32_t h = (uint32_t)place * 0x9e3779b1u ^ (uint32_t)(place >> 32) ^ tensor * 0x85ebca6bu;
        h = (h ^ h >> 16) * 0x85ebca6bu;
        h = (h ^ h >> 13) * 0xc2b2ae35u;
        h ^= h >> 16;
        int sum = (int)((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24));
        out[i] = i % PANEL >= n_rows ? 0 : cols == 1 ? 1 : (float)(sum - 510) * (0.02f / 147.8f);
    }
}

/* A tokenizer for random weights: bytes, so that it reads every text, and made-up words for the other ids. */
static Text random_tokenizer(uint32_t vocab_size) {
    Text t = {NULL, 0, 0};
    int32_t head[8] = {1, (int32_t)vocab_size, 3, 0, 1, 2, -1, -1};
    append(&t, (const char *)head, sizeof head);
    for (uint32_t i = 0; i < vocab_size; i++) {
        char text[32];
        float score = -(float)i;
        uint16_t type = i == 0 ? UNKNOWN : i < 3 ? CONTROL : i < 259 ? BYTE : NORMAL, length;
        if (i < 3) strcpy(text, i == 0 ? "<unk>" : i == 1 ? "<s>" : "</s>");
        else if (i < 259) snprintf(text, sizeof text, "<0x%02X>", i - 3);
        else {
            size_t n = (size_t)snprintf(text, sizeof text, "%s", SPACE);
            for (uint32_t rest = i; rest && n + 3 < sizeof text; rest /= 80) {
                text[n++] = "bdfgklmnprstvwzj"[rest % 16];
                text[n++] = "aeiou"[rest / 16 % 5];
            }
            text[n] = 0;
        }
        length = (uint16_t)strlen(text);
        append(&t, (const char *)&score, 4);
        append(&t, (const char *)&type, 2);
        append(&t, (const char *)&length, 2);
        append(&t, text, length);
    }
    return t;
}

static const struct {
    const char *name;
    uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, window;
} SHAPES[] = {
    {"mistral-7b", 4096, 14336, 32, 32, 8, 128, 32000, 4096},
    {"mistral-7b-layer", 4096, 14336, 1, 32, 8, 128, 32000, 4096},       /* one of its 32 layers: what calibration costs */
    {"mistral-nemo", 5120, 14336, 40, 32, 8, 128, 131072, 0},
    {"odd", 72, 100, 3, 6, 2, 14, 300, 24},         /* nothing a multiple of anything: for tests */
    {"wide", 4200, 200, 2, 4, 2, 128, 300, 24},     /* a dim of more than 4,096, for tests on a GPU */
};

static Header random_header(const char *shape) {
    Header c;
    memset(&c, 0, sizeof c);
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        if (strcmp(SHAPES[i].name, shape)) continue;
        c.dim = SHAPES[i].dim;
        c.hidden_dim = SHAPES[i].hidden_dim;
        c.n_layers = SHAPES[i].n_layers;
        c.n_heads = SHAPES[i].n_heads;
        c.n_kv_heads = SHAPES[i].n_kv_heads;
        c.head_dim = SHAPES[i].head_dim;
        c.vocab_size = SHAPES[i].vocab_size;
        c.window = SHAPES[i].window;
    }
    if (!c.dim) die("--random %s: not a known shape: mistral-7b, mistral-7b-layer, mistral-nemo, odd or wide", shape);
    memcpy(c.magic, "mistralc", 8);
    c.version = 1;
    c.n_tensors = 6 * c.n_layers + 3;
    c.max_positions = 32768;
    c.norm_eps = 1e-5f;
    c.rope_theta = 10000;
    snprintf(c.name, sizeof c.name, "%s, random", shape);
    return c;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 5. Conversion                                                                                                     */

/* Writes OUT from `source`, all matrices as `type` in groups of `group`. */
static void convert(Source *source, const char *shape, const char *out_path, uint32_t type, uint32_t group) {
    Header in;
    Text tokenizer = {NULL, 0, 0};
    if (!source->file) {
        in = random_header(shape);
        tokenizer = random_tokenizer(in.vocab_size);
        in.tokenizer_size = tokenizer.length;
    } else {
        read_exactly(source, &in, sizeof in, "the header");
        check_header(source->path, &in);
    }
    Tensor *from = (Tensor *)allocate(in.n_tensors, sizeof *from, source->path);
    Tensor *to = (Tensor *)allocate(in.n_tensors, sizeof *to, source->path);
    uint64_t table_bytes = (uint64_t)in.n_tensors * sizeof(Tensor);
    if (!source->file) {
        for (uint64_t i = 0; i < in.n_tensors; i++) {
            Matrix m;
            tensor_shape(&in, i, from[i].name, &from[i].rows, &from[i].cols);
            from[i].type = F32;
            matrix_layout(&m, F32, 0, from[i].rows, from[i].cols);
            from[i].size = m.bytes;
        }
    } else {
        read_exactly(source, from, table_bytes, "the table of tensors");
        skip_to(source, in.tokenizer_offset, "the table of tensors");
        if (in.tokenizer_size > (1u << 30))
            die("%s: a tokenizer of %llu bytes", source->path, (unsigned long long)in.tokenizer_size);
        char *bytes = (char *)allocate(in.tokenizer_size, 1, source->path);
        read_exactly(source, bytes, in.tokenizer_size, "the tokenizer");
        append(&tokenizer, bytes, in.tokenizer_size);
        free(bytes);
    }

    Header out = in;
    uint64_t reached = source->at, total = 0, done = 0;
    for (uint64_t i = 0; i < in.n_tensors; i++) {
        if (source->file) {
            Matrix m = check_tensor(source->path, &in, &from[i], i, &reached);
            if (m.type >= Q8) die(QUANTIZED, source->path, from[i].name, TYPE_NAMES[m.type]);
        }
        total += from[i].size;
    }
    new_table(&out, to, from, type, group, source->path);

    FILE *f = open_output(out_path);
    double start = now();
    uint64_t end = write_head(f, &out, to, tokenizer.text);
    for (uint64_t i = 0; i < in.n_tensors; i++) {
        Matrix a, b;
        matrix_layout(&a, from[i].type, from[i].group, from[i].rows, from[i].cols);
        matrix_layout(&b, to[i].type, to[i].group, to[i].rows, to[i].cols);
        skip_to(source, from[i].offset, from[i].name);
        fwrite(PADDING, 1, to[i].offset - end, f);
        end = to[i].offset + to[i].size;
        size_t step = min_size(((size_t)64 << 20) / a.panel_bytes + 1, a.n_panels);      /* panels at a time: 64 MB */
        unsigned char *input = (unsigned char *)allocate(step, a.panel_bytes, source->path);
        unsigned char *output = (unsigned char *)allocate(step, b.panel_bytes, source->path);
        for (size_t first = 0; first < a.n_panels; first += step) {
            size_t n = min_size(step, a.n_panels - first), bad = 0;
            if (source->file) read_exactly(source, input, n * a.panel_bytes, from[i].name);
            #pragma omp parallel for schedule(dynamic) reduction(+:bad)
            for (size_t p = 0; p < n; p++) {
                size_t row = (first + p) * PANEL;
                if (!source->file)
                    random_panel((float *)(input + p * a.panel_bytes), a.cols, min_size(PANEL, a.rows - row),
                                 (uint32_t)i, first + p);
                bad += !convert_panel(output + p * b.panel_bytes, &b, input + p * a.panel_bytes, &a);
            }
            if (bad) die(BAD_WEIGHT, source->path, from[i].name);
            if (fwrite(output, b.panel_bytes, n, f) != n) die("%s: cannot be written: %s", out_path, strerror(errno));
            done += n * a.panel_bytes;
            progress(true, TYPE_NAMES[type], (double)done, (double)total);
        }
        free(input);
        free(output);
    }
    if (source->file && fgetc(source->file) != EOF) die("%s: goes on after its end", source->path);
    close_output(f);
    report_file(out_path, &out, to, type, start);
    free(tokenizer.text);
    free(from);
    free(to);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 6. Calibration                                                                                                    */

#include "calibrate.h"

/* ------------------------------------------------------------------------------------------------------------------
 * 7. The command line                                                                                               */

#ifndef TESTING
static const char QUANTIZE_HELP[] =
    "usage: quantize IN.bin OUT.bin TYPE [options]       - is standard input, or output\n"
    "       quantize IN.bin OUT.bin TYPE --gptq|--awq --calib FILE [options]\n"
    "       quantize --random SHAPE OUT.bin TYPE [options]\n"
    "makes a checkpoint of another type from an FP32 or FP16 one, or one of random weights\n"
    "  TYPE                 f16; q8, q4: 8 or 4 bits a weight, a scale and a zero for each group;\n"
    "                       nf4: 4 bits with bitsandbytes' code book\n"
    "  SHAPE                mistral-7b, mistral-nemo: for benchmarks; mistral-7b-layer: one layer\n"
    "  -g, --group N        weights of a group: 32, 64 or 128 (q8, nf4: 64, q4: 128)\n"
    "      --gptq           round so that what the model says changes least over a text; takes\n"
    "                       minutes a layer of a 7B model, and what is stopped begins anew\n"
    "      --awq            scale channels by what comes in over a text, and round to nearest; or both\n"
    "      --calib FILE     that text, UTF-8, like what the model will read\n"
    "      --calib-tokens N so many of its tokens, evenly spread (32768)\n"
    "      --bits X         with these: up to X bits a weight of the whole file, those that q4 does not\n"
    "                       take spent on smaller groups or q8 for the matrices that gain most by it\n"
    "  -j, --threads N      (the cores)\n"
    "  -h, --help\n";

int main(int argc, char **argv) {
    enum { GPTQ = 256, AWQ, CALIB, CALIB_TOKENS, BITS };
    static const struct option table[] = {{"group", 1, 0, 'g'}, {"threads", 1, 0, 'j'}, {"random", 1, 0, 'r'}, {"help", 0, 0, 'h'},
                                          {"gptq", 0, 0, GPTQ}, {"awq", 0, 0, AWQ}, {"calib", 1, 0, CALIB},
                                          {"calib-tokens", 1, 0, CALIB_TOKENS}, {"bits", 1, 0, BITS}, {0, 0, 0, 0}};
    const char *shape = NULL;
    uint32_t group = 0, type = 0;
    int option;
    Calibration calibration;
    memset(&calibration, 0, sizeof calibration);
    program = "quantize";
    prepare_process(argv);
    opterr = 0;
    while ((option = getopt_long(argc, argv, ":g:j:h", table, NULL)) != -1) {
        switch (option) {
            case 'g': group = (uint32_t)whole_argument("-g", optarg, 32, 128); break;
            case 'j': {
                uint64_t threads = whole_argument("-j", optarg, 1, MOST_THREADS);
#ifdef _OPENMP
                omp_set_num_threads((int)threads);
#endif
                (void)threads;
                break;
            }
            case 'r': shape = optarg; break;
            case GPTQ: calibration.gptq = true; break;
            case AWQ: calibration.awq = true; break;
            case CALIB: calibration.text = optarg; break;
            case CALIB_TOKENS: calibration.tokens = whole_argument("--calib-tokens", optarg, 1, 1u << 30); break;
            case BITS: calibration.bits = real_argument("--bits", optarg, 1, 16); break;
            case 'h': fputs(QUANTIZE_HELP, stdout); flush_stdout(); return 0;
            case ':': usage("%s: needs a value", argv[optind - 1]);
            default: usage("%s: unknown option, or one that takes no value", argv[optind - 1]);
        }
    }
    int n = argc - optind, wanted = shape ? 2 : 3;
    if (n == wanted && !strcmp(argv[argc - 2], "-")) argv[argc - 2] = (char *)"/dev/stdout";
    if (n != wanted) usage(shape ? "needs OUT.bin and a type" : "needs IN.bin, OUT.bin and a type");
    if (group && group != 32 && group != 64 && group != 128) usage("-g %u: not 32, 64 or 128", group);
    for (uint32_t t = F32; t <= NF4; t++) if (!strcmp(argv[argc - 1], TYPE_NAMES[t])) type = t;
    if (!type || (type == F32 && !shape)) usage("%s: not a type: f16, q8, q4 or nf4", argv[argc - 1]);
    if (group && type <= F16) usage("-g: means nothing for %s, which has no groups", TYPE_NAMES[type]);
    bool calibrated = calibration.gptq || calibration.awq;
    if (calibrated) {
        const char *asked = calibration.gptq ? "--gptq" : "--awq";
        if (!calibration.text) usage("%s: needs --calib FILE, a text to calibrate with", asked);
        if (type != Q8 && type != Q4) usage("%s: means nothing for %s, only for q4 and q8", asked, TYPE_NAMES[type]);
        if (shape) usage("%s: calibrates a model, not random weights", asked);
        if (!strcmp(argv[optind], "-")) usage("%s: reads IN.bin more than once: write it to a file first", asked);
    } else if (calibration.text || calibration.tokens || calibration.bits > 0)
        usage("--calib, --calib-tokens, --bits: mean nothing without --gptq or --awq");

    if (!group) group = type == Q4 ? 128 : 64;      /* 8 bits are asked for where quality comes first; bitsandbytes' nf4 has 64 */
    if (!calibration.tokens) calibration.tokens = 32768;

    if (calibrated && same_file(calibration.text, argv[argc - 2]))
        die("%s: is the text as well, which would be lost: give OUT.bin another name", argv[argc - 2]);

    interrupted = 1;                    /* there is no half a checkpoint: the first Ctrl-C ends it */
    catch_signals();
    if (calibrated) {
        calibrate(&calibration, argv[optind], argv[argc - 2], type, group);
        return 0;
    }
    Source source = {shape ? "random weights" : argv[optind], NULL, 0};
    if (!shape && !strcmp(source.path, "-")) {
        source.file = stdin;
        source.path = "standard input";
    } else if (!shape && !(source.file = fopen(source.path, "rb"))) die("%s: %s", source.path, strerror(errno));
    convert(&source, shape, argv[argc - 2], type, group);
    if (source.file && source.file != stdin) fclose(source.file);
    return 0;
}
#endif
