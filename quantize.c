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
 * With a text to calibrate with (--gptq, --awq: the second half of this file) a layer at a time: what comes into each matrix and the
 * gradients of what goes out of it say which errors matter, and which of them others can make good. */
#ifndef TESTING
#define RUN_NO_MAIN
#endif
#include "run.c"
#include <setjmp.h>       /* leaving forward() early */

/* Sums over the n weights of each of a panel's 32 rows, given a scale and a zero: what the squared error is, and what
 * a least squares fit of a better scale and zero to the same codes needs; each column counts by its importance. All [32]. */
typedef struct { float error[PANEL], c[PANEL], cc[PANEL], wc[PANEL]; } Fit;

#define EIGHT(x) x, x, x, x, x, x, x, x
static const float ONES[MAX_GROUP] = {EIGHT(EIGHT(1)), EIGHT(EIGHT(1))};     /* all columns are as important */

/* Codes that round to nearest: code = clamp(w / scale + zero, 0, levels), rounded by adding 1.5 * 2^23. w: [n][32];
 * importance: [n]; codes: [n][32] or NULL. */
static void fit_codes(Fit *fit, uint8_t *codes, const float *w, const float *importance, size_t n, const float *scale, const float *zero,
                      float levels) {
    float inverse[PANEL];
    memset(fit, 0, sizeof *fit);
    for (size_t r = 0; r < PANEL; r++) inverse[r] = scale[r] != 0 ? 1.0f / scale[r] : 0;
    for (size_t k = 0; k < n; k++)
        for (size_t r = 0; r < PANEL; r++) {
            float x = w[k * PANEL + r], c = fmaf(x, inverse[r], zero[r]);
            c = c < 0 ? 0 : c > levels ? levels : c;
            c = (c + 12582912.0f) - 12582912.0f;
            float error = fmaf(scale[r], c - zero[r], -x), h = importance[k], hc = h * c;
            fit->error[r] = fmaf(h * error, error, fit->error[r]);
            fit->c[r] += hc;
            fit->cc[r] = fmaf(hc, c, fit->cc[r]);
            fit->wc[r] = fmaf(x, hc, fit->wc[r]);
            if (codes) codes[k * PANEL + r] = (uint8_t)c;
        }
}

/* Scales and zeros, [32] each, FP16 numbers, with the least squared error found for n weights of 32 rows, w: [n][32].
 * Starts from the range of the weights, that range with 0 in it, and narrower ones (clipping the few largest weights
 * pays for finer steps); from each, rounding to codes and fitting a line through (code, weight) by turns, which lowers
 * the error at each turn. What counts is the error after scale and zero were rounded to FP16. */
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

static const char BAD_WEIGHT[] = "%s: %s has a weight that is infinite, not a number or too large for FP16";

static float levels_of(int type) { return type == Q8 ? 255 : 15; }

/* Codes of nf4, as bitsandbytes finds them: the largest magnitude of a row's group is 1, each weight takes the nearest of 16 values. */
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
    else {
        best_scales(scale, zero, w, ONES, n, levels_of(type));
        fit_codes(&fit, codes, w, ONES, n, scale, zero, levels_of(type));
    }
    memset(codes + n * PANEL, 0, (group - n) * PANEL);
    pack_group(block, type, codes, scale, zero, group);
}

/* One panel from an f32 or f16 matrix to a matrix of another type; returns whether all its weights were finite and, for
 * FP16, in range. */
static bool convert_panel(unsigned char *out, const Matrix *to, const unsigned char *in, const Matrix *from) {
    float w[MAX_GROUP * PANEL], limit = to->type == F32 ? 3.4028235e38f : 65519;       /* 65520 would round to infinity */
    bool good = true;
    for (size_t g = 0; g < to->n_groups; g++) {
        size_t k = g * to->group, n = min_size(to->group, to->cols - k);
        unpack_group(w, from->type, in + k * PANEL * (from->type == F32 ? 4 : 2), n);
        for (size_t i = 0; i < n * PANEL; i++) good &= fabsf(w[i]) <= limit;           /* false for NaN */
        if (to->type >= Q8) round_group(out + g * to->block_bytes, to->type, w, n, to->group);
        else for (size_t i = 0; i < n * PANEL; i++) {
            if (to->type == F16) ((uint16_t *)out)[k * PANEL + i] = float_to_half(w[i]);
            else ((float *)out)[k * PANEL + i] = w[i];
        }
    }
    return good;
}

/* The group size a tensor gets when `group` is asked for: that one or the largest smaller one that divides cols. */
static uint32_t tensor_group(uint32_t type, uint32_t group, uint64_t cols) {
    if (type < Q8) return 0;
    while (group > 32 && cols % group) group /= 2;
    return group;
}

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

