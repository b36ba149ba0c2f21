/* steps.c - a checkpoint's steps and this machine's ceilings in turn, in one process.
 *
 *   make build/steps && build/steps MODEL.bin [ROUNDS [LONG]]
 *
 * On a shared machine, whose speed changes from minute to minute, whole programs one after another say more about the minute than
 * about the program. Here a round takes some ten seconds: ceilings (limits.c, whose 2 GiB stay in use), a prompt of 128 tokens,
 * steps of 32, 8 and 1 sequences at position 128, the prompt again, the ceilings again. Prints each round's and the medians over
 * them: tokens a second, and the share of the round's own ceiling: of integer or, for f32 and f16, FP32 operations for 128 and 32
 * tokens, of reading for 8 and 1, a second time by what the checkpoint's own memory reads at, since not all memory of a virtual
 * machine is equally fast. LONG: a prompt of so many tokens too, in forwards of 256 with one of 128 before and after each, and
 * single steps behind it, as shares of the short ones' speed: for 4,096 a minute a round. OMP_NUM_THREADS sets the threads. */
#define RUN_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"      /* of the engine much is not needed here */
#include "../run.c"

enum { INT8, FP32, READ, OWN, PROMPT, BATCH_32, BATCH_8, BATCH_1, LONG_PROMPT, LONG_1, N_FIGURES, MOST_ROUNDS = 99 };
static const char *const FIGURE_NAMES[] = {"int8", "fp32", "reading", "own memory", "prompt", "batch 32", "batch 8", "batch 1",
                                           "long prompt", "batch 1 behind it"};
static float *logits;
static volatile uint64_t sink;          /* takes sums, so that a compiler does not leave them out */

double int8_peak(void), fp32_peak(void), read_bandwidth(void);          /* bench/limits.c */

/* Adds half of what the machine can do now to the figures. */
static void add_ceilings(double *figures) {
    double reading = read_bandwidth();
    if (reading == 0) die("no memory for the 2 GiB that reading is measured with");
    figures[INT8] += int8_peak() / 2;
    figures[FP32] += fp32_peak() / 2;
    figures[READ] += reading / 2;
}

/* Tokens a second of `times` forwards of n tokens: of n sequences at position pos on, or, of one, n neighbours. */
static double speed(State *s, size_t n, bool neighbours, size_t pos, size_t times) {
    static Token tokens[CHUNK];
    double start = now();
    for (size_t i = 0; i < times; i++) {
        for (size_t j = 0; j < n; j++) {
            int id = (int)(j * 37 % s->model->c.vocab_size);
            Token t = {id, neighbours ? pos + j : pos + i, neighbours ? 0 : j, !neighbours || j == n - 1};
            tokens[j] = t;
        }
        forward(s, tokens, n, logits);
    }
    return (double)(n * times) / (now() - start);
}

/* GB/s at which all threads read 1 GiB of the checkpoint, or all of it, each in four places. */
static double own_memory(const Model *m) {
    typedef uint64_t Line __attribute__((vector_size(64)));
    uint64_t total = 0;
    size_t n = min_size((size_t)m->c.file_size, (size_t)1 << 30) / 64 / 4 / (size_t)omp_get_max_threads();
    double start = now();
    #pragma omp parallel for schedule(static) reduction(+:total)
    for (int thread = 0; thread < omp_get_max_threads(); thread++) {
        const Line *p = (const Line *)m->map + (size_t)thread * 4 * n;
        Line sum[4] = {{0}};
        for (size_t i = 0; i < n; i++)
            for (size_t k = 0; k < 4; k++) sum[k] += p[k * n + i];
        for (size_t k = 0; k < 4; k++) total += sum[k][0];
    }
    sink = total;
    return 256e-9 * (double)(n * (size_t)omp_get_max_threads()) / (now() - start);
}

