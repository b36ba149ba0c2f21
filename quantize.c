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

/* Sums over the n weights of each of a panel's 32 rows, given a scale and a zero: what the squared error is, and what
 * a least squares fit of a better scale and zero to the same codes needs. All [32]. */
typedef struct { float error[PANEL], c[PANEL], cc[PANEL], wc[PANEL]; } Fit;

/* Codes that round to nearest: code = clamp(w / scale + zero, 0, levels), rounded by adding 1.5 * 2^23. w: [n][32];
 * codes: [n][32] or NULL. */
static void fit_codes(Fit *fit, uint8_t *codes, const float *w, size_t n, const float *scale, const float *zero, float levels) {
    float inverse[PANEL];
    memset(fit, 0, sizeof *fit);
    for (size_t r = 0; r < PANEL; r++) inverse[r] = scale[r] != 0 ? 1.0f / scale[r] : 0;
    for (size_t k = 0; k < n; k++)
        for (size_t r = 0; r < PANEL; r++) {
            float x = w[k * PANEL + r], c = fmaf(x, inverse[r], zero[r]);
            c = c < 0 ? 0 : c > levels ? levels : c;
            c = (c + 12582912.0f) - 12582912.0f;
            float error = fmaf(scale[r], c - zero[r], -x);
            fit->error[r] = fmaf(error, error, fit->error[r]);
            fit->c[r] += c;
            fit->cc[r] = fmaf(c, c, fit->cc[r]);
            fit->wc[r] = fmaf(x, c, fit->wc[r]);
            if (codes) codes[k * PANEL + r] = (uint8_t)c;
        }
}

/* Scales and zeros, [32] each, FP16 numbers, with the least squared error found for n weights of 32 rows, w: [n][32].
 * Starts from the range of the weights, that range with 0 in it, and narrower ones (clipping the few largest weights
 * pays for finer steps); from each, rounding to codes and fitting a line through (code, weight) by turns, which lowers
 * the error at each turn. What counts is the error after scale and zero were rounded to FP16. */
static void best_scales(float *best_scale, float *best_zero, const float *w, size_t n, float levels) {
    static const float widths[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
    enum { STARTS = sizeof widths / sizeof *widths + 1, TURNS = 3 };
    float low[PANEL], high[PANEL], sum[PANEL] = {0}, best_error[PANEL], scale[PANEL], zero[PANEL];
    for (size_t r = 0; r < PANEL; r++) { low[r] = high[r] = w[r]; best_error[r] = INFINITY; best_scale[r] = best_zero[r] = 0; }
    for (size_t k = 0; k < n; k++)
        for (size_t r = 0; r < PANEL; r++) {
            float x = w[k * PANEL + r];
            low[r] = x < low[r] ? x : low[r];
            high[r] = x > high[r] ? x : high[r];
            sum[r] += x;
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
            fit_codes(&fit, NULL, w, n, scale, zero, levels);
            for (size_t r = 0; r < PANEL; r++) {
                bool better = fit.error[r] < best_error[r];
                best_error[r] = better ? fit.error[r] : best_error[r];
                best_scale[r] = better ? scale[r] : best_scale[r];
                best_zero[r] = better ? zero[r] : best_zero[r];
                /* w = slope * code + offset by least squares; w = scale * (code - zero) */
                float count = (float)n, spread = fit.cc[r] - fit.c[r] * fit.c[r] / count;
                float slope = spread > 0 ? (fit.wc[r] - fit.c[r] * sum[r] / count) / spread : 0;
                if (slope > 0) {
                    zero[r] = (fit.c[r] - sum[r] / slope) / count;
                    scale[r] = slope;
                }
            }
        }
    }
}