static const struct { const char *name; uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, window; } SHAPES[] = {
    {"mistral-7b", 4096, 14336, 32, 32, 8, 128, 32000, 4096},
    {"mistral-7b-layer", 4096, 14336, 1, 32, 8, 128, 32000, 4096},       /* one of its 32 layers: what calibration costs */
    {"mistral-nemo", 5120, 14336, 40, 32, 8, 128, 131072, 0},
    {"odd", 72, 100, 3, 6, 2, 14, 300, 24},         /* nothing a multiple of anything: for tests */
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
    if (!c.dim) die("--random %s: not a known shape: mistral-7b, mistral-7b-layer, mistral-nemo or odd", shape);
    memcpy(c.magic, "mistralc", 8);
    c.version = 1;
    c.n_tensors = 6 * c.n_layers + 3;
    c.max_positions = 32768;
    c.norm_eps = 1e-5f;
    c.rope_theta = 10000;
    snprintf(c.name, sizeof c.name, "%s, random", shape);
    return c;
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

static double count_weights(const Header *c, const Tensor *t) {
    double weights = 0;
    for (uint64_t i = 0; i < c->n_tensors; i++) weights += (double)t[i].rows * (double)t[i].cols;
    return weights;
}

static void report_file(const char *path, const Header *out, const Tensor *to, uint32_t type, double start) {
    fprintf(stderr, "%s: %.1f MB, %s, %.2f bits a weight, %.1f s\n", path, (double)out->file_size / 1e6, TYPE_NAMES[type],
            8.0 * (double)out->file_size / count_weights(out, to), now() - start);
}

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
        if (in.tokenizer_size > (1u << 30)) die("%s: a tokenizer of %llu bytes", source->path, (unsigned long long)in.tokenizer_size);
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
            if (m.type >= Q8) die("%s: %s is %s already: start from an FP32 or FP16 checkpoint", source->path, from[i].name, TYPE_NAMES[m.type]);
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
                    random_panel((float *)(input + p * a.panel_bytes), a.cols, min_size(PANEL, a.rows - row), (uint32_t)i, first + p);
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
 * Calibration: rounding so that what the model says changes least, over a text.
 *
 * Rounding the weights W [rows, cols] to Q leaves E = W - Q, by which a product's output changes from y to y - E x. With g the
 * gradient of the model's loss with respect to y, the divergence from the model as it was grows by the mean of (g^T E x)^2 / 2 over
 * tokens, if the loss is the log-likelihood of ids drawn from what the model itself says (the Fisher information). Inputs
 * and gradients taken for independent but for their lengths, that is (YAQA, Tseng et al. 2025)
 *
 *   loss(E) = tr(A E H E^T),   A = sum over tokens of g g^T,   H = sum over tokens of |g| x x^T                     (1)
 *
 * (|g|^2 it would be, but then a few tokens are most of the sum, and other texts lose by it.)
 *
 * With the Cholesky factors H = U^T U and A = V^T V, both upper triangular, F = E U^T with its columns divided by U_kk is
 *
 *   F_ik = W_ik + (sum over k' > k of U_kk' E_ik') / U_kk - Q_ik                                                    (2)
 *
 * and the loss the sum over i and k of (V_ii U_kk)^2 (F_ik + (sum over i' > i of V_ii' F_i'k) / V_ii)^2. So, going from the last
 * row and column to the first, each term is made as small as the codes allow: what is rounded is W_ik, and what the errors of
 * later columns and rows ask of it. With A = 1 that is GPTQ (Frantar et al. 2022; in this form, without its inverse of H,
 * LDLQ, Chee et al. 2023, theorem 6): a column's error is made good by the columns not rounded yet, a row's by the rows.
 *
 * Everything here works on panels, [n columns][32 rows] of FP32, and one block of columns at a time, which is a group of the
 * file: what the other blocks bring to it is a product, done by the engine's tiles; the rest stays within the block. */

/* An array of zeros. */
static float *floats(size_t n) { return (float *)allocate(n, sizeof(float), "calibration"); }

/* A matrix of n rows in panels: element (i, j) stands in panel j / 32, at [i][j % 32]. */
static inline float *element(const float *m, size_t n, size_t i, size_t j) { return (float *)m + (j / PANEL * n + i) * PANEL + j % PANEL; }

/* sum[t][r] += sum over j from j0 to j1 - 1 of panel[j][r] * m[b + t][j], t < nb <= 128; m: of n rows. */
static void add_product(float *sum, const float *panel, const float *m, size_t n, size_t b, size_t nb, size_t j0, size_t j1) {
    float part[MAX_GROUP * PANEL];
    Ahead none = {panel, 0};
    for (size_t j = j0; j < j1; j += PANEL) {
        tiles(nb, part, panel + j * PANEL, element(m, n, b, j), PANEL, PANEL, none);
        for (size_t i = 0; i < nb * PANEL; i++) sum[i] += part[i];
    }
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
        for (size_t k = 0; k < nb; k++) for (size_t j = k; j < nb; j++) *element(h, n, b + k, b + j) = *element(h, n, b + j, b + k) = (float)d[k][j];
        #pragma omp parallel for schedule(static)
        for (size_t p = (b + nb) / PANEL; p < n / PANEL; p++) { /* and right of it */
            float *rows = h + (p * n + b) * PANEL;
            for (size_t k = 0; k < nb; k++) {
                for (size_t i = 0; i < k; i++)
                    for (size_t r = 0; r < PANEL; r++) rows[k * PANEL + r] = fmaf(-(float)d[i][k], rows[i * PANEL + r], rows[k * PANEL + r]);
                for (size_t r = 0; r < PANEL; r++) {
                    rows[k * PANEL + r] /= (float)d[k][k];
                    *element(h, n, p * PANEL + r, b + k) = rows[k * PANEL + r];
                }
            }
        }
    }
    return good;
}

/* G H^-1 in place of G, panels of n columns, given U: F U = G from the first column to the last, then X U^T = F back. */
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

/* A matrix on its way to codes. */
typedef struct {
    size_t   n, group, n_panels;        /* columns, a multiple of the group; panels of 32 rows */
    float    levels;                    /* the largest code */
    float   *e;                         /* [n_panels][n][32]: the weights, and when they are rounded what is left of them */
    float   *f;                         /* the same of (2), for gptq() with V */
    uint8_t *codes;                     /* [n_panels][n][32] */
    float   *scales;                    /* [n_panels][n / group][scale, zero][32] */
} Rounding;

/* Rounds the columns b to b + group - 1 of panel p. Scales and zeros are chosen when a group's turn comes: first for the weights as
 * the errors so far want them, each counting by U_kk^2; then rounding, and fitting both to the codes by least squares, by turns.
 * Where code and offset change by 1 in all of a group, F changes by C_k = (sum over k' >= k of U_kk' code_k') / U_kk and by O_k,
 * the same of ones. */
static void gptq_block(Rounding *q, const float *u, const float *v, size_t p, size_t b) {
    enum { TURNS = 3 };
    size_t n = q->n, nb = q->group, m = q->n_panels * PANEL, first = (p * n + b) * PANEL;
    float left[MAX_GROUP * PANEL] = {0}, below[MAX_GROUP * PANEL] = {0}, e[MAX_GROUP * PANEL], rows[MAX_GROUP * PANEL], importance[MAX_GROUP] = {0};
    float *w = q->e + first, *best_scale = q->scales + first / nb * 2, *best_zero = best_scale + PANEL;
    float scale[PANEL], zero[PANEL], least[PANEL], inverse_v[PANEL] = {0};
    add_product(left, q->e + p * n * PANEL, u, n, b, nb, b + nb, n);
    if (v) {
        add_product(below, v + p * m * PANEL, q->f, n, b, nb, (p + 1) * PANEL, m);
        for (size_t r = 0; r < PANEL; r++) inverse_v[r] = 1 / *element(v, m, p * PANEL + r, p * PANEL + r);
    }
    for (size_t k = 0; k < nb; k++) {
        float u_kk = *element(u, n, b + k, b + k);
        importance[k] = u_kk * u_kk;
        for (size_t r = 0; r < PANEL; r++) e[k * PANEL + r] = w[k * PANEL + r] + left[k * PANEL + r] / u_kk + below[k * PANEL + r] * inverse_v[r];
    }
    best_scales(scale, zero, e, importance, nb, q->levels);
    for (size_t r = 0; r < PANEL; r++) { least[r] = INFINITY; best_scale[r] = scale[r]; best_zero[r] = zero[r]; }
    for (size_t turn = 0; turn <= TURNS; turn++) {
        float cc[PANEL] = {0}, co[PANEL] = {0}, cf[PANEL] = {0}, of[PANEL] = {0}, loss[PANEL] = {0}, oo = 0;
        if (turn == TURNS) { memcpy(scale, best_scale, sizeof scale); memcpy(zero, best_zero, sizeof zero); }
        memcpy(rows, below, sizeof rows);
        for (size_t k = nb; k-- > 0;) {
            float sum[PANEL], c[PANEL] = {0}, o = 0, inverse = 1 / *element(u, n, b + k, b + k);
            uint8_t *codes = q->codes + first;
            memcpy(sum, left + k * PANEL, sizeof sum);
            for (size_t j = k + 1; j < nb; j++) {
                float u_kj = *element(u, n, b + k, b + j);
                o += u_kj;
                for (size_t r = 0; r < PANEL; r++) {
                    sum[r] = fmaf(u_kj, e[j * PANEL + r], sum[r]);
                    c[r] = fmaf(u_kj, codes[j * PANEL + r], c[r]);
                }
            }
            o = fmaf(o, inverse, 1);
            oo = fmaf(o * importance[k], o, oo);
            for (size_t r = 0; r < PANEL; r++) sum[r] = fmaf(sum[r], inverse, w[k * PANEL + r]);
            for (size_t r = PANEL; r-- > 0;) {
                float wanted = fmaf(rows[k * PANEL + r], inverse_v[r], sum[r]), code = scale[r] != 0 ? rintf(wanted / scale[r] + zero[r]) : 0;
                code = code < 0 ? 0 : code > q->levels ? q->levels : code;
                codes[k * PANEL + r] = (uint8_t)code;
                float weight = scale[r] * (code - zero[r]), f = sum[r] - weight;
                e[k * PANEL + r] = w[k * PANEL + r] - weight;
                rows[k * PANEL + r] = wanted - weight;                          /* what counts: from here on of no other use */
                if (!v) continue;
                q->f[first + k * PANEL + r] = f;
                const float *v_r = element(v, m, p * PANEL + r, p * PANEL);     /* for the rows before r */
                for (size_t i = 0; i < r; i++) rows[k * PANEL + i] = fmaf(v_r[i], f, rows[k * PANEL + i]);
            }
            for (size_t r = 0; r < PANEL; r++) {
                float f = rows[k * PANEL + r], hf = importance[k] * f, C = fmaf(c[r], inverse, codes[k * PANEL + r]);
                loss[r] = fmaf(hf, f, loss[r]);
                cf[r] = fmaf(hf, C, cf[r]);
                of[r] = fmaf(hf, o, of[r]);
                cc[r] = fmaf(importance[k] * C, C, cc[r]);
                co[r] = fmaf(importance[k] * C, o, co[r]);
            }
        }
        for (size_t r = 0; r < PANEL; r++) {
            if (loss[r] < least[r]) { least[r] = loss[r]; best_scale[r] = scale[r]; best_zero[r] = zero[r]; }
            float determinant = cc[r] * oo - co[r] * co[r];
            if (!(determinant > 1e-5f * cc[r] * oo)) continue;          /* all codes are the same, or nearly */
            float slope = scale[r] + (cf[r] * oo - of[r] * co[r]) / determinant;
            float offset = (of[r] * cc[r] - cf[r] * co[r]) / determinant - scale[r] * zero[r];
            if (!(slope > 0)) continue;
            scale[r] = half_to_float(float_to_half(slope));
            zero[r] = half_to_float(float_to_half(-offset / slope));
        }
    }
    memcpy(w, e, nb * PANEL * sizeof(float));
}

/* Rounds the weights in q->e. With V (or NULL: A = 1) a block waits for those below it and those right of it: those that
 * have as many before them are rounded at once. */
static void gptq(Rounding *q, const float *u, const float *v) {
    size_t n_blocks = q->n / q->group;
    for (size_t step = 0; step < n_blocks + (v ? q->n_panels : 1) - 1; step++) {
        #pragma omp parallel for schedule(dynamic)
        for (size_t p = 0; p < q->n_panels; p++) {
            size_t below = v ? q->n_panels - 1 - p : 0;
            if (below <= step && step - below < n_blocks) gptq_block(q, u, v, p, (n_blocks - 1 - (step - below)) * q->group);
        }
    }
}

/* Without GPTQ: rounds the weights in q->e to nearest, each counting by its importance [n], the square of what comes in. */
static void round_panels(Rounding *q, const float *importance) {
    size_t n = q->n, nb = q->group;
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < q->n_panels; p++)
        for (size_t b = 0; b < n; b += nb) {
            float *scale = q->scales + (p * n + b) / nb * 2 * PANEL;
            Fit fit;
            best_scales(scale, scale + PANEL, q->e + (p * n + b) * PANEL, importance + b, nb, q->levels);
            fit_codes(&fit, q->codes + (p * n + b) * PANEL, q->e + (p * n + b) * PANEL, importance + b, nb, scale, scale + PANEL, q->levels);
        }
}

typedef struct {
    bool        gptq, awq;
    const char *text;                   /* the file to calibrate with */
    size_t      tokens;                 /* how many of its tokens */
    double      bits;                   /* what the file may take for a weight; 0: each matrix is of the type asked for */
} Calibration;

/* Where the run is, for its progress: in weights. */
typedef struct { const char *name; double done, part, all; } Work;

/* ---- gradients ---- */

/* A stream of tokens goes through the model a layer at a time: the engine's forward() runs a model of one layer (or of none, to the
 * logits) whose embedding is the residual stream itself, token i's being row i. */
typedef struct {
    Model  model;
    Layer  layer;
    State  state;
    float *x;                           /* the residual stream as an FP32 matrix [n_tokens, dim], in panels */
} Stream;

enum { SEQUENCE = 512 };                /* a calibration text is cut in sequences of so many tokens, BOS among them */

/* The tokens f to f + n - 1 of all, n <= 256, through the stream's model. */
static void forward_stream(Stream *s, size_t f, size_t n, float *logits) {
    Token tokens[CHUNK];
    for (size_t i = 0; i < n; i++) {
        Token token = {(int)(f + i), (f + i) % SEQUENCE, 0, logits != NULL};
        tokens[i] = token;
    }
    forward(&s->state, tokens, n, logits);
}

/* The stream becomes what comes out of its layer. */
static void advance(Stream *s, size_t n_tokens) {
    size_t dim = s->model.c.dim;
    s->state.watch = NULL;
    for (size_t f = 0; f < n_tokens; f += CHUNK) {
        forward_stream(s, f, CHUNK, NULL);
        for (size_t i = 0; i < CHUNK; i++)
            for (size_t d = 0; d < dim; d++) *element(s->x, dim, d, f + i) = s->state.x[i * dim + d] + s->state.xb[i * dim + d];
    }
}

/* sum += a^T x for n tokens. sum: panels of n_cols columns, [rows, n_cols]; a: [n, stride]; xt: [n_cols][CHUNK]. upper: only
 * what is on and above the diagonal of a symmetric sum. */
static void accumulate(float *sum, const float *a, size_t rows, size_t stride, const float *xt, size_t n_cols, size_t n, bool upper) {
    #pragma omp parallel for schedule(dynamic)
    for (size_t p = 0; p < (rows + PANEL - 1) / PANEL; p++) {
        float panel[CHUNK * PANEL], part[BLOCK * PANEL];
        Ahead none = {a, 0};
        for (size_t t = 0; t < n; t++)
            for (size_t r = 0; r < PANEL; r++) panel[t * PANEL + r] = p * PANEL + r < rows ? a[t * stride + p * PANEL + r] : 0;
        for (size_t k = 0, nb, end = upper ? (p + 1) * PANEL : n_cols; k < end; k += nb) {
            float *out = sum + (p * n_cols + k) * PANEL;
            nb = min_size(BLOCK, end - k);
            tiles(nb, part, panel, xt + k * CHUNK, CHUNK, n, none);
            for (size_t i = 0; i < nb * PANEL; i++) out[i] += part[i];
        }
    }
}

/* xt [cols][CHUNK] = x [n, stride] transposed, each token's numbers times its weight (NULL: 1). */
static void transpose(float *xt, const float *x, size_t cols, size_t stride, size_t n, const float *weights) {
    #pragma omp parallel for schedule(static)
    for (size_t k = 0; k < cols; k++)
        for (size_t t = 0; t < n; t++) xt[k * CHUNK + t] = x[t * stride + k] * (weights ? weights[t] : 1);
}

/* What is collected of a product's inputs x and of the gradients g of its outputs; what is NULL is not. Of more than 8,192
 * rows A is taken in blocks along its diagonal, as if the rows of different ones had nothing to do with each other. */
enum { OUTPUTS = 8192 };
typedef struct {
    size_t rows;
    double damping;                     /* of A; more where there are few tokens for its rows */
    float *a;                           /* for each block panels of [m, m], m its rows up to a multiple of 32: A's upper triangle */
    float *weights;                     /* [n_tokens]: |g| */
    float *in, *out;                    /* [cols], [rows]: sums of x^2 and of g^2 */
} Gradients;

static void add_squares(float *sum, const float *x, size_t cols, size_t n) {
    for (size_t i = 0; i < n; i++) for (size_t k = 0; k < cols; k++) sum[k] = fmaf(x[i * cols + k], x[i * cols + k], sum[k]);
}

/* The gradients g [n, rows] of a sequence whose first token is the f-th of all. BOS, the same vector each time with a gradient up to
 * a hundred times that of others, would hide them: it is left out, and has the mean weight. */
static void add_gradients(Gradients *of, const float *g, size_t f, size_t n) {
    size_t rows = of->rows;
    if (of->out) add_squares(of->out, g + rows, rows, n - 1);
    if (!of->a) return;
    double mean = 0;
    for (size_t i = 1; i < n; i++) {
        double squares = 0;
        for (size_t r = 0; r < rows; r++) squares += (double)g[i * rows + r] * g[i * rows + r];
        of->weights[f + i] = (float)sqrt(squares);
        mean += sqrt(squares) / (double)(n - 1);
    }
    of->weights[f] = (float)mean;
    float *gt = floats(min_size(round_up(rows, PANEL), OUTPUTS) * CHUNK);
    for (size_t t = 0; t < n; t += CHUNK)
        for (size_t b = 0, nb; b < rows; b += nb) {
            size_t skip = t == 0, count = min_size(CHUNK, n - t) - skip;
            const float *from = g + (t + skip) * rows + b;
            nb = min_size(OUTPUTS, rows - b);
            transpose(gt, from, nb, rows, count, NULL);
            accumulate(of->a + b * OUTPUTS, from, nb, rows, gt, round_up(nb, PANEL), count, true);
        }
    free(gt);
}

/* out [n, cols] = g [n, rows] W: what comes back through a product, for an FP32 or FP16 W. */
static void product_backward(float *out, const float *g, const Matrix *w, size_t n) {
    size_t column_bytes = w->panel_bytes / w->cols;
    #pragma omp parallel for schedule(dynamic)
    for (size_t k = 0; k < w->cols; k += PANEL) {
        size_t nk = min_size(PANEL, w->cols - k);
        float *turned = floats(w->n_panels * PANEL * PANEL), columns[PANEL * PANEL], sum[BLOCK * PANEL], part[BLOCK * PANEL];
        Ahead none = {turned, 0};
        for (size_t p = 0; p < w->n_panels; p++) {
            unpack_group(columns, w->type, w->data + p * w->panel_bytes + k * column_bytes, nk);
            for (size_t r = 0; r < PANEL; r++) for (size_t i = 0; i < nk; i++) turned[(p * PANEL + r) * PANEL + i] = columns[i * PANEL + r];
        }
        for (size_t t = 0; t < n; t += BLOCK) {
            size_t nt = min_size(BLOCK, n - t);
            memset(sum, 0, sizeof sum);
            for (size_t r = 0; r < w->rows; r += MAX_GROUP) {
                tiles(nt, part, turned + r * PANEL, g + t * w->rows + r, w->rows, min_size(MAX_GROUP, w->rows - r), none);
                for (size_t i = 0; i < nt * PANEL; i++) sum[i] += part[i];
            }
            for (size_t i = 0; i < nt; i++) memcpy(out + (t + i) * w->cols + k, sum + i * PANEL, nk * sizeof(float));
        }
        free(turned);
    }
}

/* dx += what comes back through rms_norm(x) from g. All [n, dim]. */
static void norm_backward(float *dx, const float *g, const float *x, const Matrix *weight, size_t n, float eps) {
    size_t dim = weight->rows;
    const float *w = (const float *)weight->data;
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) {
        double squares = 0, dot = 0;
        for (size_t d = 0; d < dim; d++) {
            squares += (double)x[i * dim + d] * x[i * dim + d];
            dot += (double)w[d] * g[i * dim + d] * x[i * dim + d];
        }
        float scale = (float)(1 / sqrt(squares / (double)dim + eps)), along = (float)(dot / (double)dim) * scale * scale;
        for (size_t d = 0; d < dim; d++) dx[i * dim + d] += scale * (w[d] * g[i * dim + d] - along * x[i * dim + d]);
    }
}

/* In place of gate and up, [2 hidden_dim], their gradients, g [hidden_dim] being that of silu(gate) * up. */
static void swiglu_backward(float *gate_up, const float *g, size_t hidden_dim) {
    for (size_t i = 0; i < hidden_dim; i++) {
        float gate = gate_up[i], up = gate_up[hidden_dim + i], sigmoid = 1 / (1 + fast_exp(-gate));
        gate_up[i] = g[i] * up * sigmoid * (1 + gate * (1 - sigmoid));
        gate_up[hidden_dim + i] = g[i] * gate * sigmoid;
    }
}

/* In place of a sequence's queries, keys and values as wqkv puts them out, [n, q_dim + 2 kv_dim], their gradients, g
 * [n, q_dim] being those of what attention puts out. */
static void attention_backward(float *qkv, const float *g, const Header *c, size_t n) {
    size_t hd = c->head_dim, q_dim = c->n_heads * hd, kv_dim = c->n_kv_heads * hd, width = q_dim + 2 * kv_dim, group = c->n_heads / c->n_kv_heads;
    float *rotation = floats(n * hd), scale = 1 / sqrtf((float)hd);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < hd / 2; j++) {
            double angle = (double)i * pow(c->rope_theta, -2.0 * (double)j / (double)hd);
            rotation[i * hd + 2 * j] = (float)cos(angle);
            rotation[i * hd + 2 * j + 1] = (float)sin(angle);
        }
    #pragma omp parallel for schedule(dynamic)
    for (size_t h = 0; h < c->n_kv_heads; h++) {
        float *kt = floats(hd * n), *vt = floats(hd * n), *k = floats(n * hd), *dk = floats(n * hd), *dv = floats(n * hd);
        float *p = floats(n), *dp = floats(n);
        for (size_t i = 0; i < n; i++) {
            float *key = qkv + i * width + q_dim + h * hd, *value = key + kv_dim;
            rope(key, rotation + i * hd, hd / 2);
            memcpy(k + i * hd, key, hd * sizeof(float));
            for (size_t d = 0; d < hd; d++) { kt[d * n + i] = key[d]; vt[d * n + i] = value[d]; }
        }
        for (size_t head = h * group; head < (h + 1) * group; head++)
            for (size_t i = 0; i < n; i++) {
                float *q = qkv + i * width + head * hd, dq[MAX_HEAD_DIM] = {0}, max = -INFINITY, sum = 0, mean = 0;
                const float *dout = g + i * q_dim + head * hd;
                size_t j0 = first_seen(i, c->window);
                rope(q, rotation + i * hd, hd / 2);
                for (size_t j = j0; j <= i; j++) p[j] = dp[j] = 0;
                for (size_t d = 0; d < hd; d++)
                    for (size_t j = j0; j <= i; j++) {
                        p[j] = fmaf(scale * q[d], kt[d * n + j], p[j]);
                        dp[j] = fmaf(dout[d], vt[d * n + j], dp[j]);
                    }
                for (size_t j = j0; j <= i; j++) max = fmaxf(max, p[j]);
                for (size_t j = j0; j <= i; j++) sum += p[j] = fast_exp(p[j] - max);
                for (size_t j = j0; j <= i; j++) mean += (p[j] /= sum) * dp[j];
                for (size_t j = j0; j <= i; j++) {
                    float ds = scale * p[j] * (dp[j] - mean);
                    for (size_t d = 0; d < hd; d++) {
                        dq[d] = fmaf(ds, k[j * hd + d], dq[d]);
                        dk[j * hd + d] = fmaf(ds, q[d], dk[j * hd + d]);
                        dv[j * hd + d] = fmaf(p[j], dout[d], dv[j * hd + d]);
                    }
                }
                memcpy(q, dq, hd * sizeof(float));
            }
        for (size_t i = 0; i < n; i++) {
            memcpy(qkv + i * width + q_dim + h * hd, dk + i * hd, hd * sizeof(float));
            memcpy(qkv + i * width + q_dim + kv_dim + h * hd, dv + i * hd, hd * sizeof(float));
        }
        float *all[] = {kt, vt, k, dk, dv, p, dp};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    }
    for (size_t i = 0; i < n; i++) {            /* a rotation's gradient is turned back */
        for (size_t j = 0; j < hd / 2; j++) rotation[i * hd + 2 * j + 1] *= -1;
        for (size_t h = 0; h < c->n_heads + c->n_kv_heads; h++) rope(qkv + i * width + h * hd, rotation + i * hd, hd / 2);
    }
    free(rotation);
}

