/* report.h - what run prints about a run, and what it measures of a model.
 *
 *   1. Reports           text files in, files out that are whole or not there, JSON, statistics, time by operation
 *   2. Evaluation        perplexity, divergence from another model, multiple choice: -m perplexity, -m score
 *
 * Included by run.c, between the batch and the modes. */

/* ------------------------------------------------------------------------------------------------------------------
 * 1. Reports                                                                                                        */

/* Reads a file to its end; dies on errors. */
static Text read_stream(FILE *f, const char *path) {
    Text t = {NULL, 0, 0};
    char buffer[65536];
    size_t n;
    if (!f) die("%s: %s", path, strerror(errno));
    append(&t, "", 0);
    while ((n = fread(buffer, 1, sizeof buffer, f)) > 0) append(&t, buffer, n);
    if (ferror(f)) die("%s: cannot be read: %s", path, strerror(errno));
    if (f != stdin) fclose(f);
    return t;
}

static Text read_file(const char *path) { return read_stream(fopen(path, "rb"), path); }

/* The next line of a stream without its end, false at the end of the stream. `line` is reused. */
static bool read_line(FILE *f, Text *line) {
    ssize_t n = getline(&line->text, &line->room, f);
    line->length = n < 0 ? 0 : (size_t)n;
    if (line->length && line->text[line->length - 1] == '\n') line->length--;
    if (line->length && line->text[line->length - 1] == '\r') line->length--;
    return n >= 0;
}

static char final_path[4096];           /* what `temporary` becomes */

/* Opens a file for writing under a temporary name; close_output() gives it its name, so that a file of that name is
 * always whole. What is no file (a pipe, /dev/stdout) is written as it is. Both die on errors. */
static FILE *open_output(const char *path) {
    struct stat st;
    bool exists = stat(path, &st) == 0, plain = path[0] && (!exists || S_ISREG(st.st_mode));
    char *real = exists ? realpath(path, NULL) : NULL;          /* a link's target is replaced, not the link */
    int n = snprintf(final_path, sizeof final_path, "%s", real ? real : path);
    if (n > (int)sizeof final_path - 32) die("%s: the name is too long", path);
    free(real);
    FILE *f = NULL;
    if (plain) snprintf(temporary, sizeof temporary, "%.4000s.tmp.%d", final_path, (int)getpid());
    if (path[0]) f = fopen(plain ? temporary : path, "wb");
    if (!f) { temporary[0] = 0; die("%s: cannot be written: %s", path, strerror(errno)); }
    return f;
}

static void close_output(FILE *f) {
    errno = 0;
    bool bad = ferror(f);
    if (fclose(f) != 0 || bad) die("%s: cannot be written: %s", final_path, strerror(errno ? errno : ENOSPC));
    if (temporary[0] && rename(temporary, final_path) != 0) die("%s: cannot be written: %s", final_path, strerror(errno));
    temporary[0] = 0;
}

static void json_string(FILE *f, const char *bytes, size_t n) {
    Text t = {NULL, 0, 0};
    append(&t, "", 0);
    append_repaired(&t, bytes, n);
    fputc('"', f);
    for (size_t i = 0; i < t.length; i++) {
        unsigned char c = (unsigned char)t.text[i];
        if (c == '"' || c == '\\') fprintf(f, "\\%c", c);
        else if (c < 0x20 || c == 0x7f) fprintf(f, "\\u%04x", c);
        else fputc(c, f);
    }
    fputc('"', f);
    free(t.text);
}

static void json_number(FILE *f, const char *name, double value) {
    fprintf(f, ",\n  \"%s\": ", name);
    if (isfinite(value)) fprintf(f, value == floor(value) && value < 1e15 ? "%.0f" : "%.9g", value);
    else fprintf(f, "null");
}

/* `"text_name": "text", "ids_name": [ids]` of ids[from .. to): the text that they add to that of the ids before them, so that
 * prompt and answer put together are the text of all. */
