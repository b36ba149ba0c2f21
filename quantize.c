/* quantize.c - makes a smaller checkpoint of an FP32 or FP16 one: FP16, or 8 or 4 bits a weight.
 *
 *   cc -O3 -march=native -fopenmp quantize.c -lm -o quantize
 *   ./quantize model-f16.bin model-q4.bin q4
 *   python3 export.py HF_DIR - | ./quantize - model-q4.bin q4
 *
 * Round to nearest with a scale and a zero for each group of neighbouring weights, the two chosen by search so that the
 * group's squared error is small. The checkpoint goes through in pieces of some panels, in the order of the file, so that a
 * pipe will do for the input and memory stays small whatever the model's size. */
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

/* The table of the new file: `group` is what is asked for. Sets the header's sizes. */
static void new_table(Header *out, Tensor *to, const Tensor *from, uint32_t type, uint32_t group, const char *path) {
    out->tokenizer_offset = round_up(sizeof *out + (uint64_t)out->n_tensors * sizeof(Tensor), 64);
    uint64_t end = out->tokenizer_offset + out->tokenizer_size;
    for (uint64_t i = 0; i < out->n_tensors; i++) {
        Matrix m;
        to[i] = from[i];
        to[i].type = from[i].cols == 1 ? (uint32_t)F32 : type;
        to[i].group = tensor_group(to[i].type, group, from[i].cols);
        if (!matrix_layout(&m, to[i].type, to[i].group, to[i].rows, to[i].cols)) die("%s: %s is too large", path, to[i].name);
        to[i].offset = round_up(end, 64);
        to[i].size = m.bytes;
        end = to[i].offset + to[i].size;
    }
    out->file_size = end;
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

static void report_file(const char *path, const Header *out, const Tensor *to, uint32_t type, double start) {
    double weights = 0;
    for (uint64_t i = 0; i < out->n_tensors; i++) weights += (double)to[i].rows * (double)to[i].cols;
    fprintf(stderr, "%s: %.1f MB, %s, %.2f bits a weight, %.1f s\n", path, (double)out->file_size / 1e6, TYPE_NAMES[type],
            8.0 * (double)out->file_size / weights, now() - start);
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
 * Calibration: rounding so that what a matrix puts out changes least, over the inputs x that a text brings it.
 *
 * Rounding the weights W [rows, cols] to Q leaves E = W - Q, and costs the sum over tokens of |E x|^2:
 *
 *   loss(E) = tr(E H E^T),   H = sum over tokens of x x^T                                                           (1)
 *
 * Each row stands alone: e H e^T. Column by column a rounded weight's error can be made good by the columns that are not
 * rounded yet (GPTQ, Frantar et al. 2022). With the Cholesky factor H = U^T U, U being upper triangular,
 *
 *   e H e^T = |e U^T|^2 = sum over k of (U_kk e_k + sum over j > k of U_kj e_j)^2                                   (2)
 *
 * so, going from the last column to the first, term k is made as small as the codes allow by rounding not w_k but
 *
 *   w_k + (sum over j > k of U_kj e_j) / U_kk                                                                       (3)
 *
 * These are GPTQ's numbers (LDLQ, Chee et al. 2023, theorem 6) without the inverse of H that its paper updates.
 *
 * Everything here works on panels, [n columns][32 rows] of FP32, and one block of columns at a time, which is a group of the
 * file: what the other blocks bring to it is a product, done by the engine's tiles; the rest stays within the block. */

/* A symmetric or triangular matrix, [n, n]: element (i, j) stands in panel j / 32, at [i][j % 32]. */
static inline float *element(float *m, size_t n, size_t i, size_t j) { return m + (j / PANEL * n + i) * PANEL + j % PANEL; }

/* The rows b to b + nb - 1 of an upper triangular U, or its columns (then as rows), from element j0 to j1 - 1: out [nb][n]. */
static void gather(float *out, const float *u, size_t n, size_t b, size_t nb, size_t j0, size_t j1, bool columns) {
    #pragma omp parallel for schedule(static)
    for (size_t j = j0; j < j1; j++)
        for (size_t t = 0; t < nb; t++)
            out[t * n + j] = columns ? *element((float *)u, n, j, b + t) : *element((float *)u, n, b + t, j);
}

/* sum[t][r] += sum over j from j0 to j1 - 1 of panel[j][r] * x[t][j], t < nb <= 128; x: rows of n. */
static void add_product(float *sum, const float *panel, const float *x, size_t n, size_t nb, size_t j0, size_t j1) {
    float part[MAX_GROUP * PANEL];
    Ahead none = {panel, 0};
    for (size_t j = j0; j < j1; j += MAX_GROUP) {
        tiles(nb, part, panel + j * PANEL, x + j, n, min_size(MAX_GROUP, j1 - j), none);
        for (size_t i = 0; i < nb * PANEL; i++) sum[i] += part[i];
    }
}

/* H = U^T U: overwrites the upper triangle of H with U, blocks of 128 rows from the top; the rest means nothing, before and
 * after. false if H is not positive definite. n: a multiple of 32. */
static bool cholesky(float *h, size_t n) {
    enum { B = MAX_GROUP };
    float *x = (float *)allocate(B * n, sizeof(float), "calibration");
    static double d[B][B];
    bool good = true;
    for (size_t b = 0; b < n && good; b += B) {
        size_t nb = min_size(B, n - b);
        gather(x, h, n, b, nb, 0, b, true);
        #pragma omp parallel for schedule(dynamic)
        for (size_t p = b / PANEL; p < n / PANEL; p++) {        /* less what the rows above account for */
            float sum[B * PANEL] = {0}, *rows = h + (p * n + b) * PANEL;
            add_product(sum, h + p * n * PANEL, x, n, nb, 0, b);
            for (size_t i = 0; i < nb * PANEL; i++) rows[i] -= sum[i];
        }
        for (size_t k = 0; k < nb; k++)                         /* the block on the diagonal */
            for (size_t j = k; j < nb; j++) {
                double s = *element(h, n, b + k, b + j);
                for (size_t i = 0; i < k; i++) s -= d[i][k] * d[i][j];
                good = good && (j > k || s > 0);
                d[k][j] = j == k ? sqrt(s > 0 ? s : 1) : s / d[k][k];
            }
        for (size_t k = 0; k < nb; k++) for (size_t j = k; j < nb; j++) *element(h, n, b + k, b + j) = (float)d[k][j];
        #pragma omp parallel for schedule(static)
        for (size_t p = (b + nb) / PANEL; p < n / PANEL; p++) { /* and right of it */
            float *rows = h + (p * n + b) * PANEL;
            for (size_t k = 0; k < nb; k++) {
                for (size_t i = 0; i < k; i++)
                    for (size_t r = 0; r < PANEL; r++) rows[k * PANEL + r] = fmaf(-(float)d[i][k], rows[i * PANEL + r], rows[k * PANEL + r]);
                for (size_t r = 0; r < PANEL; r++) rows[k * PANEL + r] /= (float)d[k][k];
            }
        }
    }
    free(x);
    return good;
}

/* G H^-1 in place of G, panels of n columns, given U: F U = G from the first column to the last, then X U^T = F back. */
static void solve(float *g, size_t n_panels, const float *u, size_t n) {
    enum { B = MAX_GROUP };
    float *x = (float *)allocate(B * n, sizeof(float), "calibration");
    for (size_t step = 0, steps = (n + B - 1) / B; step < 2 * steps; step++) {
        bool back = step >= steps;
        size_t b = (back ? 2 * steps - 1 - step : step) * B, nb = min_size(B, n - b);
        if (back) gather(x, u, n, b, nb, b, n, false);
        else gather(x, u, n, b, nb, 0, b + nb, true);
        #pragma omp parallel for schedule(static)
        for (size_t p = 0; p < n_panels; p++) {
            float sum[B * PANEL] = {0}, *panel = g + p * n * PANEL;
            add_product(sum, panel, x, n, nb, back ? b + nb : 0, back ? n : b);
            for (size_t i = 0; i < nb; i++) {
                size_t k = back ? nb - 1 - i : i;
                float *row = panel + (b + k) * PANEL, *s = sum + k * PANEL;
                for (size_t j = back ? k + 1 : 0; j < (back ? nb : k); j++)
                    for (size_t r = 0; r < PANEL; r++) s[r] = fmaf(x[k * n + b + j], panel[(b + j) * PANEL + r], s[r]);
                for (size_t r = 0; r < PANEL; r++) row[r] = (row[r] - s[r]) / x[k * n + b + k];
            }
        }
    }
    free(x);
}

/* A matrix on its way to codes. */
typedef struct {
    size_t   n, group, n_panels;        /* columns, a multiple of the group; panels of 32 rows */
    float    levels;                    /* the largest code */
    float   *e;                         /* [n_panels][n][32]: the weights, and when they are rounded what is left of them */
    uint8_t *codes;                     /* [n_panels][n][32] */
    float   *scales;                    /* [n_panels][n / group][scale, zero][32] */
} Rounding;

/* GPTQ: rounds the weights in q->e by (3). Scales and zeros of a group are chosen when its turn comes, for the weights as the
 * columns rounded before want them, each counting by U_kk^2, which is what its error costs in (2). */
static void gptq(Rounding *q, const float *u) {
    size_t n = q->n, nb = q->group;
    float *x = (float *)allocate(nb * n, sizeof(float), "calibration");
    for (size_t b = n; b > 0;) {
        b -= nb;
        float importance[MAX_GROUP];
        gather(x, u, n, b, nb, b, n, false);
        for (size_t k = 0; k < nb; k++) {
            float inverse = 1 / x[k * n + b + k];
            importance[k] = 1 / (inverse * inverse);
            for (size_t j = b + k; j < n; j++) x[k * n + j] *= inverse;
        }
        #pragma omp parallel for schedule(static)
        for (size_t p = 0; p < q->n_panels; p++) {
            float target[MAX_GROUP * PANEL], *e = q->e + (p * n + b) * PANEL;
            float *scale = q->scales + (p * n + b) / nb * 2 * PANEL, *zero = scale + PANEL;
            uint8_t *codes = q->codes + (p * n + b) * PANEL;
            memcpy(target, e, nb * PANEL * sizeof(float));
            add_product(target, q->e + p * n * PANEL, x, n, nb, b + nb, n);
            best_scales(scale, zero, target, importance, nb, q->levels);
            for (size_t k = nb; k-- > 0;) {
                float *w = target + k * PANEL;
                for (size_t j = k + 1; j < nb; j++)
                    for (size_t r = 0; r < PANEL; r++) w[r] = fmaf(x[k * n + b + j], e[j * PANEL + r], w[r]);
                for (size_t r = 0; r < PANEL; r++) {
                    float code = scale[r] != 0 ? rintf(w[r] / scale[r] + zero[r]) : 0;
                    code = code < 0 ? 0 : code > q->levels ? q->levels : code;
                    codes[k * PANEL + r] = (uint8_t)code;
                    e[k * PANEL + r] -= scale[r] * (code - zero[r]);
                }
            }
        }
    }
    free(x);
}

/* Without GPTQ: rounds the weights in q->e to nearest, each counting by its importance [n], the square of what comes in. */
static void round_panels(Rounding *q, const float *importance) {
    size_t n = q->n, nb = q->group;
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < q->n_panels; p++)
        for (size_t b = 0; b < n; b += nb) {
            float *e = q->e + (p * n + b) * PANEL, *scale = q->scales + (p * n + b) / nb * 2 * PANEL, *zero = scale + PANEL;
            uint8_t *codes = q->codes + (p * n + b) * PANEL;
            Fit fit;
            best_scales(scale, zero, e, importance + b, nb, q->levels);
            fit_codes(&fit, codes, e, importance + b, nb, scale, zero, q->levels);
            for (size_t i = 0; i < nb * PANEL; i++) e[i] -= scale[i % PANEL] * (codes[i] - zero[i % PANEL]);
        }
}

/* The rows b to b + nb - 1 of H, of which the upper triangle is there, in the order of the columns that is given: [nb][n]. */
static void gather_symmetric(float *out, const float *h, size_t n, const size_t *order, size_t b, size_t nb) {
    #pragma omp parallel for schedule(static)
    for (size_t j = 0; j < n; j++)
        for (size_t t = 0; t < nb; t++) {
            size_t a = order[b + t], c = order[j];
            out[t * n + j] = a < c ? *element((float *)h, n, a, c) : *element((float *)h, n, c, a);
        }
}

/* Better scales and zeros, [32] each, for a group's codes, by least squares: where the group's weights change by d1 code + d2
 * and all other groups stay, (1) is least for
 *
 *   [c'Hc  c'H1] [d1]   [c'v]
 *   [c'H1  1'H1] [d2] = [1'v],     c: the codes, v = H e, of this group                                             (4)
 *
 * Taken where it is better after rounding to FP16 too. x: the group's rows of H, its first column at 0, `stride` apart; e and
 * v [nb][32] follow. */
static void refit_scales(float *scale, float *zero, float *e, float *v, const uint8_t *codes, const float *x, size_t stride, size_t nb) {
    float hc[MAX_GROUP * PANEL] = {0}, h1[MAX_GROUP] = {0}, cc[PANEL] = {0}, c1[PANEL] = {0}, cv[PANEL] = {0}, v1[PANEL] = {0}, all = 0;
    float d1[PANEL], d2[PANEL];
    for (size_t k = 0; k < nb; k++) {
        for (size_t j = 0; j < nb; j++) {
            float h = x[k * stride + j];
            h1[k] += h;
            for (size_t r = 0; r < PANEL; r++) hc[k * PANEL + r] = fmaf(h, codes[j * PANEL + r], hc[k * PANEL + r]);
        }
        all += h1[k];
        for (size_t r = 0; r < PANEL; r++) {
            float c = codes[k * PANEL + r];
            cc[r] = fmaf(c, hc[k * PANEL + r], cc[r]);
            c1[r] += hc[k * PANEL + r];
            cv[r] = fmaf(c, v[k * PANEL + r], cv[r]);
            v1[r] += v[k * PANEL + r];
        }
    }
    for (size_t r = 0; r < PANEL; r++) {
        float determinant = cc[r] * all - c1[r] * c1[r];
        d1[r] = d2[r] = 0;
        if (!(determinant > 1e-5f * cc[r] * all)) continue;     /* all codes are the same, or nearly */
        float new_scale = half_to_float(float_to_half(scale[r] + (cv[r] * all - v1[r] * c1[r]) / determinant));
        float offset = -scale[r] * zero[r] + (v1[r] * cc[r] - cv[r] * c1[r]) / determinant;
        if (!(new_scale > 0)) continue;
        float new_zero = half_to_float(float_to_half(-offset / new_scale));
        float a = new_scale - scale[r], o = scale[r] * zero[r] - new_scale * new_zero;
        if (!(a * a * cc[r] + 2 * a * o * c1[r] + o * o * all < 2 * (a * cv[r] + o * v1[r]))) continue;
        d1[r] = a;
        d2[r] = o;
        scale[r] = new_scale;
        zero[r] = new_zero;
    }
    for (size_t k = 0; k < nb; k++)
        for (size_t r = 0; r < PANEL; r++) {
            e[k * PANEL + r] -= fmaf(d1[r], codes[k * PANEL + r], d2[r]);
            v[k * PANEL + r] -= fmaf(d1[r], hc[k * PANEL + r], d2[r] * h1[k]);
        }
}

/* The best of its codes for one weight after the other of a group, all others staying (coordinate descent): with v = H e, half
 * the gradient of (1), (1) is least at the weight q_k + v_k / H_kk. */
static void descend(float *e, float *v, uint8_t *codes, const float *scale, const float *x, size_t stride, size_t nb, float levels) {
    for (size_t k = 0; k < nb; k++) {
        float change[PANEL], inverse = 1 / x[k * stride + k];
        bool any = false;
        for (size_t r = 0; r < PANEL; r++) {
            float old = codes[k * PANEL + r], code = scale[r] != 0 ? rintf(old + v[k * PANEL + r] * inverse / scale[r]) : old;
            code = code < 0 ? 0 : code > levels ? levels : code;
            codes[k * PANEL + r] = (uint8_t)code;
            change[r] = scale[r] * (code - old);
            e[k * PANEL + r] -= change[r];
            any |= change[r] != 0;
        }
        for (size_t j = 0; j < nb && any; j++)
            for (size_t r = 0; r < PANEL; r++) v[j * PANEL + r] = fmaf(-x[j * stride + k], change[r], v[j * PANEL + r]);
    }
}

/* Goes over the groups once more, each step lowering (1); codes_too: not the scales and zeros alone. */
static void refine(Rounding *q, const float *h, const size_t *order, bool codes_too) {
    size_t n = q->n, nb = q->group;
    float *x = (float *)allocate(nb * n, sizeof(float), "calibration");
    for (size_t b = 0; b < n; b += nb) {
        gather_symmetric(x, h, n, order, b, nb);
        #pragma omp parallel for schedule(static)
        for (size_t p = 0; p < q->n_panels; p++) {
            float v[MAX_GROUP * PANEL] = {0}, *e = q->e + (p * n + b) * PANEL, *scale = q->scales + (p * n + b) / nb * 2 * PANEL;
            uint8_t *codes = q->codes + (p * n + b) * PANEL;
            add_product(v, q->e + p * n * PANEL, x, n, nb, 0, n);
            refit_scales(scale, scale + PANEL, e, v, codes, x + b, n, nb);
            if (codes_too) descend(e, v, codes, scale, x + b, n, nb, q->levels);
        }
    }
    free(x);
}

/* (1) of all rows. For tests and figures. */
static double rounding_loss(const Rounding *q, const float *h, const size_t *order) {
    size_t n = q->n, nb = q->group;
    float *x = (float *)allocate(nb * n, sizeof(float), "calibration");
    double loss = 0;
    for (size_t b = 0; b < n; b += nb) {
        gather_symmetric(x, h, n, order, b, nb);
        for (size_t p = 0; p < q->n_panels; p++) {
            float v[MAX_GROUP * PANEL] = {0};
            add_product(v, q->e + p * n * PANEL, x, n, nb, 0, n);
            for (size_t i = 0; i < nb * PANEL; i++) loss += (double)v[i] * q->e[(p * n + b) * PANEL + i];
        }
    }
    free(x);
    return loss;
}

typedef struct {
    bool        gptq, awq;
    const char *text;                   /* the file to calibrate with */
    size_t      tokens;                 /* how many of its tokens */
} Calibration;

/* ---- what a text brings to a matrix ---- */

/* Two streams of tokens go through the model side by side, a layer at a time: one through the model as it was, one through it as
 * far as it is quantized. The engine's forward() runs a model of one layer (or of none, to the logits) whose embedding is the
 * residual stream itself, token i's being row i. */
typedef struct {
    Model  model;
    Layer  layer;
    State  state;
    float *x;                           /* the residual stream as an FP32 matrix [n_tokens, dim], in panels */
} Stream;

enum { SEQUENCE = 512 };                /* a calibration text is cut in sequences of so many tokens, BOS among them */

/* What is collected at one product. With x what comes in and y what goes out of it in the model as it was, x' and y' the same
 * with all before it quantized:
 *
 *   H = sum over tokens of x' x'^T,   G = sum over tokens of (y - y') x'^T                                          (5)
 *
 * The weights that give nearest to y from x' are W + G H^-1 (least squares): these are rounded, so that a matrix makes good part
 * of what rounding did before it. What wo and w2 put out joins the residual stream, whose error they make good as well: their
 * y and y' contain it. */
typedef struct {
    int     operation;
    Stream *original, *quantized;
    size_t  rows, cols, n;              /* of the matrix; columns rounded up to whole groups */
    float  *h, *g;                      /* panels of n columns: [n, n], of which the upper triangle; [rows, n] or NULL */
    float  *y;                          /* [CHUNK, rows] */
    float  *xt;                         /* [n][CHUNK]: x' transposed */
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

/* sum += a^T x for n tokens. sum: panels of n_cols columns, [rows, n_cols]; a: [n, rows]; xt: [n_cols][CHUNK]. upper: only what is
 * on and above the diagonal of a symmetric sum. */
static void accumulate(float *sum, const float *a, size_t rows, const float *xt, size_t n_cols, size_t n, bool upper) {
    #pragma omp parallel for schedule(dynamic)
    for (size_t p = 0; p < (rows + PANEL - 1) / PANEL; p++) {
        float panel[CHUNK * PANEL], part[BLOCK * PANEL];
        Ahead none = {a, 0};
        for (size_t t = 0; t < n; t++)
            for (size_t r = 0; r < PANEL; r++) panel[t * PANEL + r] = p * PANEL + r < rows ? a[t * rows + p * PANEL + r] : 0;
        for (size_t k = 0, nb, end = upper ? (p + 1) * PANEL : n_cols; k < end; k += nb) {
            float *out = sum + (p * n_cols + k) * PANEL;
            nb = min_size(BLOCK, end - k);
            tiles(nb, part, panel, xt + k * CHUNK, CHUNK, n, none);
            for (size_t i = 0; i < nb * PANEL; i++) out[i] += part[i];
        }
    }
}

static void watch_quantized(void *watcher, int operation, const float *out, const float *x, size_t n) {
    Collector *c = (Collector *)watcher;
    if (operation != c->operation) return;
    #pragma omp parallel for schedule(static)
    for (size_t k = 0; k < c->cols; k++)
        for (size_t t = 0; t < n; t++) c->xt[k * CHUNK + t] = x[t * c->cols + k];
    accumulate(c->h, x, c->cols, c->xt, c->n, n, true);
    if (c->g) {
        for (size_t i = 0; i < n * c->rows; i++) c->y[i] -= out[i] + (joins_stream(operation) ? c->quantized->state.x[i] : 0);
        accumulate(c->g, c->y, c->rows, c->xt, c->n, n, false);
    }
    longjmp(c->done, 1);
}

/* Where the run is, for its progress: in weights that are quantized. */
typedef struct { const char *name; double done, part, all; } Work;

/* Both streams through the layer that they have, or no farther than `collector` wants. Without one they become what comes out. */
static void run_streams(Stream *original, Stream *quantized, size_t n_tokens, Collector *collector, float *logits, const Work *work) {
    Stream *both[2] = {original, quantized};
    size_t dim = original->model.c.dim;
    for (volatile size_t f = 0; f < n_tokens; f += CHUNK) {
        Token tokens[CHUNK];
        size_t n = min_size(CHUNK, n_tokens - f);
        for (size_t i = 0; i < n; i++) {
            Token token = {(int)(f + i), (f + i) % SEQUENCE, 0, logits != NULL};
            tokens[i] = token;
        }
        for (volatile size_t k = collector && !collector->g; k < 2; k++) {
            Stream *s = both[k];
            s->state.watch = !collector ? NULL : k ? watch_quantized : watch_original;
            s->state.watcher = collector;
            if (!collector || !setjmp(collector->done)) forward(&s->state, tokens, n, logits);
            for (size_t i = 0; i < n && !collector; i++)
                for (size_t d = 0; d < dim; d++) *element(s->x, dim, d, f + i) = s->state.x[i * dim + d] + s->state.xb[i * dim + d];
        }
        if (collector) progress(true, work->name, work->done + 0.5 * work->part * (double)(f + n) / (double)n_tokens, work->all);
    }
}

static void collect(Collector *c, int operation, const Matrix *w, size_t n, bool errors, Stream *original, Stream *quantized,
                    size_t n_tokens, float *logits, Work *work) {
    memset(c, 0, sizeof *c);
    c->operation = operation;
    c->original = original;
    c->quantized = quantized;
    c->rows = w->rows;
    c->cols = w->cols;
    c->n = n;
    c->h = (float *)allocate(n * n, sizeof(float), "calibration");
    if (errors) c->g = (float *)allocate(w->n_panels * n, PANEL * sizeof(float), "calibration");
    c->y = (float *)allocate(CHUNK * w->rows, sizeof(float), "calibration");
    c->xt = (float *)allocate(CHUNK * n, sizeof(float), "calibration");
    work->part = (double)w->rows * (double)w->cols;
    run_streams(original, quantized, n_tokens, c, logits, work);
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
        groups[k / group].key += *element((float *)h, n, k, k);
    }
    qsort(groups, n / group, sizeof *groups, by_key);
    for (size_t g = 0; g < n / group; g++) {
        for (size_t k = 0; k < group; k++) {
            columns[k].index = groups[g].index * group + k;
            columns[k].key = *element((float *)h, n, columns[k].index, columns[k].index);
        }
        qsort(columns, group, sizeof *columns, by_key);
        for (size_t k = 0; k < group; k++) order[g * group + k] = columns[k].index;
    }
    free(groups);
}

/* U of H + damping on its diagonal, which is added to H too: columns that hardly ever have an input, and directions that the text
 * happens not to have, must not make good the errors of others without bounds. */
static float *damped_factor(float *h, size_t n, size_t cols, const size_t *order) {
    float *u = (float *)allocate(n * n, sizeof(float), "calibration");
    double mean = 0;
    for (size_t k = 0; k < cols; k++) mean += *element(h, n, k, k) / (double)cols;
    for (double damping = 0.05 * (mean > 0 ? mean : 1);; damping *= 10) {
        for (size_t k = 0; k < n; k++) *element(h, n, k, k) += (float)damping;
        #pragma omp parallel for schedule(dynamic)
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i <= j; i++) {
                size_t a = order[i], b = order[j];
                *element(u, n, i, j) = a < b ? *element(h, n, a, b) : *element(h, n, b, a);
            }
        if (cholesky(u, n)) return u;
    }
}