/* What a layer's backward needs of a sequence's forward: the residual stream before both halves of the layer, [n, dim], and what wqkv
 * and w13 put out. */
typedef struct { const Stream *stream; Gradients *of; float *x[2], *out[2]; size_t at; } Tape;

static const int OPERATIONS[6] = {NORM, WQKV, WO, NORM, W13, W2};       /* of a layer's tensors */


static void watch_tape(void *watcher, int operation, const float *out, const float *x, size_t n) {
    Tape *tape = (Tape *)watcher;
    const Layer *w = &tape->stream->layer;
    size_t half = operation == W13, dim = tape->stream->model.c.dim, rows = half ? w->w13.rows : w->wqkv.rows;
    for (size_t k = 0; k < 6; k++)
        if (OPERATIONS[k] == operation && tape->of[k].in) {
            size_t cols = ((const Matrix *)w + k)->cols, skip = tape->at == 0;
            add_squares(tape->of[k].in, x + skip * cols, cols, n - skip);
        }
    if (operation != WQKV && operation != W13) return;
    memcpy(tape->x[half] + tape->at * dim, tape->stream->state.x, n * dim * sizeof(float));
    memcpy(tape->out[half] + tape->at * rows, out, n * rows * sizeof(float));
}

/* From the gradients of what comes out of the stream's layer to those of what goes in, dx [n_tokens, dim] in place; on the way
 * those of what its products put out join of[k], of the layer's k-th tensor. */
