/* calibrate.h - the half of quantize.c that needs a text to calibrate with: --gptq, --awq, --bits.
 *
 *   1. Streams            the text goes through the model a layer at a time
 *   2. Statistics         what a text tells of a matrix: A, H and G
 *   3. The backward pass  where A comes from
 *   4. GPTQ               rounding with them
 *   5. AWQ                scaling channels before that
 *   6. Types              --bits
 *   7. A model
 *
 * Rounding the weights W [rows, cols] to Q leaves E = W - Q, by which a product's output changes from y to y - E x. With g the
 * gradient of the model's loss with respect to y, the divergence from the model as it was grows by the mean of (g^T E x)^2 / 2
 * over tokens, if the loss is minus the log-likelihood of ids drawn from what the model itself says (the Fisher information).
 * Inputs and gradients taken for independent but for their lengths, that is, but for a factor,
 *
 *   loss(E) = tr(A E H E^T),   A = sum over tokens of g g^T,   H = sum over tokens of |g| x x^T                     (1)
 *
 * the two sides of YAQA (Tseng et al. 2025, arXiv 2505.22988: H_O and H_I, tokens independent as in its sketch A). It would be
 * |g|^2, but then a few tokens are most of the sum, and other texts lose by it. With A = 1 and |g| = 1 it is the layer's squared
 * error, which GPTQ (Frantar et al. 2022, arXiv 2210.17323, eq. 1) and AWQ (Lin et al. 2023, arXiv 2306.00978, eq. 4) make small.
 *
 * With the Cholesky factors H = U^T U and A = V^T V, both upper triangular, F = E U^T with its columns divided by U_kk is
 *
 *   F_ik = W_ik + (sum over k' > k of U_kk' E_ik') / U_kk - Q_ik                                                    (2)
 *
 * and the loss the sum over i and k of (V_ii U_kk)^2 (F_ik + (sum over i' > i of V_ii' F_i'k) / V_ii)^2. So, going from the last
 * row and column to the first, each term is made as small as the codes allow: what is rounded is W_ik, and what the errors of
 * later columns and rows ask of it, YAQA's feedback from both sides. With A = 1 that is GPTQ (its eq. 2 and 3, and Algorithm 1;
 * in this form, without an inverse of H, LDLQ, Chee et al. 2023, theorem 6).
 *
 * A matrix from text to codes:
 *
 *   find_gradients()    the text through the whole model and back, once: the gradients of what comes out of each layer, on disk
 *   choose_types()      --bits: type and group of each matrix, by what the diagonals of (1) say of rounding it to nearest
 *   search_scales()     --awq: W diag(s), s from a search over one exponent (AWQ, eq. 5)
 *   layer_backward()    A, and each token's |g|
 *   collect()           H, and G (3): what the matrices before this one, rounded already, left to make good
 *   round_matrix()      choose_order(), the largest inputs first (GPTQ's code calls it act-order); damped_factor(), U and V;
 *                       solve(), W + G H^-1 in place of W; gptq(), codes and scales by (2), or round_panels() without --gptq
 *
 * Included once, by quantize.c, after what rounds a group and writes a tensor. */
#include <setjmp.h>       /* leaving forward() early */

/* ------------------------------------------------------------------------------------------------------------------
 * 1. Streams                                                                                                        */

enum { SEQUENCE = 512 };                /* a calibration text is cut in sequences of so many tokens, BOS among them */

/* The tokens of a text on their way through a model, a layer at a time: the engine's forward() runs a model of one layer (or of
 * none, to the logits) whose embedding is the residual stream itself, token i's being row i. */
typedef struct {
    Model  model;
    Layer  layer;
    State  state;
    float *x;                           /* the residual stream as an FP32 matrix [n_tokens, dim], in panels */
    float *logits;                      /* [CHUNK, vocab_size] where the model has no layers, else NULL */
} Stream;

/* What was asked for, and the run. Two streams go side by side: through the model as it was, and as far as it is quantized. */
typedef struct {
    bool         gptq, awq;
    const char  *text;                  /* the file to calibrate with */
    size_t       tokens;                /* how many of its tokens */
    double       bits;                  /* what the file may take for a weight; 0: each matrix is of the type asked for */

    const Model *m;
    int         *ids;                   /* [n_tokens] */
    size_t       n_tokens;
    Stream       original, quantized;
    FILE        *gradients;             /* see find_gradients() */
    FILE        *out;
    uint64_t     end;                   /* bytes written to it */
    const char  *name;                  /* of the type; with the weights done, of all, it is the progress */
    double       done, all;
} Calibration;

/* The text's ids in sequences of SEQUENCE, each from BOS on, evenly spread where not all are wanted. */
static void encode_text(Calibration *o) {
    const Tokenizer *tokenizer = &o->m->tokenizer;
    Text text = read_file(o->text);
    size_t n_ids, span = SEQUENCE - 1;
    if (tokenizer->bos < 0) die("%s: the tokenizer has no BOS, which calibration needs", o->m->path);
    for (size_t i = 0, length; i < text.length; i += length)
        if (!(length = utf8_length(text.text + i, text.length - i)))
            die("%s: not UTF-8 at byte %zu: calibration wants plain text like what the model will read", o->text, i);
    int *ids = encode(tokenizer, text.text, text.length, &n_ids);
    if (n_ids < 2 * span)
        die("%s: %zu tokens are too few to calibrate with: give it %zu at least, better 8192 and more", o->text, n_ids, 2 * span);
    size_t n_windows = n_ids / span, n_wanted = min_size(round_up(o->tokens, SEQUENCE) / SEQUENCE, n_windows);
    o->n_tokens = n_wanted * SEQUENCE;
    o->ids = (int *)allocate(o->n_tokens, sizeof(int), "calibration");
    for (size_t w = 0; w < n_wanted; w++) {
        o->ids[w * SEQUENCE] = tokenizer->bos;
        memcpy(o->ids + w * SEQUENCE + 1, ids + w * n_windows / n_wanted * span, span * sizeof(int));
    }
    FREE(ids, text.text);
}