enum { SWEEPS = 3 };                    /* of refine() */

/* Quantizes w, whose product is `operation`, to `out`, whose data is filled in. */
static void quantize_matrix(Matrix *out, const Matrix *w, int operation, const Calibration *o, Stream *original, Stream *quantized,
                            size_t n_tokens, float *logits, Work *work) {
    Collector collected, *c = &collected;
    size_t n = out->n_groups * out->group, *order = (size_t *)allocate(n, sizeof *order, "calibration");
    collect(c, operation, w, n, true, original, quantized, n_tokens, logits, work);
    Rounding q = {n, out->group, out->n_panels, levels_of(out->type), (float *)allocate(out->n_panels * n, PANEL * sizeof(float), "calibration"),
                  (uint8_t *)allocate(out->n_panels * n, PANEL, "calibration"),
                  (float *)allocate(out->n_panels * n / out->group, 2 * PANEL * sizeof(float), "calibration")};
    choose_order(order, c->h, n, q.group);
    float *u = damped_factor(c->h, n, c->cols, order);
    for (size_t p = 0; p < q.n_panels; p++) {       /* q.e has room for a panel in the other order */
        memcpy(q.e, c->g + p * n * PANEL, n * PANEL * sizeof(float));
        for (size_t k = 0; k < n; k++) memcpy(c->g + (p * n + k) * PANEL, q.e + order[k] * PANEL, PANEL * sizeof(float));
    }
    solve(c->g, q.n_panels, u, n);
    load_panels(q.e, w, n, order);
    for (size_t i = 0; i < q.n_panels * n * PANEL; i++) q.e[i] += c->g[i];
    if (o->gptq) gptq(&q, u);
    else {
        float *importance = (float *)allocate(n, sizeof(float), "calibration");
        for (size_t k = 0; k < n; k++) importance[k] = *element(c->h, n, order[k], order[k]);
        round_panels(&q, importance);
        free(importance);
    }
    free(u);
    for (int i = 0; i < SWEEPS; i++) refine(&q, c->h, order, o->gptq);
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
    free(c->h);
    free(c->g);
    free(q.e);
    free(q.codes);
    free(q.scales);
    free(order);
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
    collect(&c, operation, w, n, false, original, quantized, n_tokens, logits, work);
    choose_order(order, c.h, n, to->group);
    float *u = o->gptq ? damped_factor(c.h, n, w->cols, order) : NULL;
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

/* Chooses the scales of a layer's four inputs, its matrices being FP32, and multiplies and divides by them: the layer computes
 * what it did. to: the layer's entries in the table. */
static void fold_layer(Layer *w, const Header *c, const Tensor *to, const Calibration *o, Stream *original, Stream *quantized, size_t n_tokens, Work *work) {
    size_t q_dim = (size_t)c->n_heads * c->head_dim, kv_dim = (size_t)c->n_kv_heads * c->head_dim, group = c->n_heads / c->n_kv_heads;
    float *s_qkv = search_scales(&w->wqkv, WQKV, &to[1], o, original, quantized, n_tokens, NULL, work);
    float *s_o = search_scales(&w->wo, WO, &to[2], o, original, quantized, n_tokens, NULL, work);
    float *s_13 = search_scales(&w->w13, W13, &to[4], o, original, quantized, n_tokens, NULL, work);
    float *s_2 = search_scales(&w->w2, W2, &to[5], o, original, quantized, n_tokens, NULL, work);
    scale_columns(&w->wqkv, s_qkv);
    scale_columns(&w->wo, s_o);
    scale_columns(&w->w13, s_13);
    scale_columns(&w->w2, s_2);
    divide_rows(&w->rms_att_weight, 0, c->dim, s_qkv);
    for (size_t h = 0; h < c->n_kv_heads; h++)          /* a key head's values come in by all its query heads */
        divide_rows(&w->wqkv, q_dim + kv_dim + h * c->head_dim, c->head_dim, s_o + h * group * c->head_dim);
    divide_rows(&w->rms_ffn_weight, 0, c->dim, s_13);
    divide_rows(&w->w13, c->hidden_dim, c->hidden_dim, s_2);
    free(s_qkv);
    free(s_o);
    free(s_13);
    free(s_2);
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

/* Writes OUT from the file at `path`, its matrices as `type`, calibrated; the embedding is rounded to nearest. */
static void calibrate(const char *path, const char *out_path, uint32_t type, uint32_t group, const Calibration *o) {
    static const int OPERATIONS[6] = {NORM, WQKV, WO, NORM, W13, W2};      /* of a layer's tensors */
    Model m = load_model(path);
    const Tensor *from = (const Tensor *)(m.map + sizeof(Header));
    Header out = m.c;
    Work work = {TYPE_NAMES[type], 0, 0, 0};
    size_t n_tokens, i = 0;
    double start = now();
    for (uint64_t t = 0; t < out.n_tensors; t++) {
        if (from[t].type >= Q8) die("%s: %s is %s already: start from an FP32 or FP16 checkpoint", path, from[t].name, TYPE_NAMES[from[t].type]);
        if (t && from[t].cols > 1) work.all += (double)from[t].rows * (double)from[t].cols;
    }
    Tensor *to = (Tensor *)allocate(out.n_tensors, sizeof *to, path);
    new_table(&out, to, from, type, group, path);
    int *ids = calibration_ids(&m, o, &n_tokens);
    FILE *f = open_output(out_path);
    uint64_t end = write_head(f, &out, to, m.map + m.c.tokenizer_offset);

    Matrix embedding = new_matrix(&to[0]);
    check_weights(&m.token_embedding, path, from[0].name);
    #pragma omp parallel for schedule(dynamic)
    for (size_t p = 0; p < embedding.n_panels; p++)
        convert_panel((unsigned char *)embedding.data + p * embedding.panel_bytes, &embedding,
                      m.token_embedding.data + p * m.token_embedding.panel_bytes, &m.token_embedding);
    write_tensor(f, &to[i++], &embedding, &end);
    Stream original, quantized;
    start_stream(&original, &m, &m.token_embedding, ids, n_tokens);
    start_stream(&quantized, &m, &embedding, ids, n_tokens);
    free((void *)embedding.data);
    for (size_t l = 0; l < m.c.n_layers; l++) {
        Layer source = m.layers[l], made;
        for (size_t k = 0; k < 6; k++) check_weights(&((Matrix *)&source)[k], path, from[i + k].name);
        original.layer = quantized.layer = source;
        if (o->awq) {
            source = copy_layer(&source);
            fold_layer(&source, &m.c, &to[i], o, &original, &quantized, n_tokens, &work);
            original.layer = quantized.layer = source;
        }
        made = source;
        for (size_t k = 0; k < 6; k++, i++) {
            Matrix *w = (Matrix *)&source + k, *q = (Matrix *)&made + k;
            if (w->cols > 1) {
                *q = new_matrix(&to[i]);
                quantize_matrix(q, w, OPERATIONS[k], o, &original, &quantized, n_tokens, NULL, &work);
                ((Matrix *)&quantized.layer)[k] = *q;
            }
            write_tensor(f, &to[i], q, &end);
        }
        run_streams(&original, &quantized, n_tokens, NULL, NULL, &work);
        for (size_t k = 0; k < 6; k++) {
            if (((Matrix *)&source)[k].cols > 1) free((void *)((Matrix *)&made)[k].data);
            if (o->awq) free((void *)((Matrix *)&source)[k].data);
        }
    }
    original.model.c.n_layers = quantized.model.c.n_layers = 0;      /* what is left: the final norm and the classifier */
    Matrix norm = m.rms_final_weight, wcls = m.wcls;
    check_weights(&norm, path, from[i].name);
    if (i + 1 < out.n_tensors) {
        float *logits = (float *)allocate(CHUNK * m.c.vocab_size, sizeof(float), path);
        check_weights(&wcls, path, from[i + 1].name);
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
        quantize_matrix(&made, &wcls, CLASSIFIER, o, &original, &quantized, n_tokens, logits, &work);
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
    "      --gptq           round so that what each matrix puts out over a text changes least; takes\n"
    "                       minutes a layer of a 7B model, and what is stopped begins anew\n"
    "      --awq            scale channels by what comes in over a text, and round to nearest; or both\n"
    "      --calib FILE     that text, UTF-8, like what the model will read\n"
    "      --calib-tokens N so many of its tokens, evenly spread (32768)\n"
    "  -j, --threads N      (the cores)\n"
    "  -h, --help\n";

int main(int argc, char **argv) {
    enum { GPTQ = 256, AWQ, CALIB, CALIB_TOKENS };
    static const struct option table[] = {{"group", 1, 0, 'g'}, {"threads", 1, 0, 'j'}, {"random", 1, 0, 'r'}, {"help", 0, 0, 'h'}, {"gptq", 0, 0, GPTQ}, {"awq", 0, 0, AWQ},
                                          {"calib", 1, 0, CALIB}, {"calib-tokens", 1, 0, CALIB_TOKENS}, {0, 0, 0, 0}};
    const char *shape = NULL;
    uint32_t group = 0, type = 0;
    int option;
    Calibration calibration = {false, false, NULL, 0};
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
    } else if (calibration.text || calibration.tokens) usage("--calib, --calib-tokens: mean nothing without --gptq or --awq");

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