static void layer_backward(Stream *s, float *dx, Gradients *of, size_t n_tokens) {
    const Layer *w = &s->layer;
    const Header *c = &s->model.c;
    size_t n = SEQUENCE, dim = c->dim, hidden = c->hidden_dim;
    float *back = floats(n * (w->w2.cols > w->wo.cols ? w->w2.cols : w->wo.cols)), *sum = floats(n * dim);
    Tape tape = {s, of, {floats(n * dim), floats(n * dim)}, {floats(n * w->wqkv.rows), floats(n * w->w13.rows)}, 0};
    s->state.watch = watch_tape;
    s->state.watcher = &tape;
    for (size_t f = 0; f < n_tokens; f += n, dx += n * dim) {
        for (tape.at = 0; tape.at < n; tape.at += CHUNK) forward_stream(s, f + tape.at, CHUNK, NULL);
        add_gradients(&of[5], dx, f, n);
        product_backward(back, dx, &w->w2, n);
        #pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) swiglu_backward(tape.out[1] + i * 2 * hidden, back + i * hidden, hidden);
        add_gradients(&of[4], tape.out[1], f, n);
        product_backward(sum, tape.out[1], &w->w13, n);
        norm_backward(dx, sum, tape.x[1], &w->rms_ffn_weight, n, c->norm_eps);
        add_gradients(&of[2], dx, f, n);
        product_backward(back, dx, &w->wo, n);
        attention_backward(tape.out[0], back, c, n);
        add_gradients(&of[1], tape.out[0], f, n);
        product_backward(sum, tape.out[0], &w->wqkv, n);
        norm_backward(dx, sum, tape.x[0], &w->rms_att_weight, n, c->norm_eps);
    }
    s->state.watch = NULL;
    s->state.watcher = NULL;
    float *all[] = {back, sum, tape.x[0], tape.x[1], tape.out[0], tape.out[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* For each layer l the gradient of what comes out of it, [n_tokens, dim], as the l-th piece of a file without a name beside OUT;
 * in all[i], i in the order of the file, squares of what goes through each tensor; and in h, panels of dim rounded up to 32, the
 * upper triangle of H for the embedding: the sum of g g^T over the gradients g of its rows. */
static FILE *find_gradients(const char *out_path, Stream *s, const Model *m, Gradients *all, float *h, const int *ids, size_t n_tokens, Work *work) {
    char name[4200];
    size_t dim = m->c.dim, vocab = m->c.vocab_size, count = n_tokens * dim, n = round_up(dim, PANEL), last = 6 * m->c.n_layers + 2;
    float *dx = floats(count), *logits = floats(CHUNK * vocab), *back = floats(CHUNK * dim), *xt = floats(CHUNK * n);
    uint64_t seed = 1;
    snprintf(name, sizeof name, "%.4000s.XXXXXX", out_path);
    int descriptor = mkstemp(name);
    FILE *file = descriptor < 0 ? NULL : fdopen(descriptor, "w+b");
    if (!file) die("%s: cannot be written: %s", name, strerror(errno));
    unlink(name);
    for (size_t l = 0; l < m->c.n_layers; l++) {
        if (fwrite(s->x, sizeof(float), count, file) != count) die("%s: cannot be written: %s", name, strerror(errno));
        s->layer = m->layers[l];
        advance(s, n_tokens);
        progress(true, work->name, work->done += 0.3 * work->part, work->all);
    }
    s->model.c.n_layers = 0;
    for (size_t f = 0; f < n_tokens; f += CHUNK) {
        forward_stream(s, f, CHUNK, logits);
        for (size_t i = 0; i < CHUNK; i++) {            /* softmax, from which an id is drawn: the gradient is what is left of it */
            float *p = logits + i * vocab, max = -INFINITY;
            double sum = 0;
            for (size_t v = 0; v < vocab; v++) max = fmaxf(max, p[v]);
            for (size_t v = 0; v < vocab; v++) sum += p[v] = fast_exp(p[v] - max);
            double random = uniform(&seed) * sum;
            size_t drawn = 0;
            while (drawn + 1 < vocab && (random -= p[drawn]) >= 0) drawn++;
            for (size_t v = 0; v < vocab; v++) p[v] = (float)(p[v] / sum) - (v == drawn);
        }
        product_backward(back, logits, &m->wcls, CHUNK);
        if (last < m->c.n_tensors) {
            add_squares(all[last].in, s->state.xb, dim, CHUNK);
            add_squares(all[last].out, logits, vocab, CHUNK);
        } else {                                        /* the embedding is the classifier too, with the classifier's inputs */
            float weights[CHUNK] = {0};
            for (size_t i = 0; i < CHUNK * vocab; i++) weights[i / vocab] += logits[i] * logits[i];
            transpose(xt, s->state.xb, dim, dim, CHUNK, weights);
            accumulate(h, s->state.xb, dim, dim, xt, n, CHUNK, true);
        }
        norm_backward(dx + f * dim, back, s->state.x, &m->rms_final_weight, CHUNK, m->c.norm_eps);
    }
    s->model.c.n_layers = 1;
    for (size_t l = m->c.n_layers; l-- > 0;) {
        off_t at = (off_t)(l * count * sizeof(float));
        if (fseeko(file, at, SEEK_SET) || fread(s->x, sizeof(float), count, file) != count || fseeko(file, at, SEEK_SET) ||
            fwrite(dx, sizeof(float), count, file) != count) die("%s: cannot be written: %s", name, strerror(errno));
        s->layer = m->layers[l];
        layer_backward(s, dx, all + 1 + 6 * l, n_tokens);
        progress(true, work->name, work->done += 0.7 * work->part, work->all);
    }
    for (size_t f = 0; f < n_tokens; f += CHUNK) {
        transpose(xt, dx + f * dim, dim, dim, CHUNK, NULL);
        accumulate(h, dx + f * dim, dim, dim, xt, n, CHUNK, true);
    }
    for (size_t i = 0; i < n_tokens; i += SEQUENCE) {
        add_squares(all[0].in, dx + (i + 1) * dim, dim, SEQUENCE - 1);
        for (size_t t = 1; t < SEQUENCE; t++) all[0].out[ids[i + t]]++;
    }
    rewind(file);
    free(dx);
    free(logits);
    free(back);
    free(xt);
    return file;
}

/* ---- what a text brings to a matrix ---- */

/* Two streams go through the model side by side: one through the model as it was, one through it as far as it is quantized. What is
 * collected at one product: with x what comes in and y what goes out of it in the model as it was, x' and y' the same with all
 * before it quantized, and |g| the token's weight,
 *
 *   H = sum over tokens of |g| x' x'^T,   G = sum over tokens of |g| (y - y') x'^T                                    (3)
 *
 * The weights that give nearest to y from x' are W + G H^-1 (least squares): these are rounded, so that a matrix makes good part
 * of what rounding did before it. What wo and w2 put out joins the residual stream, whose error they make good as well: their
 * y and y' contain it. */
typedef struct {
    int     operation;
    Stream *original, *quantized;
    size_t  rows, cols, n;              /* of the matrix; columns rounded up to whole groups */
    size_t  first;                      /* of these tokens, among all */
    const float *weights;               /* [n_tokens]; NULL: 1 */
    float  *h, *g;                      /* panels of n columns: [n, n], of which the upper triangle; [rows, n] or NULL */
    float  *y;                          /* [CHUNK, rows] */
    float  *xt;                         /* [n][CHUNK]: x' transposed, weighted */
    jmp_buf done;                       /* forward() is left when the product was seen */
} Collector;

static bool joins_stream(int operation) { return operation == WO || operation == W2; }

static void watch_original(void *watcher, int operation, const float *out, const float *x, size_t n) {
    Collector *c = (Collector *)watcher;
    (void)x;
    if (operation != c->operation) return;
    for (size_t i = 0; i < n * c->rows; i++) c->y[i] = out[i] + (joins_stream(operation) ? c->original->state.x[i] : 0);
    longjmp(c->done, 1);
}

static void watch_quantized(void *watcher, int operation, const float *out, const float *x, size_t n) {
    Collector *c = (Collector *)watcher;
    if (operation != c->operation) return;
    transpose(c->xt, x, c->cols, c->cols, n, c->weights ? c->weights + c->first : NULL);
    accumulate(c->h, x, c->cols, c->cols, c->xt, c->n, n, true);
    if (c->g) {
        for (size_t i = 0; i < n * c->rows; i++) c->y[i] -= out[i] + (joins_stream(operation) ? c->quantized->state.x[i] : 0);
        accumulate(c->g, c->y, c->rows, c->rows, c->xt, c->n, n, false);
    }
    longjmp(c->done, 1);
}

static void collect(Collector *c, int operation, const Matrix *w, size_t n, bool errors, const Gradients *of, Stream *original, Stream *quantized,
                    size_t n_tokens, float *logits, Work *work) {
    Stream *both[2] = {original, quantized};
    memset(c, 0, sizeof *c);
    c->operation = operation;
    c->original = original;
    c->quantized = quantized;
    c->weights = of ? of->weights : NULL;
    c->rows = w->rows;
    c->cols = w->cols;
    c->n = n;
    c->h = floats(n * n);
    if (errors) c->g = floats(w->n_panels * n * PANEL);
    c->y = floats(CHUNK * w->rows);
    c->xt = floats(CHUNK * n);
    work->part = (double)w->rows * (double)w->cols;
    for (volatile size_t f = 0; f < n_tokens; f += CHUNK) {
        c->first = f;
        for (volatile size_t k = !errors; k < 2; k++) {
            both[k]->state.watch = k ? watch_quantized : watch_original;
            both[k]->state.watcher = c;
            if (!setjmp(c->done)) forward_stream(both[k], f, CHUNK, logits);
        }
        progress(true, work->name, work->done + 0.5 * work->part * (double)f / (double)n_tokens, work->all);
    }
    free(c->y);
    free(c->xt);
}

/* ---- a matrix, from the file through its calibration to codes ---- */

/* Panels of a matrix in FP32, out [n_panels][n][32], columns in the order given, zeros where there are none. The order keeps
 * groups together: what is unpacked serves for many. */
static void load_panels(float *out, const Matrix *m, size_t n, const size_t *order) {
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < m->n_panels; p++) {
        float w[MAX_GROUP * PANEL];
        size_t group = n;
        for (size_t k = 0; k < n; k++) {
            if (order[k] / MAX_GROUP != group && order[k] < m->cols) {
                group = order[k] / MAX_GROUP;
                unpack_group(w, m->type, m->data + p * m->panel_bytes + group * m->block_bytes, min_size(MAX_GROUP, m->cols - group * MAX_GROUP));
            }
            if (order[k] < m->cols) memcpy(out + (p * n + k) * PANEL, w + order[k] % MAX_GROUP * PANEL, PANEL * sizeof(float));
            else memset(out + (p * n + k) * PANEL, 0, PANEL * sizeof(float));
        }
    }
}

/* A matrix as FP32, to be freed. */
static Matrix copy_matrix(const Matrix *m) {
    Matrix copy;
    size_t *order = (size_t *)allocate(m->cols, sizeof *order, "calibration");
    for (size_t k = 0; k < m->cols; k++) order[k] = k;
    matrix_layout(&copy, F32, 0, m->rows, m->cols);
    copy.data = (unsigned char *)allocate(copy.bytes, 1, "calibration");
    load_panels((float *)copy.data, m, m->cols, order);
    free(order);
    return copy;
}

/* Dies if a weight is infinite, not a number, or, but for norms, too large for FP16. */
static void check_weights(const Matrix *m, const char *path, const char *name) {
    float limit = m->cols == 1 ? 3.4028235e38f : 65519;
    size_t bad = 0;
    #pragma omp parallel for schedule(static) reduction(+:bad)
    for (size_t p = 0; p < m->n_panels; p++)
        for (size_t g = 0; g < m->n_groups; g++) {
            float w[MAX_GROUP * PANEL];
            size_t n = min_size(MAX_GROUP, m->cols - g * MAX_GROUP);
            unpack_group(w, m->type, m->data + p * m->panel_bytes + g * m->block_bytes, n);
            for (size_t k = 0; k < n * PANEL; k++) bad += !(fabsf(w[k]) <= limit);
        }
    if (bad) die(BAD_WEIGHT, path, name);
}

typedef struct { float key; size_t index; } Keyed;
static int by_key(const void *a, const void *b) {
    const Keyed *x = (const Keyed *)a, *y = (const Keyed *)b;
    return x->key != y->key ? (x->key > y->key) - (x->key < y->key) : (x->index > y->index) - (x->index < y->index);
}

/* The order in which columns are rounded, from the last to the first: those with the largest inputs first, while all others can
 * still make good their error, but groups stay together, so that the file is what it always is. */
static void choose_order(size_t *order, const float *h, size_t n, size_t group) {
    Keyed *groups = (Keyed *)allocate(n / group, sizeof *groups, "calibration"), columns[MAX_GROUP];
    for (size_t k = 0; k < n; k++) {
        groups[k / group].index = k / group;
        groups[k / group].key += *element(h, n, k, k);
    }
    qsort(groups, n / group, sizeof *groups, by_key);
    for (size_t g = 0; g < n / group; g++) {
        for (size_t k = 0; k < group; k++) {
            columns[k].index = groups[g].index * group + k;
            columns[k].key = *element(h, n, columns[k].index, columns[k].index);
        }
        qsort(columns, group, sizeof *columns, by_key);
        for (size_t k = 0; k < group; k++) order[g * group + k] = columns[k].index;
    }
    free(groups);
}

/* U of H + damping on its diagonal, its columns in the order that is given, or as they are: columns that hardly ever have an input,
 * and directions that the text happens not to have, must not make good the errors of others without bounds. */
static float *damped_factor(const float *h, size_t n, size_t cols, const size_t *order, double damping) {
    float *u = floats(n * n);
    double mean = 0;
    for (size_t k = 0; k < cols; k++) mean += *element(h, n, k, k) / (double)cols;
    for (;; damping *= 10) {
        #pragma omp parallel for schedule(dynamic)
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i <= j; i++) {
                size_t a = order ? order[i] : i, b = order ? order[j] : j;
                *element(u, n, i, j) = *element(h, n, a < b ? a : b, a < b ? b : a) + (i == j ? (float)(damping * (mean > 0 ? mean : 1)) : 0);
            }
        if (cholesky(u, n)) return u;
    }
}

static const double IN_DAMPING = 0.25, OUT_DAMPING = 0.02;      /* of the mean: found on the demo model, where 0.2 to 0.4 are alike */

/* Rounds w to `out`, whose data is filled in, with what was collected, which is used up. of: NULL where A = 1. */
static void round_matrix(Matrix *out, const Matrix *w, Collector *c, const Gradients *of, bool with_gptq) {
    size_t n = c->n, *order = (size_t *)allocate(n, sizeof *order, "calibration"), all = out->n_panels * n * PANEL;
    Rounding q = {n, out->group, out->n_panels, levels_of(out->type), floats(all), c->g,
                  (uint8_t *)allocate(all, 1, "calibration"), floats(all / out->group * 2)};
    choose_order(order, c->h, n, q.group);
    float *u = damped_factor(c->h, n, c->cols, order, IN_DAMPING), *room = floats(n * PANEL);
    load_panels(q.e, w, n, order);
    if (c->g) {
        for (size_t p = 0; p < q.n_panels; p++) {
            memcpy(room, c->g + p * n * PANEL, n * PANEL * sizeof(float));
            for (size_t k = 0; k < n; k++) memcpy(c->g + (p * n + k) * PANEL, room + order[k] * PANEL, PANEL * sizeof(float));
        }
        solve(c->g, q.n_panels, u, n);
        for (size_t i = 0; i < all; i++) q.e[i] += c->g[i];
    }
    if (with_gptq && of)
        for (size_t b = 0; b < w->rows; b += OUTPUTS) {
            size_t rows = min_size(OUTPUTS, w->rows - b), m = round_up(rows, PANEL);
            float *v = damped_factor(of->a + b * OUTPUTS, m, rows, NULL, of->damping);
            Rounding part = {n, q.group, m / PANEL, q.levels, q.e + b * n, q.f + b * n, q.codes + b * n, q.scales + b * n / q.group * 2};
            gptq(&part, u, v);
            free(v);
        }
    else if (with_gptq) gptq(&q, u, NULL);
    else {
        for (size_t k = 0; k < n; k++) room[k] = *element(c->h, n, order[k], order[k]);
        round_panels(&q, room);
    }
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < q.n_panels; p++)
        for (size_t b = 0; b < n; b += q.group) {
            uint8_t codes[MAX_GROUP * PANEL] = {0};
            const float *scale = q.scales + (p * n + b) / q.group * 2 * PANEL;
            for (size_t k = b; k < b + q.group; k++)
                if (order[k] < out->cols) memcpy(codes + order[k] % q.group * PANEL, q.codes + (p * n + k) * PANEL, PANEL);
            pack_group((unsigned char *)out->data + p * out->panel_bytes + order[b] / q.group * out->block_bytes, out->type, codes, scale,
                       scale + PANEL, q.group);
        }
    float *done[] = {u, room, c->h, c->g, q.e, q.scales};
    for (size_t i = 0; i < sizeof done / sizeof *done; i++) free(done[i]);
    free(q.codes);
    free(order);
}