/* A stream that begins with the tokens' rows of an embedding, before the model's first layer; others take its place in `layer`. */
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

/* From here on the stream runs what is left of the model: the final norm and the classifier. */
static void enter_classifier(Stream *s) {
    s->model.c.n_layers = 0;
    s->logits = floats(CHUNK * s->model.c.vocab_size);
}

/* The tokens f to f + CHUNK - 1 of all through the stream's model, of one sequence: CHUNK divides SEQUENCE and f. */
static void forward_stream(Stream *s, size_t f) {
    Token tokens[CHUNK];
    for (size_t i = 0; i < CHUNK; i++) {
        Token token = {(int)(f + i), (f + i) % SEQUENCE, 0, s->logits != NULL};
        tokens[i] = token;
    }
    forward(&s->state, tokens, CHUNK, s->logits);
}

/* The stream becomes what comes out of its layer. */
static void advance(Stream *s, size_t n_tokens) {
    size_t dim = s->model.c.dim;
    s->state.watch = NULL;
    for (size_t f = 0; f < n_tokens; f += CHUNK) {
        forward_stream(s, f);
        for (size_t i = 0; i < CHUNK; i++)
            for (size_t d = 0; d < dim; d++) *element(s->x, dim, d, f + i) = s->state.x[i * dim + d] + s->state.xb[i * dim + d];
    }
}