static void json_ids(FILE *f, const Tokenizer *t, const char *text_name, const char *ids_name, const int *ids, size_t from, size_t to) {
    Decoder d;
    memset(&d, 0, sizeof d);
    append(&d.text, "", 0);
    for (size_t i = 0; i < to; i++) {
        if (i == from) { decode_pending(&d, true); d.text.length = 0; }
        decode(&d, t, ids[i]);
    }
    decode_pending(&d, true);
    fprintf(f, "\"%s\": ", text_name);
    json_string(f, d.text.text, from < to ? d.text.length : 0);
    free(d.text.text);
    fprintf(f, ", \"%s\": [", ids_name);
    for (size_t i = from; i < to; i++) fprintf(f, "%s%d", i > from ? ", " : "", ids[i]);
    fputc(']', f);
}

static void json_head(FILE *f, const State *s, const Options *o) {
    const Header *c = &s->model->c;
    fprintf(f, "{\n  \"model\": ");
    json_string(f, c->name, strlen(c->name));
    fprintf(f, ",\n  \"backend\": \"%s\",\n  \"dtype\": \"%s\",\n  \"kv_dtype\": \"%s\"", s->model->backend->name,
            TYPE_NAMES[s->model->layers[0].wqkv.type], TYPE_NAMES[s->model->kv_type]);
    json_number(f, "threads", (double)o->threads);
}

/* Prints the table of -P: where the time of all measured passes went. */
static void report_profile(const State *s) {
    double total = 0;
    for (int i = 0; i < N_OPERATIONS; i++) total += s->profile[i].seconds;
    fprintf(stderr, "\n%-18s %10s %7s %9s %8s\n", "operation", "seconds", "share", "GOP/s", "GB/s");
    for (int i = 0; i < N_OPERATIONS; i++) {
        const Profile *p = &s->profile[i];
        fprintf(stderr, "%-18s %10.4f %6.1f%%", OPERATION_NAMES[i], p->seconds, total > 0 ? 100 * p->seconds / total : 0);
        if (p->operations > 0 && p->seconds > 0)
            fprintf(stderr, " %9.1f %8.2f", p->operations / p->seconds / 1e9, p->bytes / p->seconds / 1e9);
        fputc('\n', stderr);
    }
}