/* Quantizes w, whose product is `operation`, to `out`. */
static void quantize_matrix(Matrix *out, const Matrix *w, int operation, const Gradients *of, const Calibration *o, Stream *original, Stream *quantized,
                            size_t n_tokens, float *logits, Work *work) {
    Collector c;
    collect(&c, operation, w, out->n_groups * out->group, true, of, original, quantized, n_tokens, logits, work);
    round_matrix(out, w, &c, of, o->gptq);
    work->done += work->part;
}

/* ---- AWQ: scales of channels (Lin et al. 2023) ---- */

/* A channel's weights may be multiplied by s if what comes in is divided by it: a large s makes the steps of important weights
 * finer and those of their group coarser. Dividing costs nothing where a norm's weight or a matrix's rows stand before. Among
 * s = importance^(a/2), a from 0 to 1, this takes what makes the sum over channels of importance times squared error least,
 * of at most 16 panels of w. importance, s: [cols]. */
static void choose_scales(float *s, const Matrix *w, const float *importance, size_t group, float levels) {
    enum { STEPS = 10, SAMPLE = 16 };
    size_t n_panels = min_size(w->n_panels, SAMPLE), cols = w->cols;
    float *candidate = (float *)allocate(cols, sizeof(float), "calibration");
    double mean = 0, best = INFINITY;
    for (size_t k = 0; k < cols; k++) mean += importance[k] / (double)cols;
    for (int step = 0; step <= STEPS; step++) {
        double logs = 0, loss = 0;
        for (size_t k = 0; k < cols; k++) {
            double log_s = 0.5 * step / STEPS * log(fmax(importance[k], 1e-6 * mean + 1e-30));
            candidate[k] = (float)log_s;
            logs += log_s / (double)cols;
        }
        for (size_t k = 0; k < cols; k++) candidate[k] = (float)exp(candidate[k] - logs);
        double losses[SAMPLE] = {0};
        #pragma omp parallel for schedule(static)
        for (size_t p = 0; p < n_panels; p++)
            for (size_t k = 0, n; k < cols; k += n) {
                float scaled[MAX_GROUP * PANEL], left[MAX_GROUP], scale[PANEL], zero[PANEL];
                const float *panel = (const float *)w->data + (p * w->n_panels / n_panels * cols + k) * PANEL;
                Fit fit;
                n = min_size(group, cols - k);
                for (size_t i = 0; i < n * PANEL; i++) scaled[i] = panel[i] * candidate[k + i / PANEL];
                for (size_t i = 0; i < n; i++) left[i] = importance[k + i] / (candidate[k + i] * candidate[k + i]);
                best_scales(scale, zero, scaled, left, n, levels);
                fit_codes(&fit, NULL, scaled, left, n, scale, zero, levels);
                for (size_t r = 0; r < PANEL; r++) losses[p] += fit.error[r];
            }
        for (size_t p = 0; p < n_panels; p++) loss += losses[p];
        if (loss < best) { best = loss; memcpy(s, candidate, cols * sizeof(float)); }
    }
    free(candidate);
}