static int by_size(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

/* f: a round's figures, or medians; bytes: what a step at batch 1 reads; operations: of a token's products in the layers. */
static void print_figures(const char *name, const double *f, double bytes, double operations, bool numbers) {
    double peak = numbers ? f[FP32] : f[INT8];
    printf("%-8s", name);
    for (int i = INT8; i < N_FIGURES; i++) {
        if (f[i] == 0) continue;
        printf("%s%s %.*f", i ? ", " : "", FIGURE_NAMES[i], i < READ ? 0 : i == BATCH_1 || i == LONG_1 ? 2 : 1, f[i]);
        if (i == PROMPT || i == BATCH_32) printf(" (%.0f%%)", 1e-7 * f[i] * operations / peak);
        if (i == BATCH_8) printf(" (%.0f%%)", 1e-7 * f[i] / 8 * bytes / f[READ]);
        if (i == BATCH_1) printf(" (%.0f%%, own %.0f%%)", 1e-7 * f[i] * bytes / f[READ], 1e-7 * f[i] * bytes / f[OWN]);
        if (i == LONG_PROMPT) printf(" (%.1f%%)", 100 * f[i] / f[PROMPT]);
        if (i == LONG_1) printf(" (%.1f%%)", 100 * f[i] / f[BATCH_1]);
    }
    printf("\n");
    flush_stdout();
}

int main(int argc, char **argv) {
    program = "steps";
    prepare_process(argv);
    size_t rounds = argc > 2 ? strtoul(argv[2], NULL, 10) : 5, length = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
    if (argc < 2 || argc > 4 || rounds < 1 || rounds > MOST_ROUNDS || length > 65536 || length % CHUNK || (argc > 3 && !length))
        return fprintf(stderr, "usage: build/steps MODEL.bin [ROUNDS, up to 99 [LONG, a multiple of 256 up to 65536]]\n"), 2;
    Model m = load_model(argv[1]);
    State s = new_state(&m, 32, 256, CHUNK), l = new_state(&m, 1, max_size(length, CHUNK) + 16, CHUNK);
    bool numbers = m.layers[0].wqkv.type < Q8;
    double all[MOST_ROUNDS][N_FIGURES] = {{0}}, median[N_FIGURES], column[MOST_ROUNDS];
    logits = (float *)allocate(32 * (size_t)m.c.vocab_size, sizeof(float), m.path);
    memset(s.keys, 1, s.kv_bytes);                              /* small numbers: so that there is memory, not one page of zeros */
    memset(l.keys, 1, l.kv_bytes);
    speed(&s, 128, true, 0, 1);                                 /* the first ones wait for the file, */
    speed(&s, 32, false, 128, 1);                               /* and for memory */
    speed(&s, 1, false, 128, 1);
    double bytes = s.bytes, operations = 0;
    memset(s.profile, 0, sizeof s.profile);
    speed(&s, 1, false, 128, 1);
    bytes = s.bytes - bytes;
    for (int i = 0; i < N_OPERATIONS; i++) if (i != ATTENTION && i != CLASSIFIER) operations += s.profile[i].operations;
    for (size_t r = 0; r < rounds; r++) {
        double *f = all[r], long_seconds = 0, short_seconds = 0;
        add_ceilings(f);
        double before = speed(&s, 128, true, 0, 1);
        f[BATCH_32] = speed(&s, 32, false, 128, 2);
        f[BATCH_8] = speed(&s, 8, false, 128, 4);
        f[BATCH_1] = speed(&s, 1, false, 128, 6);
        f[OWN] = own_memory(&m);
        f[PROMPT] = 2 / (1 / before + 1 / speed(&s, 128, true, 0, 1));
        for (size_t pos = 0; pos < length; pos += CHUNK) {
            short_seconds += 128 / speed(&s, 128, true, 0, 1);
            long_seconds += CHUNK / speed(&l, CHUNK, true, pos, 1);
            short_seconds += 128 / speed(&s, 128, true, 0, 1);
        }
        if (length) {
            f[LONG_PROMPT] = (double)length / long_seconds;
            f[PROMPT] = (double)length / short_seconds;
            f[LONG_1] = speed(&l, 1, false, length, 6);
            f[BATCH_1] = 2 / (1 / f[BATCH_1] + 1 / speed(&s, 1, false, 128, 6));
        }
        add_ceilings(f);
        char name[32];
        snprintf(name, sizeof name, "%zu", r + 1);
        print_figures(name, f, bytes, operations, numbers);
    }
    for (int i = 0; i < N_FIGURES; i++) {
        for (size_t r = 0; r < rounds; r++) column[r] = all[r][i];
        qsort(column, rounds, sizeof *column, by_size);
        median[i] = (column[(rounds - 1) / 2] + column[rounds / 2]) / 2;
    }
    print_figures("median", median, bytes, operations, numbers);
    free_state(&s);
    free_state(&l);
    free_model(&m);
    free(logits);
    return 0;
}