/* Prints the statistics of the measured passes to stderr and, with -o, as JSON. Returns whether the target is met. */
static bool report(const State *s, const Sequence *sequences, size_t n_sequences, Statistics *st, const Options *o) {
    const Model *m = s->model;
    const Pass *p = &st->pass;
    double peak = m->backend->peak(s);
    double prefill = quantile(&st->prefill, 0.5), decoding = quantile(&st->decode, 0.5), total = quantile(&st->total, 0.5);
    double prefill_tok_s = prefill > 0 ? (double)p->prompt_tokens / prefill : 0;
    double decode_tok_s = decoding > 0 ? (double)p->decode_tokens / decoding : 0;
    double total_tok_s = total > 0 ? (double)(p->prompt_tokens + p->generated_tokens) / total : 0;
    double bandwidth = p->decode_seconds > 0 ? p->decode_bytes / p->decode_seconds / 1e9 : 0;
    double ttft = 1e3 * quantile(&st->ttft, 0.5), ttft_95 = 1e3 * quantile(&st->ttft, 0.95), itl_50 = 1e3 * quantile(&st->itl, 0.5), itl_95 = 1e3 * quantile(&st->itl, 0.95);
    bool met = o->target < 0 || total_tok_s >= o->target;

    if (!o->quiet) {
        const Matrix *w = &m->layers[0].wqkv;
        fprintf(stderr, "\nmodel    %s, %s", m->c.name, TYPE_NAMES[w->type]);
        if (w->type >= Q8) fprintf(stderr, " in groups of %zu", w->group);
        fprintf(stderr, "; %s, %zu thread%s; batch %zu, seed %zu\n", m->backend->name, o->threads, o->threads == 1 ? "" : "s", s->n_slots, o->seed);
        fprintf(stderr, "prefill  %zu tokens in %.3f s: %.1f tok/s, the first token of a sequence after %.1f ms\n",
                p->prompt_tokens, prefill, prefill_tok_s, ttft);
        fprintf(stderr, "decode   %zu tokens in %.3f s: %.1f tok/s, %.1f ms between tokens (95%% under %.1f), reading %.1f GB/s\n",
                p->decode_tokens, decoding, decode_tok_s, itl_50, itl_95, bandwidth);
        fprintf(stderr, "total    %zu tokens in %.3f s: %.1f tok/s in and out",
                p->prompt_tokens + p->generated_tokens, total, total_tok_s);
        if (st->total.n > 1)
            fprintf(stderr, " (median of %zu passes, %.3f to %.3f s)", st->total.n, quantile(&st->total, 0), quantile(&st->total, 1));
        fprintf(stderr, "\nmemory   weights %.1f MB, KV cache %.1f MB, peak %.1f MB\n",
                (double)m->c.file_size / 1e6, (double)s->kv_bytes / 1e6, peak / 1e6);
    }
    if (o->target >= 0) fprintf(stderr, "%s: %.1f tok/s, target %.1f\n", met ? "PASS" : "FAIL", total_tok_s, o->target);
    if (o->profile) report_profile(s);
    if (!o->json) return met;

    FILE *f = o->json;
    const struct { const char *name; double value; } numbers[] = {
        {"batch", (double)s->n_slots}, {"prompt_tokens", (double)p->prompt_tokens},
        {"generated_tokens", (double)p->generated_tokens}, {"prefill_seconds", prefill}, {"decode_seconds", decoding},
        {"total_seconds", total}, {"total_seconds_min", quantile(&st->total, 0)}, {"total_seconds_max", quantile(&st->total, 1)},
        {"prefill_tok_s", prefill_tok_s}, {"decode_tok_s", decode_tok_s}, {"total_tok_s", total_tok_s}, {"ttft_ms", ttft}, {"ttft_ms_p95", ttft_95},
        {"itl_ms_p50", itl_50}, {"itl_ms_p95", itl_95}, {"weights_bytes", (double)m->c.file_size},
        {"kv_bytes", (double)s->kv_bytes}, {"peak_bytes", peak}, {"bandwidth_gb_s", bandwidth},
        {"target_tok_s", o->target >= 0 ? o->target : NAN}};
    json_head(f, s, o);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) json_number(f, numbers[i].name, numbers[i].value);
    fprintf(f, ",\n  \"seed\": %zu,\n  \"pass\": %s,\n  \"sequences\": [", o->seed, o->target < 0 ? "null" : met ? "true" : "false");
    for (size_t i = 0; i < n_sequences; i++) {
        const Sequence *q = &sequences[i];
        fprintf(f, "%s\n    {", i ? "," : "");
        json_ids(f, &m->tokenizer, "prompt", "prompt_ids", q->ids, 0, q->n_prompt);
        fprintf(f, ", ");
        json_ids(f, &m->tokenizer, "text", "ids", q->ids, q->n_prompt, q->n_ids);
        fprintf(f, ", \"finish\": \"%s\"}", q->finish);
    }
    fprintf(f, "\n  ]\n}\n");
    close_output(f);
    return met;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. Evaluation                                                                                                     */

/* log(sum(e^logits)), in FP64. */
static double log_sum_exp(const float *logits, size_t n) {
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) max = logits[i] > max ? logits[i] : max;
    for (size_t i = 0; i < n; i++) sum += exp(logits[i] - max);
    return max + log(sum);
}

/* The Kullback-Leibler divergence of softmax(p) from softmax(q), in nats; *same: whether both find the same id most
 * probable. p, q: logits [n], log_p: log_sum_exp of p. */