/* All query heads of a key head get the same importance, since their inputs are the same values. */
static void share_scales(float *importance, const Header *c) {
    size_t group = c->n_heads / c->n_kv_heads;
    for (size_t h = 0; h < c->n_heads; h += group)
        for (size_t d = 0; d < c->head_dim; d++) {
            float sum = 0;
            for (size_t i = h; i < h + group; i++) sum += importance[i * c->head_dim + d] / (float)group;
            for (size_t i = h; i < h + group; i++) importance[i * c->head_dim + d] = sum;
        }
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

/* The scales of what comes into w, [cols], to be freed. What a channel's error costs is the mean square of what comes in; where
 * GPTQ rounds, U_kk^2, since what others make good costs nothing. */
static float *search_scales(const Matrix *w, int operation, const Tensor *to, const Calibration *o, Stream *original, Stream *quantized,
                            size_t n_tokens, float *logits, Work *work) {
    size_t n = round_up(w->cols, to->group), *order = (size_t *)allocate(n, sizeof *order, "calibration");
    float *s = (float *)allocate(w->cols, sizeof(float), "calibration"), *importance = (float *)allocate(n, sizeof(float), "calibration");
    Collector c;
    collect(&c, operation, w, n, false, NULL, original, quantized, n_tokens, logits, work);
    choose_order(order, c.h, n, to->group);
    float *u = o->gptq ? damped_factor(c.h, n, w->cols, order, IN_DAMPING) : NULL;
    for (size_t k = 0; k < n; k++) {
        float h = u ? *element(u, n, k, k) : *element(c.h, n, order[k], order[k]);
        importance[order[k]] = u ? h * h : h;
    }
    if (operation == WO) share_scales(importance, &original->model.c);
    choose_scales(s, w, importance, to->group, levels_of((int)to->type));
    free(u);
    free(c.h);
    free(order);
    free(importance);
    return s;
}

/* Multiplies the columns of a layer's four matrices, all FP32, by s[0] to s[3] and divides what brings them their inputs: the
 * layer computes what it did. s[1] must be the same in all query heads of a key head, whose values they share. */
static void fold_scales(Layer *w, const Header *c, float *const s[4]) {
    size_t q_dim = (size_t)c->n_heads * c->head_dim, kv_dim = (size_t)c->n_kv_heads * c->head_dim, group = c->n_heads / c->n_kv_heads;
    scale_columns(&w->wqkv, s[0]);
    scale_columns(&w->wo, s[1]);
    scale_columns(&w->w13, s[2]);
    scale_columns(&w->w2, s[3]);
    divide_rows(&w->rms_att_weight, 0, c->dim, s[0]);
    for (size_t h = 0; h < c->n_kv_heads; h++) divide_rows(&w->wqkv, q_dim + kv_dim + h * c->head_dim, c->head_dim, s[1] + h * group * c->head_dim);
    divide_rows(&w->rms_ffn_weight, 0, c->dim, s[2]);
    divide_rows(&w->w13, c->hidden_dim, c->hidden_dim, s[3]);
}

static Layer copy_layer(const Layer *from) {
    Layer copy;
    for (size_t k = 0; k < 6; k++) ((Matrix *)&copy)[k] = copy_matrix((const Matrix *)from + k);
    return copy;
}

/* ---- a model ---- */

/* The text's ids in sequences of SEQUENCE, each from BOS on, evenly spread where not all are wanted; *n of them. */
static int *calibration_ids(const Model *m, const Calibration *o, size_t *n) {
    Text text = read_file(o->text);
    size_t n_ids, span = SEQUENCE - 1;
    if (m->tokenizer.bos < 0) die("%s: the tokenizer has no BOS, which calibration needs", m->path);
    for (size_t i = 0, length; i < text.length; i += length)
        if (!(length = utf8_length(text.text + i, text.length - i)))
            die("%s: not UTF-8 at byte %zu: calibration wants plain text like what the model will read", o->text, i);
    int *ids = encode(&m->tokenizer, text.text, text.length, &n_ids);
    if (n_ids < 2 * span)
        die("%s: %zu tokens are too few to calibrate with: give it %zu at least, better 8192 and more", o->text, n_ids, 2 * span);
    size_t n_windows = n_ids / span, n_wanted = min_size(round_up(o->tokens, SEQUENCE) / SEQUENCE, n_windows);
    int *out = (int *)allocate(n_wanted * SEQUENCE, sizeof(int), "calibration");
    for (size_t w = 0; w < n_wanted; w++) {
        out[w * SEQUENCE] = m->tokenizer.bos;
        memcpy(out + w * SEQUENCE + 1, ids + w * n_windows / n_wanted * span, span * sizeof(int));
    }
    *n = n_wanted * SEQUENCE;
    free(ids);
    free(text.text);
    return out;
}

static Matrix new_matrix(const Tensor *t) {
    Matrix m;
    matrix_layout(&m, t->type, t->group, t->rows, t->cols);
    m.data = (unsigned char *)allocate(m.bytes, 1, t->name);
    return m;
}

static void write_tensor(FILE *f, const Tensor *t, const Matrix *m, uint64_t *end) {
    fwrite(PADDING, 1, t->offset - *end, f);
    if (fwrite(m->data, 1, t->size, f) != t->size) die("%s: cannot be written: %s", final_path, strerror(errno));
    *end = t->offset + t->size;
}

/* A stream that begins with the tokens' rows of an embedding; the layer is to be filled in. */
static void start_stream(Stream *s, const Model *m, const Matrix *embedding, const int *ids, size_t n_tokens) {
    size_t dim = m->c.dim;
    memset(s, 0, sizeof *s);
    s->model = *m;
    s->model.c.n_layers = 1;
    s->model.layers = &s->layer;
    s->layer = m->layers[0];
    matrix_layout(&s->model.token_embedding, F32, 0, n_tokens, dim);
    s->x = (float *)allocate(s->model.token_embedding.bytes, 1, m->path);
    s->model.token_embedding.data = (const unsigned char *)s->x;
    s->state = new_state(&s->model, 1, SEQUENCE, CHUNK);
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < (n_tokens + PANEL - 1) / PANEL; p++) {
        float *row = (float *)allocate(dim, sizeof(float), m->path);
        for (size_t i = p * PANEL; i < min_size(n_tokens, (p + 1) * PANEL); i++) {
            matrix_row(row, embedding, (size_t)ids[i]);
            for (size_t d = 0; d < dim; d++) *element(s->x, dim, d, i) = row[d];
        }
        free(row);
    }
}