/* Quantizes one group of one panel, w: [group][32] of which n columns exist, into a block of the file (FORMAT.md). */
static void quantize_group(unsigned char *block, int type, const float *w, size_t n, size_t group) {
    float scale[PANEL], zero[PANEL], levels = type == Q8 ? 255 : 15;
    uint8_t codes[MAX_GROUP * PANEL];
    Fit fit;
    best_scales(scale, zero, w, n, levels);
    fit_codes(&fit, codes, w, n, scale, zero, levels);
    memset(codes + n * PANEL, 0, (group - n) * PANEL);
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

/* One panel from an f32 or f16 matrix to a matrix of another type; returns whether all its weights were finite and, for
 * FP16, in range. */
static bool convert_panel(unsigned char *out, const Matrix *to, const unsigned char *in, const Matrix *from) {
    float w[MAX_GROUP * PANEL], limit = to->type == F32 ? 3.4028235e38f : 65519;       /* 65520 would round to infinity */
    bool good = true;
    for (size_t g = 0; g < to->n_groups; g++) {
        size_t k = g * to->group, n = min_size(to->group, to->cols - k);
        unpack_group(w, from->type, in + k * PANEL * (from->type == F32 ? 4 : 2), n);
        for (size_t i = 0; i < n * PANEL; i++) good &= fabsf(w[i]) <= limit;           /* false for NaN */
        if (to->type >= Q8) quantize_group(out + g * to->block_bytes, to->type, w, n, to->group);
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
    if (!c.dim) die("--random %s: not a known shape: mistral-7b, mistral-nemo or odd", shape);
    memcpy(c.magic, "mistralc", 8);
    c.version = 1;
    c.n_tensors = 6 * c.n_layers + 3;
    c.max_positions = 32768;
    c.norm_eps = 1e-5f;
    c.rope_theta = 10000;
    snprintf(c.name, sizeof c.name, "%s, random", shape);
    return c;
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

    /* the new table */
    Header out = in;
    out.tokenizer_offset = round_up(sizeof out + table_bytes, 64);
    uint64_t end = out.tokenizer_offset + out.tokenizer_size, reached = source->at, total = 0, done = 0;
    for (uint64_t i = 0; i < in.n_tensors; i++) {
        Matrix m;
        if (source->file) {
            m = check_tensor(source->path, &in, &from[i], i, &reached);
            if (m.type >= Q8) die("%s: %s is %s already: start from an FP32 or FP16 checkpoint", source->path, from[i].name, TYPE_NAMES[m.type]);
        }
        to[i] = from[i];
        to[i].type = from[i].cols == 1 ? (uint32_t)F32 : type;
        to[i].group = tensor_group(to[i].type, group, from[i].cols);
        if (!matrix_layout(&m, to[i].type, to[i].group, to[i].rows, to[i].cols)) die("%s: %s is too large", source->path, to[i].name);
        to[i].offset = round_up(end, 64);
        to[i].size = m.bytes;
        end = to[i].offset + to[i].size;
        total += from[i].size;
    }
    out.file_size = end;

    FILE *f = open_output(out_path);
    static const unsigned char zeros[64] = {0};
    double start = now();
    fwrite(&out, sizeof out, 1, f);
    fwrite(to, sizeof(Tensor), in.n_tensors, f);
    fwrite(zeros, 1, out.tokenizer_offset - sizeof out - table_bytes, f);
    fwrite(tokenizer.text, 1, tokenizer.length, f);
    end = out.tokenizer_offset + out.tokenizer_size;
    for (uint64_t i = 0; i < in.n_tensors; i++) {
        Matrix a, b;
        matrix_layout(&a, from[i].type, from[i].group, from[i].rows, from[i].cols);
        matrix_layout(&b, to[i].type, to[i].group, to[i].rows, to[i].cols);
        skip_to(source, from[i].offset, from[i].name);
        fwrite(zeros, 1, to[i].offset - end, f);
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
            if (bad) die("%s: %s has a weight that is infinite, not a number or too large for FP16", source->path, from[i].name);
            if (fwrite(output, b.panel_bytes, n, f) != n) die("%s: cannot be written: %s", out_path, strerror(errno));
            done += n * a.panel_bytes;
            progress(true, TYPE_NAMES[type], (double)done, (double)total);
        }
        free(input);
        free(output);
    }
    if (source->file && fgetc(source->file) != EOF) die("%s: goes on after its end", source->path);
    close_output(f);
    double weights = 0;
    for (uint64_t i = 0; i < in.n_tensors; i++) weights += (double)to[i].rows * (double)to[i].cols;
    fprintf(stderr, "%s: %.1f MB, %s, %.2f bits a weight, %.1f s\n", out_path, (double)out.file_size / 1e6, TYPE_NAMES[type],
            8.0 * (double)out.file_size / weights, now() - start);
    free(tokenizer.text);
    free(from);
    free(to);
}

#ifndef TESTING
static const char QUANTIZE_HELP[] =
    "usage: quantize IN.bin OUT.bin TYPE [options]       IN.bin may be -, standard input\n"
    "       quantize --random SHAPE OUT.bin TYPE [options]\n"
    "makes a checkpoint of another type from an FP32 or FP16 one, or one of random weights\n"
    "  TYPE                 f16; q8, q4: 8 or 4 bits a weight, a scale and a zero for each group\n"
    "  SHAPE                mistral-7b, mistral-nemo: for benchmarks\n"
    "  -g, --group N        weights of a group: 32, 64 or 128 (q8: 64, q4: 128)\n"
    "  -j, --threads N      (the cores)\n"
    "  -h, --help\n";

int main(int argc, char **argv) {
    static const struct option table[] = {{"group", 1, 0, 'g'}, {"threads", 1, 0, 'j'}, {"random", 1, 0, 'r'}, {"help", 0, 0, 'h'}, {0, 0, 0, 0}};
    const char *shape = NULL;
    uint32_t group = 0, type = 0;
    int option;
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
            case 'h': fputs(QUANTIZE_HELP, stdout); return 0;
            case ':': usage("%s: needs a value", argv[optind - 1]);
            default: usage("%s: unknown option", argv[optind - 1]);
        }
    }
    int n = argc - optind, wanted = shape ? 2 : 3;
    if (n != wanted) usage(shape ? "needs OUT.bin and a type" : "needs IN.bin, OUT.bin and a type");
    if (group && group != 32 && group != 64 && group != 128) usage("-g %u: not 32, 64 or 128", group);
    for (uint32_t t = F32; t <= Q4; t++) if (!strcmp(argv[argc - 1], TYPE_NAMES[t])) type = t;
    if (!type || (type == F32 && !shape)) usage("%s: not a type: f16, q8 or q4", argv[argc - 1]);

    if (!group) group = type == Q8 ? 64 : 128;      /* 8 bits are asked for where quality comes first */

    Source source = {shape ? "random weights" : argv[optind], NULL, 0};
    if (!shape && !strcmp(source.path, "-")) {
        source.file = stdin;
        source.path = "standard input";
    } else if (!shape && !(source.file = fopen(source.path, "rb"))) die("%s: %s", source.path, strerror(errno));
    interrupted = 1;                    /* there is no half a checkpoint: the first Ctrl-C ends it */
    catch_signals();
    convert(&source, shape, argv[argc - 2], type, group);
    if (source.file && source.file != stdin) fclose(source.file);
    return 0;
}
#endif