static double divergence(const float *p, double log_p, const float *q, size_t n, bool *same) {
    double log_q = log_sum_exp(q, n), sum = 0;
    size_t top_p = 0, top_q = 0;
    for (size_t i = 0; i < n; i++) {
        sum += exp(q[i] - log_q) * ((q[i] - log_q) - (p[i] - log_p));
        if (p[i] > p[top_p]) top_p = i;
        if (q[i] > q[top_q]) top_q = i;
    }
    *same = top_p == top_q;
    return sum;
}

/* The mean of the samples and its standard error. */
static void mean_and_error(const Samples *s, double *mean, double *error) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < s->n; i++) sum += s->values[i];
    *mean = sum / (double)s->n;
    for (size_t i = 0; i < s->n; i++) squares += (s->values[i] - *mean) * (s->values[i] - *mean);
    *error = s->n > 1 ? sqrt(squares / (double)(s->n - 1) / (double)s->n) : 0;
}

static void check_same_pieces(const Model *a, const Model *b) {
    const Tokenizer *x = &a->tokenizer, *y = &b->tokenizer;
    bool same = a->c.vocab_size == b->c.vocab_size && x->n_pieces == y->n_pieces;
    for (size_t i = 0; same && i < x->n_pieces; i++)
        same = x->pieces[i].length == y->pieces[i].length && !memcmp(x->pieces[i].text, y->pieces[i].text, x->pieces[i].length);
    if (!same) die("%s: its vocabulary of %zu pieces is not %s's of %zu", b->path, y->n_pieces, a->path, x->n_pieces);
}

/* Perplexity of a text: it is encoded whole, without BOS, and cut in windows of context - 1 ids; each is a sequence of
 * its own that starts with BOS, and every id of it, from --skip on, is scored. The windows run as one stream: id f
 * stands in window f / span and is predicted at position f % span, from BOS or the id before it. --against: the same
 * through a second model, and the divergence of this model's distributions from that one's. */