/* What rounding a tensor costs as a type, in nats a token: half of the mean of (g^T E x)^2, the elements of g and x taken for
 * independent; from at most 16 of its panels, rounded to nearest. */
static double rounding_cost(const Matrix *w, uint32_t type, uint32_t group, const Gradients *of, size_t n_tokens) {
    enum { SAMPLE = 16 };
    size_t n_panels = min_size(w->n_panels, SAMPLE), *order = (size_t *)allocate(w->cols, sizeof *order, "calibration");
    double costs[SAMPLE] = {0}, cost = 0, n = (double)n_tokens;
    for (size_t k = 0; k < w->cols; k++) order[k] = k;
    #pragma omp parallel for schedule(dynamic)
    for (size_t s = 0; s < n_panels; s++) {
        size_t p = s * w->n_panels / n_panels;
        Matrix one = *w;
        float *panel = floats(w->cols * PANEL), scale[PANEL], zero[PANEL];
        one.n_panels = 1;
        one.data += p * w->panel_bytes;
        load_panels(panel, &one, w->cols, order);
        for (size_t k = 0, nk; k < w->cols; k += nk) {
            Fit fit;
            nk = min_size(group, w->cols - k);
            best_scales(scale, zero, panel + k * PANEL, of->in + k, nk, levels_of((int)type));
            fit_codes(&fit, NULL, panel + k * PANEL, of->in + k, nk, scale, zero, levels_of((int)type));
            for (size_t r = 0; r < min_size(PANEL, w->rows - p * PANEL); r++) costs[s] += 0.5 * fit.error[r] / n * of->out[p * PANEL + r] / n;
        }
        free(panel);
    }
    for (size_t s = 0; s < n_panels; s++) cost += costs[s] * (double)w->n_panels / (double)n_panels;
    free(order);
    return cost;
}

/* Types and groups of the matrices for a file of so many bits a weight: from the one asked for on, again and again the change
 * that saves most loss a byte, of those that still fit. */
static void choose_types(Header *out, Tensor *to, const Model *m, const Gradients *all, size_t n_tokens, double bits, const char *path) {
    enum { N = 6 };
    static const struct { uint32_t type, group; } CHOICES[N] = {{Q4, 128}, {Q4, 64}, {Q4, 32}, {Q8, 128}, {Q8, 64}, {Q8, 32}};
    double room = bits * count_weights(out, to) / 8 - (double)out->file_size;
    double (*cost)[N] = (double (*)[N])allocate(out->n_tensors, sizeof *cost, path);
    if (room < 0) die("--bits %g: with %s in groups of %u the file has %.2f already", bits, TYPE_NAMES[to[0].type], to[0].group,
                      8.0 * (double)out->file_size / count_weights(out, to));
    for (uint64_t i = 0; i < out->n_tensors; i++) {
        const Matrix *w = i == 0 ? &m->token_embedding : i > 6 * (uint64_t)m->c.n_layers + 1 ? &m->wcls : (const Matrix *)m->layers + (i - 1);
        for (size_t k = 0; k < N && to[i].cols > 1; k++) {
            uint32_t group = tensor_group(CHOICES[k].type, CHOICES[k].group, w->cols);
            cost[i][k] = rounding_cost(w, CHOICES[k].type, group, &all[i], n_tokens);
        }
    }
    for (;;) {
        double best = 0, change = 0;
        size_t best_i = 0, best_k = 0;
        for (uint64_t i = 0; i < out->n_tensors; i++)
            for (size_t now = 0, k = 0; k < N && to[i].cols > 1; k++) {
                Matrix made;
                uint32_t group = tensor_group(CHOICES[k].type, CHOICES[k].group, to[i].cols);
                if (CHOICES[k].type == to[i].type && group == to[i].group) now = k;
                matrix_layout(&made, CHOICES[k].type, group, to[i].rows, to[i].cols);
                double bytes = (double)made.bytes - (double)to[i].size;
                if (k <= now || bytes <= 0 || bytes > room || (cost[i][now] - cost[i][k]) / bytes <= best) continue;
                best = (cost[i][now] - cost[i][k]) / bytes;
                change = bytes;
                best_i = i;
                best_k = k;
            }
        if (best == 0) break;
        to[best_i].type = CHOICES[best_k].type;
        to[best_i].group = tensor_group(CHOICES[best_k].type, CHOICES[best_k].group, to[best_i].cols);
        to[best_i].size += (uint64_t)change;
        room -= change;
    }
    lay_out(out, to, path);
    free(cost);
}