static void end_stream(Stream *s) {
    free_state(&s->state);
    FREE(s->x, s->logits);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. Statistics                                                                                                     */

/* Of the mean of the diagonal of H and of A. GPTQ's code has 0.01 for H; on the demo model 0.2 to 0.4 are alike, and better, for
 * texts like the one to calibrate with and for others. */
static const double IN_DAMPING = 0.25, OUT_DAMPING = 0.02;

/* What is collected of a product's inputs x and of the gradients g of its outputs; what is NULL is not. Of more than 8,192
 * rows A is taken in blocks along its diagonal, as if the rows of different ones had nothing to do with each other. */
enum { OUTPUTS = 8192 };
typedef struct {
    size_t rows;
    double damping;                     /* of A: more where there are few tokens for its rows, up to A of little more than 1 */
    float *a;                           /* for each block panels of [m, m], m its rows up to a multiple of 32: A's upper triangle */
    float *weights;                     /* [n_tokens]: |g| */
    float *in, *out;                    /* [cols], [rows]: sums of x^2 and of g^2; of the embedding: of g^2 of its rows, and how
                                           often each id came */
} Gradients;

/* The gradients g [n, rows] of a sequence whose first token is the f-th of all. BOS, the same vector each time with a gradient up
 * to a hundred times that of others, would hide them: it is left out, and has the mean weight. */
static void add_gradients(Gradients *of, const float *g, size_t f, size_t n) {
    size_t rows = of->rows;
    if (of->out) add_squares(of->out, g + rows, rows, n - 1);
    if (!of->weights) return;
    double mean = 0;
    for (size_t i = 1; i < n; i++) {
        double squares = 0;
        for (size_t r = 0; r < rows; r++) squares += (double)g[i * rows + r] * g[i * rows + r];
        of->weights[f + i] = (float)sqrt(squares);
        mean += sqrt(squares) / (double)(n - 1);
    }
    of->weights[f] = (float)mean;
    if (!of->a) return;
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

/* Room for the weights, and for A if it is wanted. */
static void open_gradients(Gradients *of, size_t n_tokens, bool with_a) {
    size_t whole = of->rows / OUTPUTS, rest = round_up(of->rows % OUTPUTS, PANEL);
    of->a = with_a ? floats(whole * OUTPUTS * OUTPUTS + rest * rest) : NULL;
    of->weights = floats(n_tokens);
    of->damping = OUT_DAMPING + (double)of->rows / (double)n_tokens;
}

/* What is collected at one product: with x what comes in and y what goes out of it in the model as it was, x' and y' the same
 * with all before it quantized, and |g| the token's weight,
 *
 *   H = sum over tokens of |g| x' x'^T,   G = sum over tokens of |g| (y - y') x'^T                                  (3)
 *
 * The weights that give nearest to y from x' are W + G H^-1 (least squares): these are rounded, so that a matrix makes good part
 * of what rounding did before it. What wo and w2 put out joins the residual stream, whose error they make good as well: their
 * y and y' contain it. */
typedef struct {
    int           operation;
    const Matrix *w;
    Stream       *from;
    bool          original;             /* whether that is the stream through the model as it was */
    size_t        n;                    /* columns, rounded up to whole groups */
    const float  *weights;              /* of these tokens; NULL: 1 */
    float        *h, *g;                /* panels of n columns: [n, n], of which the upper triangle; [rows, n] or NULL */
    float        *x;                    /* [CHUNK, cols]: x', which may come in parts */
    float        *y;                    /* [CHUNK, rows]: y, then y - y' */
    float        *xt;                   /* [n][CHUNK]: x' transposed, weighted */
    jmp_buf       done;                 /* forward() is left when the product was seen */
} Collector;

static void watch_product(void *watcher, int operation, const float *out, const float *x, size_t first, size_t n) {
    Collector *c = (Collector *)watcher;
    size_t rows = c->w->rows, cols = c->w->cols;
    if (operation != c->operation) return;
    for (size_t i = 0; i < n * rows && c->g; i++) {
        float y = out[i] + (operation == WO || operation == W2 ? c->from->state.x[first * rows + i] : 0);
        c->y[first * rows + i] = c->original ? y : c->y[first * rows + i] - y;
    }
    if (!c->original) memcpy(c->x + first * cols, x, n * cols * sizeof(float));
    if (first + n < CHUNK) return;
    if (!c->original) {
        transpose(c->xt, c->x, cols, cols, CHUNK, c->weights);
        accumulate(c->h, c->x, cols, cols, c->xt, c->n, CHUNK, true);
        if (c->g) accumulate(c->g, c->y, rows, rows, c->xt, c->n, CHUNK, false);
    }
    longjmp(c->done, 1);
}

/* H, and G if it is wanted, of w, whose product is `operation`, in groups of so many columns, to be freed; of: NULL where all
 * tokens count alike. */
static void collect(Calibration *o, float **h, float **g, const Matrix *w, int operation, size_t group, const Gradients *of) {
    Collector c;
    memset(&c, 0, sizeof c);
    c.operation = operation;
    c.w = w;
    c.n = round_up(w->cols, group);
    c.h = *h = floats(c.n * c.n);
    if (g) c.g = *g = floats(w->n_panels * c.n * PANEL);
    c.x = floats(CHUNK * w->cols);
    c.y = floats(CHUNK * w->rows);
    c.xt = floats(CHUNK * c.n);
    for (volatile size_t f = 0; f < o->n_tokens; f += CHUNK) {
        c.weights = of ? of->weights + f : NULL;
        for (volatile size_t k = g ? 0 : 1; k < 2; k++) {
            c.original = k == 0;
            c.from = k == 0 ? &o->original : &o->quantized;
            c.from->state.watch = watch_product;
            c.from->state.watcher = &c;
            if (!setjmp(c.done)) forward_stream(c.from, f);
        }
        progress(true, o->name, o->done + 0.5 * (double)w->rows * (double)w->cols * (double)f / (double)o->n_tokens, o->all);
    }
    FREE(c.x, c.y, c.xt);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. The backward pass                                                                                              */

/* out [n, cols] = g [n, rows] W: what comes back through a product, for an FP32 or FP16 W. */
static void product_backward(float *out, const float *g, const Matrix *w, size_t n) {
    size_t column_bytes = w->panel_bytes / w->cols;
    #pragma omp parallel for schedule(dynamic)
    for (size_t k = 0; k < w->cols; k += PANEL) {
        size_t nk = min_size(PANEL, w->cols - k);
        float *turned = floats(w->n_panels * PANEL * PANEL), columns[PANEL * PANEL], sum[BLOCK * PANEL];
        Ahead none = {(uintptr_t)turned, 0, 0};
        for (size_t p = 0; p < w->n_panels; p++) {
            unpack_group(columns, w->type, w->data + p * w->panel_bytes + k * column_bytes, nk);
            for (size_t r = 0; r < PANEL; r++)
                for (size_t i = 0; i < nk; i++) turned[(p * PANEL + r) * PANEL + i] = columns[i * PANEL + r];
        }
        for (size_t t = 0; t < n; t += BLOCK) {
            size_t nt = min_size(BLOCK, n - t);
            for (size_t r = 0; r < w->rows; r += MAX_GROUP)
                number_tiles(nt, r > 0, F32, sum, turned + r * PANEL, g + t * w->rows + r, w->rows, min_size(MAX_GROUP, w->rows - r),
                             none);
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
    size_t hd = c->head_dim, q_dim = c->n_heads * hd, kv_dim = c->n_kv_heads * hd, width = q_dim + 2 * kv_dim;
    size_t group = c->n_heads / c->n_kv_heads;
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
        FREE(kt, vt, k, dk, dv, p, dp);
    }
    for (size_t i = 0; i < n; i++) {            /* a rotation's gradient is turned back */
        for (size_t j = 0; j < hd / 2; j++) rotation[i * hd + 2 * j + 1] *= -1;
        for (size_t h = 0; h < c->n_heads + c->n_kv_heads; h++) rope(qkv + i * width + h * hd, rotation + i * hd, hd / 2);
    }
    free(rotation);
}

/* What a layer's backward needs of a sequence's forward: the residual stream before both halves of the layer, [n, dim], and what
 * wqkv and w13 put out. */
typedef struct { const Stream *stream; Gradients *of; float *x[2], *out[2]; size_t at; } Tape;     /* at: tokens it has */

static const int OPERATIONS[6] = {NORM, WQKV, WO, NORM, W13, W2};       /* of a layer's tensors */

static void watch_tape(void *watcher, int operation, const float *out, const float *x, size_t first, size_t n) {
    Tape *tape = (Tape *)watcher;
    const Layer *w = &tape->stream->layer;
    size_t half = operation == W13, dim = tape->stream->model.c.dim, rows = half ? w->w13.rows : w->wqkv.rows;
    size_t at = tape->at + first;
    for (size_t k = 0; k < 6; k++)
        if (OPERATIONS[k] == operation && tape->of[k].in) {
            size_t cols = ((const Matrix *)w + k)->cols, skip = at == 0;
            add_squares(tape->of[k].in, x + skip * cols, cols, n - skip);
        }
    if (operation != WQKV && operation != W13) return;
    memcpy(tape->x[half] + at * dim, tape->stream->state.x + first * dim, n * dim * sizeof(float));
    memcpy(tape->out[half] + at * rows, out, n * rows * sizeof(float));
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
        for (tape.at = 0; tape.at < n; tape.at += CHUNK) forward_stream(s, f + tape.at);
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
    FREE(back, sum, tape.x[0], tape.x[1], tape.out[0], tape.out[1]);
}

/* In place of the logits p [vocab_size] the gradient of minus the log-likelihood of an id drawn from them: softmax, less 1 at that
 * id. */
static void loss_backward(float *p, size_t vocab_size, uint64_t *seed) {
    float max = -INFINITY;
    double sum = 0;
    for (size_t v = 0; v < vocab_size; v++) max = fmaxf(max, p[v]);
    for (size_t v = 0; v < vocab_size; v++) sum += p[v] = fast_exp(p[v] - max);
    double random = uniform(seed) * sum;
    size_t drawn = 0;
    while (drawn + 1 < vocab_size && (random -= p[drawn]) >= 0) drawn++;
    for (size_t v = 0; v < vocab_size; v++) p[v] = (float)(p[v] / sum) - (v == drawn);
}

/* Layer l's piece of the gradients' file, n_tokens * dim numbers, to it or from it; a file beside the new one that has no name, or
 * in the current directory where the new one is no file. Dies if it cannot be written or read. */
static void gradients_io(Calibration *o, bool out, size_t l, float *x) {
    size_t count = o->n_tokens * o->m->c.dim;
    char name[4200];
    snprintf(name, sizeof name, "%.4000s.XXXXXX", temporary[0] ? final_path : "quantize");      /* of what is no file: here */
    if (!o->gradients) {
        int descriptor = mkstemp(name);
        if (descriptor < 0 || !(o->gradients = fdopen(descriptor, "w+b"))) die("%s: cannot be written: %s", name, strerror(errno));
        unlink(name);
    }
    if (fseeko(o->gradients, (off_t)(l * count * sizeof(float)), SEEK_SET) ||
        (out ? fwrite(x, sizeof(float), count, o->gradients) : fread(x, sizeof(float), count, o->gradients)) != count)
        die("%s: the file of gradients beside it cannot be %s: %s", final_path, out ? "written" : "read", strerror(errno));
}

/* For each layer l the gradient of what comes out of it, [n_tokens, dim], as the l-th piece of a file (what came in waits there
 * until then); in all[i], i in the order of the file, squares of what goes through each tensor (the classifier's behind those of
 * the last layer and the final norm, also where it is the embedding); and returned, panels of dim rounded up to 32, the upper
 * triangle of H for the embedding: the sum of g g^T over the gradients g of its rows, and, where it is the classifier too, of
 * |g|^2 x x^T, which are the same units. */
static float *find_gradients(Calibration *o, Gradients *all) {
    const Model *m = o->m;
    Stream *s = &o->original;
    size_t dim = m->c.dim, vocab = m->c.vocab_size, n = round_up(dim, PANEL), last = 6 * m->c.n_layers + 2;
    float *dx = floats(o->n_tokens * dim), *back = floats(CHUNK * dim), *xt = floats(CHUNK * n), *h = floats(n * n);
    double part = 0.5 * o->all / (double)m->c.n_layers;
    uint64_t seed = 1;
    for (size_t l = 0; l < m->c.n_layers; l++) {
        gradients_io(o, true, l, s->x);
        s->layer = m->layers[l];
        advance(s, o->n_tokens);
        progress(true, o->name, o->done += 0.3 * part, o->all);
    }
    enter_classifier(s);
    for (size_t f = 0; f < o->n_tokens; f += CHUNK) {
        forward_stream(s, f);
        for (size_t i = 0; i < CHUNK; i++) loss_backward(s->logits + i * vocab, vocab, &seed);
        product_backward(back, s->logits, &m->wcls, CHUNK);
        add_squares(all[last].in, s->state.xb, dim, CHUNK);
        add_squares(all[last].out, s->logits, vocab, CHUNK);
        if (last == m->c.n_tensors) {   /* the embedding is the classifier too */
            float weights[CHUNK] = {0};
            for (size_t i = 0; i < CHUNK * vocab; i++) weights[i / vocab] += s->logits[i] * s->logits[i];
            transpose(xt, s->state.xb, dim, dim, CHUNK, weights);
            accumulate(h, s->state.xb, dim, dim, xt, n, CHUNK, true);
        }
        norm_backward(dx + f * dim, back, s->state.x, &m->rms_final_weight, CHUNK, m->c.norm_eps);
    }
    s->model.c.n_layers = 1;
    FREE(s->logits);
    s->logits = NULL;
    for (size_t l = m->c.n_layers; l-- > 0;) {
        gradients_io(o, false, l, s->x);
        gradients_io(o, true, l, dx);
        s->layer = m->layers[l];
        layer_backward(s, dx, all + 1 + 6 * l, o->n_tokens);
        progress(true, o->name, o->done += 0.7 * part, o->all);
    }
    for (size_t f = 0; f < o->n_tokens; f += CHUNK) {
        size_t skip = f % SEQUENCE == 0;        /* BOS, see add_gradients() */
        transpose(xt, dx + (f + skip) * dim, dim, dim, CHUNK - skip, NULL);
        accumulate(h, dx + (f + skip) * dim, dim, dim, xt, n, CHUNK - skip, true);
    }
    for (size_t i = 0; i < o->n_tokens; i += SEQUENCE) {
        add_squares(all[0].in, dx + (i + 1) * dim, dim, SEQUENCE - 1);
        for (size_t t = 1; t < SEQUENCE; t++) all[0].out[o->ids[i + t]]++;
    }
    FREE(dx, back, xt);
    return h;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 4. GPTQ                                                                                                           */

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
 * Where a row's scale grows by 1, F falls by C_k = (the sum over k' from k to the group's end of U_kk' code_k') / U_kk; where its
 * offset, -scale * zero, does, by O_k, the same of ones. cc, co, oo, cf, of: sums over k of U_kk^2 times the products of C, O and
 * the term of the loss. With V a row's best turn is judged by the other rows as they were in that turn, so that the last turn,
 * with the best of each, may lose a little more than it promised. */
static void gptq_block(Rounding *q, const float *u, const float *v, size_t p, size_t b) {
    enum { TURNS = 3 };
    size_t n = q->n, nb = q->group, m = q->n_panels * PANEL, first = (p * n + b) * PANEL;
    float left[MAX_GROUP * PANEL] = {0}, below[MAX_GROUP * PANEL] = {0};        /* what later columns, and rows below, ask for */
    float e[MAX_GROUP * PANEL], rows[MAX_GROUP * PANEL];    /* E; what the block's rows below ask for, then the term of the loss */
    float importance[MAX_GROUP] = {0};
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
        for (size_t r = 0; r < PANEL; r++)
            e[k * PANEL + r] = w[k * PANEL + r] + left[k * PANEL + r] / u_kk + below[k * PANEL + r] * inverse_v[r];
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
                float wanted = fmaf(rows[k * PANEL + r], inverse_v[r], sum[r]);
                float code = scale[r] != 0 ? rintf(wanted / scale[r] + zero[r]) : 0;
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
        for (size_t b = 0, at; b < n; b += nb) {
            float *scale = q->scales + (p * n + b) / nb * 2 * PANEL;
            Fit fit;
            at = (p * n + b) * PANEL;
            round_nearest(&fit, q->codes + at, scale, scale + PANEL, q->e + at, importance + b, nb, q->levels);
        }
}

/* The order in which columns are rounded, order[n - 1] first: those with the largest inputs, while all others can still make good
 * their error, but groups stay together, so that the file is what it always is: the largest of the group with the largest sum. */
static void choose_order(size_t *order, const float *h, size_t n, size_t group) {
    float *input = floats(n), *of_group = floats(n / group);
    for (size_t k = 0; k < n; k++) of_group[k / group] += input[k] = *element(h, n, k, k);
    #pragma omp parallel for schedule(static)
    for (size_t k = 0; k < n; k++) {
        size_t rank = 0, g = k / group;
        for (size_t j = 0; j < n; j++) {
            float before = j / group == g ? input[j] : of_group[j / group], own = j / group == g ? input[k] : of_group[g];
            rank += before < own || (before == own && j < k);
        }
        order[rank] = k;
    }
    FREE(input, of_group);
}

/* U [n, n], to be freed, of H with damping * the mean of its diagonal (over the first `cols`) added to the diagonal, ten times as
 * much again until it is positive definite; its columns in the order that is given, or as they are. Columns that hardly ever have
 * an input, and directions that the text happens not to have, must not make good the errors of others without bounds. */
static float *damped_factor(const float *h, size_t n, size_t cols, const size_t *order, double damping) {
    float *u = floats(n * n);
    double mean = 0;
    for (size_t k = 0; k < cols; k++) mean += *element(h, n, k, k) / (double)cols;
    for (;; damping *= 10) {
        #pragma omp parallel for schedule(dynamic)
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i <= j; i++) {
                size_t a = order ? order[i] : i, b = order ? order[j] : j;
                *element(u, n, i, j) = *element(h, n, a < b ? a : b, a < b ? b : a) +
                                       (i == j ? (float)(damping * (mean > 0 ? mean : 1)) : 0);
            }
        if (cholesky(u, n)) return u;
        if (!(damping < 1e9)) die("calibration: an activation or a gradient is infinite or not a number");
    }
}

/* Rounds w to `out`, whose data is filled in, with H and G (or NULL), which are used up: gptq() has F where G was, and needs it
 * wherever there is an A. of: NULL where A = 1. */
static void round_matrix(Matrix *out, const Matrix *w, float *h, float *g, const Gradients *of, bool with_gptq) {
    size_t n = out->n_groups * out->group, *order = (size_t *)allocate(n, sizeof *order, "calibration");
    size_t all = out->n_panels * n * PANEL;
    Rounding q = {n, out->group, out->n_panels, levels_of(out->type), floats(all), g,
                  (uint8_t *)allocate(all, 1, "calibration"), floats(all / out->group * 2)};
    choose_order(order, h, n, q.group);
    float *u = damped_factor(h, n, w->cols, order, IN_DAMPING), *room = floats(n * PANEL);
    load_panels(q.e, w, n, order);
    if (g) {
        for (size_t p = 0; p < q.n_panels; p++) {
            memcpy(room, g + p * n * PANEL, n * PANEL * sizeof(float));
            for (size_t k = 0; k < n; k++) memcpy(g + (p * n + k) * PANEL, room + order[k] * PANEL, PANEL * sizeof(float));
        }
        solve(g, q.n_panels, u, n);
        for (size_t i = 0; i < all; i++) q.e[i] += g[i];
    }
    if (with_gptq && of)
        for (size_t b = 0; b < w->rows; b += OUTPUTS) {
            size_t rows = min_size(OUTPUTS, w->rows - b), m = round_up(rows, PANEL);
            float *v = damped_factor(of->a + b * OUTPUTS, m, rows, NULL, of->damping);
            Rounding part = {n, q.group, m / PANEL, q.levels, q.e + b * n, q.f + b * n,
                             q.codes + b * n, q.scales + b * n / q.group * 2};
            gptq(&part, u, v);
            free(v);
        }
    else if (with_gptq) gptq(&q, u, NULL);
    else {
        for (size_t k = 0; k < n; k++) room[k] = *element(h, n, order[k], order[k]);
        round_panels(&q, room);
    }
    #pragma omp parallel for schedule(static)
    for (size_t p = 0; p < q.n_panels; p++)
        for (size_t b = 0; b < n; b += q.group) {
            uint8_t codes[MAX_GROUP * PANEL] = {0};
            const float *scale = q.scales + (p * n + b) / q.group * 2 * PANEL;
            for (size_t k = b; k < b + q.group; k++)
                if (order[k] < out->cols) memcpy(codes + order[k] % q.group * PANEL, q.codes + (p * n + k) * PANEL, PANEL);
            pack_group((unsigned char *)out->data + p * out->panel_bytes + order[b] / q.group * out->block_bytes, out->type,
                       codes, scale, scale + PANEL, q.group);
        }
    FREE(u, room, h, g, q.e, q.scales, q.codes, order);
}

/* w, whose product is `operation`, as `to` says; its data is to be freed. */
static Matrix quantize_matrix(Calibration *o, const Tensor *to, const Matrix *w, int operation, const Gradients *of) {
    float *h, *g;
    Matrix out = new_matrix(to);
    collect(o, &h, &g, w, operation, out.group, of);
    round_matrix(&out, w, h, g, of, o->gptq);
    o->done += (double)w->rows * (double)w->cols;
    return out;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 5. AWQ: scales of channels                                                                                        */

/* A channel's weights may be multiplied by s if what comes in is divided by it: a large s makes the steps of important weights
 * finer and those of their group coarser. Dividing costs nothing where a norm's weight or a matrix's rows stand before. Among
 * s = importance^(a/2), a from 0 to 1, divided by its geometric mean, this takes what makes the sum over channels of importance
 * times squared error least.
 * importance, s: [cols]. */
static void choose_scales(float *s, const Matrix *w, const float *importance, size_t group, float levels) {
    enum { STEPS = 10 };
    size_t cols = w->cols;
    float *candidate = floats(cols);
    double mean = 0, best = INFINITY;
    for (size_t k = 0; k < cols; k++) mean += importance[k] / (double)cols;
    for (int step = 0; step <= STEPS; step++) {
        double logs = 0;
        for (size_t k = 0; k < cols; k++) {
            double log_s = 0.5 * step / STEPS * log(fmax(importance[k], 1e-6 * mean + 1e-30));
            candidate[k] = (float)log_s;
            logs += log_s / (double)cols;
        }
        for (size_t k = 0; k < cols; k++) candidate[k] = (float)exp(candidate[k] - logs);
        double error = rounding_error(w, group, levels, importance, NULL, candidate);
        if (error < best) { best = error; memcpy(s, candidate, cols * sizeof(float)); }
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

/* The scales of what comes into w, [cols], to be freed. What a channel's error costs is the mean square of what comes in; where
 * GPTQ rounds, U_kk^2, since what others make good costs nothing. */
static float *search_scales(Calibration *o, const Tensor *to, const Matrix *w, int operation) {
    size_t n = round_up(w->cols, to->group), *order = (size_t *)allocate(n, sizeof *order, "calibration");
    float *s = floats(w->cols), *importance = floats(n), *h;
    collect(o, &h, NULL, w, operation, to->group, NULL);
    choose_order(order, h, n, to->group);
    float *u = o->gptq ? damped_factor(h, n, w->cols, order, IN_DAMPING) : NULL;
    for (size_t k = 0; k < n; k++) {
        float u_kk = u ? *element(u, n, k, k) : 0;
        importance[order[k]] = u ? u_kk * u_kk : *element(h, n, order[k], order[k]);
    }
    if (operation == WO) share_scales(importance, &o->m->c);
    choose_scales(s, w, importance, to->group, levels_of((int)to->type));
    FREE(u, h, order, importance);
    return s;
}

/* Multiplies the columns of a layer's four matrices, all FP32, by s[0] to s[3] and divides what brings them their inputs: the
 * layer computes what it did. s[1] must be the same in all query heads of a key head, whose values they share. */
static void fold_scales(Layer *w, const Header *c, float *const s[4]) {
    size_t q_dim = (size_t)c->n_heads * c->head_dim, kv_dim = (size_t)c->n_kv_heads * c->head_dim;
    size_t group = c->n_heads / c->n_kv_heads;
    scale_columns(&w->wqkv, s[0]);
    scale_columns(&w->wo, s[1]);
    scale_columns(&w->w13, s[2]);
    scale_columns(&w->w2, s[3]);
    divide_rows(&w->rms_att_weight, 0, c->dim, s[0]);
    for (size_t h = 0; h < c->n_kv_heads; h++)
        divide_rows(&w->wqkv, q_dim + kv_dim + h * c->head_dim, c->head_dim, s[1] + h * group * c->head_dim);
    divide_rows(&w->rms_ffn_weight, 0, c->dim, s[2]);
    divide_rows(&w->w13, c->hidden_dim, c->hidden_dim, s[3]);
}

static Layer copy_layer(const Layer *from) {
    Layer copy;
    for (size_t k = 0; k < 6; k++) ((Matrix *)&copy)[k] = copy_matrix((const Matrix *)from + k);
    return copy;
}

/* A copy of layer l with its channels scaled, in FP32; to: its six tensors. */
static Layer scaled_layer(Calibration *o, const Tensor *to, size_t l) {
    Layer copy = copy_layer(&o->m->layers[l]);
    float *s[4];
    o->original.layer = o->quantized.layer = copy;
    for (size_t k = 0, n = 0; k < 6; k++)
        if (OPERATIONS[k] != NORM) s[n++] = search_scales(o, &to[k], (Matrix *)&copy + k, OPERATIONS[k]);
    fold_scales(&copy, &o->m->c, s);
    FREE(s[0], s[1], s[2], s[3]);
    return copy;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 6. Types                                                                                                          */

/* Types and groups of the matrices for a file of so many bits a weight: from the one asked for on, again and again the change
 * that saves most loss a byte, of those that still fit. What a type costs a matrix, in nats a token, is half of the mean of
 * (g^T E x)^2, the elements of g and x taken for independent. Says what it chose. */
static void choose_types(const Calibration *o, Header *out, Tensor *to, const Gradients *all) {
    enum { N = 6 };
    static const struct { uint32_t type, group; } CHOICES[N] = {{Q4, 128}, {Q4, 64}, {Q4, 32}, {Q8, 128}, {Q8, 64}, {Q8, 32}};
    double room = o->bits * count_weights(out, to) / 8 - (double)out->file_size, n = (double)o->n_tokens;
    double costs[2] = {0}, shares[N] = {0};                 /* of all, before and after; percent of the weights by choice */
    double (*cost)[N] = (double (*)[N])allocate(out->n_tensors, sizeof *cost, "calibration");
    size_t *chosen = (size_t *)allocate(out->n_tensors, sizeof *chosen, "calibration");       /* index into CHOICES */
    bool tied = out->n_tensors == 6 * out->n_layers + 2;        /* the embedding is the classifier too */
    for (uint64_t i = 0; i < out->n_tensors; i++)
        for (size_t k = 0; k < N && to[i].cols > 1; k++) {
            uint32_t group = tensor_group(CHOICES[k].type, CHOICES[k].group, to[i].cols);
            if (CHOICES[k].type == to[i].type && group == to[i].group) chosen[i] = k;
            for (size_t use = 0; use < (tied && i == 0 ? 2 : 1); use++) {
                const Gradients *of = &all[use ? out->n_tensors : i];
                cost[i][k] += 0.5 / n / n * rounding_error(model_tensor(o->m, i), group, levels_of((int)CHOICES[k].type), of->in,
                                                           of->out, NULL);
            }
        }
    for (uint64_t i = 0; i < out->n_tensors; i++) costs[0] += cost[i][chosen[i]];
    for (;;) {
        double best = 0;
        uint64_t best_i = 0;
        size_t best_k = 0;
        Tensor best_to;
        for (uint64_t i = 0; i < out->n_tensors; i++)
            for (size_t k = chosen[i] + 1; k < N && to[i].cols > 1; k++) {
                Tensor changed = to[i];
                Matrix made;
                changed.type = CHOICES[k].type;
                changed.group = tensor_group(changed.type, CHOICES[k].group, changed.cols);
                matrix_layout(&made, changed.type, changed.group, changed.rows, changed.cols);
                changed.size = made.bytes;
                double bytes = (double)changed.size - (double)to[i].size, saved = cost[i][chosen[i]] - cost[i][k];
                if (bytes <= 0 || bytes > room || saved / bytes <= best) continue;
                best = saved / bytes;
                best_i = i;
                best_k = k;
                best_to = changed;
            }
        if (best == 0) break;
        room -= (double)best_to.size - (double)to[best_i].size;
        to[best_i] = best_to;
        chosen[best_i] = best_k;
    }
    for (uint64_t i = 0; i < out->n_tensors; i++) {
        costs[1] += cost[i][chosen[i]];
        size_t k = 0;                   /* as it is in the file: rows may be too short for the group that was chosen */
        while (to[i].cols > 1 && (CHOICES[k].type != to[i].type || CHOICES[k].group != to[i].group)) k++;
        if (to[i].cols > 1) shares[k] += 100 * (double)to[i].rows * (double)to[i].cols / count_weights(out, to);
    }
    for (size_t k = 0; k < N; k++)
        if (shares[k] > 0)
            fprintf(stderr, "%s in groups of %-3u %5.1f%% of the weights\n", TYPE_NAMES[CHOICES[k].type], CHOICES[k].group,
                    shares[k]);
    fprintf(stderr, "rounded to nearest these would cost about %.4f nats a token, without --bits %.4f\n", costs[1], costs[0]);
    lay_out(out, to, o->m->path);
    FREE(cost, chosen);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 7. A model                                                                                                        */

static void free_matrix(const Matrix *m) { free((void *)m->data); }

/* Layer l, to and `of` its six tensors; both streams go through it. dx: room for [n_tokens, dim]. */
static void calibrate_layer(Calibration *o, const Tensor *to, Gradients *of, size_t l, float *dx) {
    Layer source = o->awq ? scaled_layer(o, to, l) : o->m->layers[l], made = source;
    o->original.layer = o->quantized.layer = source;
    for (size_t k = 0; k < 6; k++) if (OPERATIONS[k] != NORM) open_gradients(&of[k], o->n_tokens, o->gptq);
    gradients_io(o, false, l, dx);
    layer_backward(&o->original, dx, of, o->n_tokens);
    for (size_t k = 0; k < 6; k++) {
        Matrix *w = (Matrix *)&source + k, *q = (Matrix *)&made + k;
        if (OPERATIONS[k] != NORM) {
            *q = quantize_matrix(o, &to[k], w, OPERATIONS[k], &of[k]);
            ((Matrix *)&o->quantized.layer)[k] = *q;
            FREE(of[k].a, of[k].weights);
        }
        write_tensor(o->out, &to[k], q, &o->end);
    }
    advance(&o->original, o->n_tokens);
    advance(&o->quantized, o->n_tokens);
    for (size_t k = 0; k < 6; k++) {
        if (OPERATIONS[k] != NORM) free_matrix((Matrix *)&made + k);
        if (o->awq) free_matrix((Matrix *)&source + k);
    }
}

/* The final norm and, if there is one beside the embedding, the classifier. to: theirs. */
static void calibrate_classifier(Calibration *o, const Tensor *to, bool tied) {
    Matrix norm = o->m->rms_final_weight, wcls = o->m->wcls;
    if (tied) {
        write_tensor(o->out, to, &norm, &o->end);
        return;
    }
    enter_classifier(&o->original);
    enter_classifier(&o->quantized);
    if (o->awq) {
        norm = copy_matrix(&norm);
        wcls = copy_matrix(&wcls);
        float *s = search_scales(o, &to[1], &wcls, CLASSIFIER);
        scale_columns(&wcls, s);
        divide_rows(&norm, 0, norm.rows, s);
        free(s);
        o->original.model.rms_final_weight = o->quantized.model.rms_final_weight = norm;
        o->original.model.wcls = o->quantized.model.wcls = wcls;
    }
    write_tensor(o->out, to, &norm, &o->end);
    Matrix made = quantize_matrix(o, &to[1], &wcls, CLASSIFIER, NULL);
    write_tensor(o->out, &to[1], &made, &o->end);
    free_matrix(&made);
    if (o->awq) { free_matrix(&norm); free_matrix(&wcls); }
}

/* Writes OUT from the file at `path`, its matrices as `type` or better, calibrated. */
static void calibrate(Calibration *o, const char *path, const char *out_path, uint32_t type, uint32_t group) {
    Model m = load_model(path);
    Header out = m.c;
    Tensor *to = (Tensor *)allocate(out.n_tensors, sizeof *to, path);
    Gradients *all = (Gradients *)allocate(out.n_tensors + 1, sizeof *all, path);      /* see find_gradients() */
    double start = now();
    o->m = &m;
    o->name = TYPE_NAMES[type];
    new_table(&out, to, (const Tensor *)(m.map + sizeof(Header)), type, group, path);
    for (uint64_t i = 0; i < out.n_tensors; i++) {
        const Matrix *w = model_tensor(&m, i);
        check_weights(w, path, to[i].name);
        if (i && w->cols > 1) o->all += 2 * (double)w->rows * (double)w->cols;
        all[i].rows = w->rows;
        all[i].in = floats(w->cols);
        all[i].out = floats(w->rows);
    }
    all[out.n_tensors].in = floats(out.dim);
    all[out.n_tensors].out = floats(out.vocab_size);
    if (out.dim == 1 || out.hidden_dim == 1)
        die("%s: a matrix of one column cannot be calibrated", path);
    double bits = 8.0 * (double)out.file_size / count_weights(&out, to);
    if (o->bits > 0 && o->bits < bits - 0.005)  /* two decimals are shown */
        die("--bits %g: as plain %s the file has %.2f already", o->bits, TYPE_NAMES[type], bits);
    encode_text(o);
    o->out = open_output(out_path);
    fprintf(stderr, "%s: %zu tokens to calibrate with, in sequences of %d\n", o->text, o->n_tokens, SEQUENCE);
    start_stream(&o->original, &m, &m.token_embedding, o->ids, o->n_tokens);
    float *h = find_gradients(o, all);
    if (o->bits > 0) choose_types(o, &out, to, all);
    for (uint64_t i = 0; i <= out.n_tensors; i++) {
        FREE(all[i].in, all[i].out);
        all[i].in = all[i].out = NULL;
    }
    o->end = write_head(o->out, &out, to, m.map + m.c.tokenizer_offset);

    Matrix embedding = new_matrix(&to[0]);
    round_matrix(&embedding, &m.token_embedding, h, NULL, NULL, o->gptq);
    write_tensor(o->out, &to[0], &embedding, &o->end);
    start_stream(&o->quantized, &m, &embedding, o->ids, o->n_tokens);
    free_matrix(&embedding);
    float *dx = floats(o->n_tokens * m.c.dim);
    for (size_t l = 0; l < m.c.n_layers; l++) calibrate_layer(o, to + 1 + 6 * l, all + 1 + 6 * l, l, dx);
    calibrate_classifier(o, to + 1 + 6 * m.c.n_layers, out.n_tensors == 2 + 6 * m.c.n_layers);
    close_output(o->out);
    report_file(out_path, &out, to, type, start);
    fclose(o->gradients);
    end_stream(&o->original);
    end_stream(&o->quantized);
    FREE(dx, all, o->ids, to);
    free_model(&m);
}