static bool perplexity_mode(const Model *m, const Options *o) {
    Text text = read_file(o->file);
    size_t n_ids, context = o->context ? o->context : 512, vocab = m->c.vocab_size, n_same = 0;
    int *ids = encode(&m->tokenizer, text.text, text.length, &n_ids);
    if (m->tokenizer.bos < 0) die("%s: the tokenizer has no BOS, which perplexity needs", m->path);
    if (!n_ids) die("%s: the text is empty", o->file);
    size_t span = min_size(context - 1, n_ids), n_slots = min_size(CHUNK / span + 2, (n_ids + span - 1) / span);
    if (o->skip >= span) die("%s: --skip %zu leaves nothing to score", o->file, o->skip);

    Model models[2];
    State states[2];
    float *logits[2];
    size_t n_models = o->against ? 2 : 1;
    models[0] = *m;
    if (o->against) {
        models[1] = load_model(o->against);
        check_same_pieces(m, &models[1]);
    }
    for (size_t k = 0; k < n_models; k++) {
        states[k] = new_state(&models[k], n_slots, span, CHUNK);
        states[k].profiled = o->profile;
        logits[k] = (float *)allocate(CHUNK * vocab, sizeof(float), "logits");
    }
    Token tokens[CHUNK];
    int target[CHUNK];
    bool same[CHUNK];
    double nll[CHUNK], kl[CHUNK], start = now();
    Samples nlls = {NULL, 0, 0}, kls = {NULL, 0, 0};
    for (size_t f = 0; f < n_ids && !interrupted; f += CHUNK) {
        size_t n = min_size(CHUNK, n_ids - f), n_want = 0;
        for (size_t i = 0; i < n; i++) {
            size_t pos = (f + i) % span;
            Token token = {pos ? ids[f + i - 1] : m->tokenizer.bos, pos, (f + i) / span % n_slots, pos >= o->skip};
            tokens[i] = token;
            if (token.want) target[n_want++] = ids[f + i];
        }
        for (size_t k = 0; k < n_models; k++) m->backend->forward(&states[k], tokens, n, logits[k]);
        #pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n_want; i++) {
            const float *p = logits[0] + i * vocab;
            double log_p = log_sum_exp(p, vocab);
            nll[i] = log_p - p[target[i]];
            if (o->against) kl[i] = divergence(p, log_p, logits[1] + i * vocab, vocab, &same[i]);
        }
        for (size_t i = 0; i < n_want; i++) {
            add_sample(&nlls, nll[i]);
            if (o->against) { add_sample(&kls, kl[i]); n_same += same[i]; }
        }
        progress(!o->quiet, "scoring", (double)(f + n), (double)n_ids);
    }
    if (interrupted) die("interrupted after %zu of %zu tokens", nlls.n, n_ids);
    double mean, error, kl_mean = 0, kl_error = 0, same_top = (double)n_same / (double)nlls.n, kl_p99 = 0;
    mean_and_error(&nlls, &mean, &error);
    if (o->against) { mean_and_error(&kls, &kl_mean, &kl_error); kl_p99 = quantile(&kls, 0.99); }
    printf("ppl %.4f +- %.4f  nll %.6f  tokens %zu  ctx %zu", exp(mean), exp(mean) * error, mean, nlls.n, context);
    if (o->against) printf("  kl %.5f +- %.5f  kl_p99 %.4g  same_top %.1f%%", kl_mean, kl_error, kl_p99, 100 * same_top);
    putchar('\n');
    if (!o->quiet) fprintf(stderr, "%.1f tok/s\n", (double)n_ids / (now() - start));
    if (o->profile) report_profile(&states[0]);
    if (o->json) {
        const struct { const char *name; double value; } numbers[] = {
            {"ppl", exp(mean)}, {"ppl_error", exp(mean) * error}, {"nll", mean}, {"tokens", (double)nlls.n},
            {"ctx", (double)context}, {"kl", kl_mean}, {"kl_error", kl_error}, {"kl_p99", kl_p99}, {"same_top", same_top}};
        json_head(o->json, &states[0], o);
        for (size_t i = 0; i < (o->against ? 9 : 5); i++) json_number(o->json, numbers[i].name, numbers[i].value);
        fprintf(o->json, "\n}\n");
        close_output(o->json);
    }
    for (size_t k = 0; k < n_models; k++) { free_state(&states[k]); free(logits[k]); }
    if (o->against) free_model(&models[1]);
    free(text.text);
    free(ids);
    free(nlls.values);
    free(kls.values);
    return true;
}

/* The sum of log p(id | the ids before it) over ids[from .. to), a sequence of its own. logits: room for CHUNK tokens'. */
static double log_likelihood(State *s, const int *ids, size_t from, size_t to, float *logits) {
    size_t vocab = s->model->c.vocab_size;
    Token tokens[CHUNK];
    double sum = 0;
    for (size_t f = 0; f + 1 < to; f += CHUNK) {        /* the last id is predicted and predicts nothing */
        size_t n = min_size(CHUNK, to - 1 - f), n_want = 0;
        for (size_t i = 0; i < n; i++) {
            Token token = {ids[f + i], f + i, 0, f + i + 1 >= from};
            tokens[i] = token;
        }
        s->model->backend->forward(s, tokens, n, logits);
        for (size_t i = 0; i < n; i++)
            if (tokens[i].want) {
                const float *p = logits + n_want++ * vocab;
                sum += p[ids[f + i + 1]] - log_sum_exp(p, vocab);
            }
    }
    return sum;
}

/* Multiple choice: each line of a file is a context, choices, and the answer's index from 0, with tabs between them. Of the choices, each put
 * after the context and a space, the one with the highest log-likelihood is the model's answer; or, normalised, with the
 * highest for each byte. One line: `accuracy 51.0% +- 5.0%  normalised 53.0% +- 5.0%  items 100`. */