/* Writes OUT from the file at `path`, its matrices as `type` or better, calibrated. */
static void calibrate(const char *path, const char *out_path, uint32_t type, uint32_t group, const Calibration *o) {
    Model m = load_model(path);
    const Tensor *from = (const Tensor *)(m.map + sizeof(Header));
    Header out = m.c;
    Work work = {TYPE_NAMES[type], 0, 0, 0};
    size_t n_tokens, i = 0, dim = m.c.dim;
    double start = now();
    Tensor *to = (Tensor *)allocate(out.n_tensors, sizeof *to, path);
    Gradients *all = (Gradients *)allocate(out.n_tensors, sizeof *all, path), of[6];
    for (uint64_t t = 0; t < out.n_tensors; t++) {
        if (from[t].type >= Q8) die("%s: %s is %s already: start from an FP32 or FP16 checkpoint", path, from[t].name, TYPE_NAMES[from[t].type]);
        if (t && from[t].cols > 1) work.all += (double)from[t].rows * (double)from[t].cols;
        all[t].rows = from[t].rows;
        all[t].in = floats(from[t].cols);
        all[t].out = floats(from[t].rows);
    }
    new_table(&out, to, from, type, group, path);
    int *ids = calibration_ids(&m, o, &n_tokens);
    FILE *f = open_output(out_path);

    Stream original, quantized;
    Collector of_embedding;
    memset(of, 0, sizeof of);
    memset(&of_embedding, 0, sizeof of_embedding);
    of_embedding.h = floats(round_up(dim, PANEL) * round_up(dim, PANEL));
    of_embedding.cols = dim;
    for (uint64_t t = 0; t < out.n_tensors; t++) {
        Matrix w;
        matrix_layout(&w, from[t].type, from[t].group, from[t].rows, from[t].cols);
        w.data = m.map + from[t].offset;
        check_weights(&w, path, from[t].name);
    }
    start_stream(&original, &m, &m.token_embedding, ids, n_tokens);
    work.part = work.all / (double)m.c.n_layers;
    work.all *= 2;
    FILE *gradients = find_gradients(out_path, &original, &m, all, of_embedding.h, ids, n_tokens, &work);
    if (o->bits > 0) choose_types(&out, to, &m, all, n_tokens, o->bits, path);
    uint64_t end = write_head(f, &out, to, m.map + m.c.tokenizer_offset);

    Matrix embedding = new_matrix(&to[0]);
    of_embedding.n = embedding.n_groups * embedding.group;
    round_matrix(&embedding, &m.token_embedding, &of_embedding, NULL, o->gptq);
    write_tensor(f, &to[i++], &embedding, &end);
    start_stream(&quantized, &m, &embedding, ids, n_tokens);
    free((void *)embedding.data);
    float *dx = floats(n_tokens * dim);
    for (size_t l = 0; l < m.c.n_layers; l++) {
        Layer source = m.layers[l], made;
        if (fread(dx, sizeof(float), n_tokens * dim, gradients) != n_tokens * dim) die("%s: gradients cannot be read: %s", out_path, strerror(errno));
        original.layer = quantized.layer = source;
        if (o->awq) {
            source = copy_layer(&source);
            float *s[4] = {search_scales(&source.wqkv, WQKV, &to[i + 1], o, &original, &quantized, n_tokens, NULL, &work),
                           search_scales(&source.wo, WO, &to[i + 2], o, &original, &quantized, n_tokens, NULL, &work),
                           search_scales(&source.w13, W13, &to[i + 4], o, &original, &quantized, n_tokens, NULL, &work),
                           search_scales(&source.w2, W2, &to[i + 5], o, &original, &quantized, n_tokens, NULL, &work)};
            fold_scales(&source, &m.c, s);
            for (size_t k = 0; k < 4; k++) free(s[k]);
            original.layer = quantized.layer = source;
        }
        for (size_t k = 0; k < 6; k++) {
            size_t rows = ((Matrix *)&source)[k].rows, whole = rows / OUTPUTS, rest = round_up(rows % OUTPUTS, PANEL);
            if (OPERATIONS[k] == NORM) continue;
            of[k].rows = rows;
            of[k].damping = OUT_DAMPING + (double)rows / (double)n_tokens;
            of[k].a = floats(whole * OUTPUTS * OUTPUTS + rest * rest);
            of[k].weights = floats(n_tokens);
        }
        layer_backward(&original, dx, of, n_tokens);
        made = source;
        for (size_t k = 0; k < 6; k++, i++) {
            Matrix *w = (Matrix *)&source + k, *q = (Matrix *)&made + k;
            if (OPERATIONS[k] != NORM) {
                *q = new_matrix(&to[i]);
                quantize_matrix(q, w, OPERATIONS[k], &of[k], o, &original, &quantized, n_tokens, NULL, &work);
                ((Matrix *)&quantized.layer)[k] = *q;
                free(of[k].a);
                free(of[k].weights);
            }
            write_tensor(f, &to[i], q, &end);
        }
        advance(&original, n_tokens);
        advance(&quantized, n_tokens);
        for (size_t k = 0; k < 6; k++) {
            if (OPERATIONS[k] != NORM) free((void *)((Matrix *)&made)[k].data);
            if (o->awq) free((void *)((Matrix *)&source)[k].data);
        }
    }
    fclose(gradients);
    free(dx);
    original.model.c.n_layers = quantized.model.c.n_layers = 0;      /* what is left: the final norm and the classifier */
    Matrix norm = m.rms_final_weight, wcls = m.wcls;
    if (i + 1 < out.n_tensors) {
        float *logits = (float *)allocate(CHUNK * m.c.vocab_size, sizeof(float), path);
        if (o->awq) {
            norm = copy_matrix(&norm);
            wcls = copy_matrix(&wcls);
            float *s = search_scales(&wcls, CLASSIFIER, &to[i + 1], o, &original, &quantized, n_tokens, logits, &work);
            scale_columns(&wcls, s);
            divide_rows(&norm, 0, norm.rows, s);
            free(s);
            original.model.rms_final_weight = quantized.model.rms_final_weight = norm;
            original.model.wcls = quantized.model.wcls = wcls;
        }
        write_tensor(f, &to[i++], &norm, &end);
        Matrix made = new_matrix(&to[i]);
        quantize_matrix(&made, &wcls, CLASSIFIER, NULL, o, &original, &quantized, n_tokens, logits, &work);
        write_tensor(f, &to[i], &made, &end);
        free((void *)made.data);
        if (o->awq) { free((void *)norm.data); free((void *)wcls.data); }
        free(logits);
    } else write_tensor(f, &to[i], &norm, &end);
    close_output(f);
    report_file(out_path, &out, to, type, start);
    free_state(&original.state);
    free_state(&quantized.state);
    free(original.x);
    free(quantized.x);
    for (uint64_t t = 0; t < out.n_tensors; t++) { free(all[t].in); free(all[t].out); }
    free(all);
    free(ids);
    free(to);
    free_model(&m);
}

#ifndef TESTING
static const char QUANTIZE_HELP[] =
    "usage: quantize IN.bin OUT.bin TYPE [options]       IN.bin may be -, standard input\n"
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
                                          {"gptq", 0, 0, GPTQ}, {"awq", 0, 0, AWQ}, {"calib", 1, 0, CALIB}, {"calib-tokens", 1, 0, CALIB_TOKENS}, {"bits", 1, 0, BITS}, {0, 0, 0, 0}};
    const char *shape = NULL;
    uint32_t group = 0, type = 0;
    int option;
    Calibration calibration = {false, false, NULL, 0, 0};
    program = "quantize";
    opterr = 0;
    while ((option = getopt_long(argc, argv, ":g:j:h", table, NULL)) != -1) {
        switch (option) {
            case 'g': group = (uint32_t)whole_argument("-g", optarg, 32, 128); break;
            case 'j': {
                uint64_t threads = whole_argument("-j", optarg, 1, 4096);
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
            case 'h': fputs(QUANTIZE_HELP, stdout); return 0;
            case ':': usage("%s: needs a value", argv[optind - 1]);
            default: usage("%s: unknown option, or one that takes no value", argv[optind - 1]);
        }
    }
    int n = argc - optind, wanted = shape ? 2 : 3;
    if (n != wanted) usage(shape ? "needs OUT.bin and a type" : "needs IN.bin, OUT.bin and a type");
    if (group && group != 32 && group != 64 && group != 128) usage("-g %u: not 32, 64 or 128", group);
    for (uint32_t t = F32; t <= NF4; t++) if (!strcmp(argv[argc - 1], TYPE_NAMES[t])) type = t;
    if (!type || (type == F32 && !shape)) usage("%s: not a type: f16, q8, q4 or nf4", argv[argc - 1]);
    bool calibrated = calibration.gptq || calibration.awq;
    if (calibrated) {
        const char *asked = calibration.gptq ? "--gptq" : "--awq";
        if (!calibration.text) usage("%s: needs --calib FILE, a text to calibrate with", asked);
        if (type != Q8 && type != Q4) usage("%s: means nothing for %s, only for q4 and q8", asked, TYPE_NAMES[type]);
        if (shape || !strcmp(argv[optind], "-")) usage("%s: reads IN.bin more than once: write it to a file first", asked);
    } else if (calibration.text || calibration.tokens || calibration.bits > 0)
        usage("--calib, --calib-tokens, --bits: mean nothing without --gptq or --awq");

    if (!group) group = type == Q4 ? 128 : 64;      /* 8 bits are asked for where quality comes first; bitsandbytes' nf4 has 64 */
    if (!calibration.tokens) calibration.tokens = 32768;

    interrupted = 1;                    /* there is no half a checkpoint: the first Ctrl-C ends it */
    catch_signals();
    if (calibrated) {
        calibrate(argv[optind], argv[argc - 2], type, group, &calibration);
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