static bool score_mode(const Model *m, const Options *o) {
    Text text = read_file(o->file);
    if (memchr(text.text, 0, text.length)) die("%s: has a byte of value 0, which no text has", o->file);
    const Tokenizer *t = &m->tokenizer;
    size_t n_items = 0, n_right[2] = {0, 0}, line_number = 0, longest = o->context ? o->context : 4096;
    State s = new_state(m, 1, longest, CHUNK);
    float *logits = (float *)allocate(CHUNK * m->c.vocab_size, sizeof(float), "logits");
    if (t->bos < 0) die("%s: the tokenizer has no BOS, which scoring needs", m->path);
    s.profiled = o->profile;
    for (char *line = text.text, *next; *line && !interrupted; line = next) {
        char *end = line + strcspn(line, "\n"), *fields[34];
        size_t n = 1, best[2] = {0, 0};
        double scores[2][32];
        next = *end ? end + 1 : end;
        *end = 0;
        if (end > line && end[-1] == '\r') end[-1] = 0;
        line_number++;
        if (!*line) continue;
        fields[0] = line;
        for (char *c = line; *c && n <= 34; c++) if (*c == '\t') { *c = 0; if (n < 34) fields[n] = c + 1; n++; }
        if (n < 4 || n > 34) die("%s: line %zu: a context, 2 to 32 choices and the answer's index are wanted, with tabs between them", o->file, line_number);
        char *rest;
        unsigned long answer = strtoul(fields[n - 1], &rest, 10);
        if (rest == fields[n - 1] || *rest || answer >= n - 2)
            die("%s: line %zu: the answer is '%.40s', not an index from 0 to %zu", o->file, line_number, fields[n - 1], n - 3);
        for (size_t k = 0; k < n - 2; k++) {
            Sequence q;
            Text whole = {NULL, 0, 0};
            size_t n_context, from = 0;
            int *context = encode(t, fields[0], strlen(fields[0]), &n_context);
            memset(&q, 0, sizeof q);
            append(&whole, fields[0], strlen(fields[0]));
            append(&whole, " ", 1);
            append(&whole, fields[k + 1], strlen(fields[k + 1]));
            push_id(&q, t->bos);
            push_text(&q, t, whole.text, whole.length);
            while (from < n_context && from + 2 < q.n_ids && q.ids[from + 1] == context[from]) from++;
            if (q.n_ids > longest) die("%s: line %zu: %zu tokens do not fit in a context of %zu: raise -c", o->file, line_number, q.n_ids, longest);
            scores[0][k] = log_likelihood(&s, q.ids, from + 1, q.n_ids, logits);
            scores[1][k] = scores[0][k] / (double)(strlen(fields[k + 1]) + 1);
            for (int way = 0; way < 2; way++) if (scores[way][k] > scores[way][best[way]]) best[way] = k;
            free(context);
            free(whole.text);
            free(q.ids);
        }
        n_items++;
        for (int way = 0; way < 2; way++) n_right[way] += best[way] == answer;
        progress(!o->quiet, "scoring", (double)(next - text.text), (double)text.length);
    }
    if (interrupted) die("interrupted after %zu items", n_items);
    if (!n_items) die("%s: holds no items", o->file);
    double share[2], error[2];
    for (int way = 0; way < 2; way++) {
        share[way] = (double)n_right[way] / (double)n_items;
        error[way] = n_items > 1 ? sqrt(share[way] * (1 - share[way]) / (double)(n_items - 1)) : 0;
    }
    printf("accuracy %.1f%% +- %.1f%%  normalised %.1f%% +- %.1f%%  items %zu\n", 100 * share[0], 100 * error[0], 100 * share[1], 100 * error[1], n_items);
    if (o->profile) report_profile(&s);
    if (o->json) {
        json_head(o->json, &s, o);
        json_number(o->json, "items", (double)n_items);
        json_number(o->json, "accuracy", share[0]);
        json_number(o->json, "accuracy_error", error[0]);
        json_number(o->json, "accuracy_norm", share[1]);
        json_number(o->json, "accuracy_norm_error", error[1]);
        fprintf(o->json, "\n}\n");
        close_output(o->json);
    }
    free_state(&s);
    free(logits);
    free(text.text);
    return true;
}
