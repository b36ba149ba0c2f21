/* model.h - a checkpoint and its tokenizer: what run.c, quantize.c and run_cuda.cu know of a model before they run it.
 *
 *   1. The file          a checkpoint is mapped, checked, and used as it lies
 *   2. The tokenizer     text to ids and back
 *   3. Both at once
 *
 * C11 that is also C++17. One file includes it once, so that all of it is static. */
#ifndef MODEL_H
#define MODEL_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE       /* mmap, and in run.c sigaction and the like, beside ISO C */
#endif
#include <assert.h>       /* static_assert */
#include <errno.h>
#include <fcntl.h>        /* open */
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>     /* mmap */
#include <sys/stat.h>     /* fstat */
#include <unistd.h>       /* close, unlink */

static const char *program = "run";     /* stands before every message */
static char temporary[4096];            /* a file being written, removed if the program fails; "" = none */

/* Prints "run: ", the message and `end` as one line, whatever names and arguments hold. */
static void complain(const char *format, va_list args, const char *end) {
    char line[8192];
    vsnprintf(line, sizeof line, format, args);
    for (char *c = line; *c; c++) if ((unsigned char)*c < ' ' || *c == 0x7f) *c = '?';
    fflush(stdout);
    fprintf(stderr, "%s: %s%s\n", program, line, end);
}

/* A line, and the end of the program with exit status 1. Only loading, the command line and what talks to files call it; the
 * mathematics never fails. */
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args, "");
    exit(1);
}

static void remove_temporary(void) { if (temporary[0]) unlink(temporary); }     /* at exit */

static_assert(sizeof(size_t) == 8, "sizes are computed in 64 bits");

/* Zeroed memory for n elements of `size` bytes, aligned to 128 (two cache lines), and 64 bytes more, so that
 * no size is 0; dies if there is none. */
static void *allocate(size_t n, size_t size, const char *what) {
    size_t bytes;
    void *p = NULL;
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX / 2 ||
        posix_memalign(&p, 128, bytes + 64) != 0)
        die("%s: no memory for %zu x %zu bytes", what, n, size);
    return memset(p, 0, bytes + 64);
}

/* Makes room for element n of a growing array of *room elements; returns where it lies now. Dies if there is no memory. */
static void *grow(void *array, size_t n, size_t *room, size_t size) {
    if (n < *room) return array;
    *room = 2 * n + 64;
    array = realloc(array, *room * size);
    if (!array) die("no memory for %zu x %zu bytes", *room, size);
    return array;
}

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* ------------------------------------------------------------------------------------------------------------------
 * 1. The file (FORMAT.md)                                                                                           */

enum { F32 = 1, F16 = 2, Q8 = 3, Q4 = 4, NF4 = 5, Q16 = 6 };      /* Q16: of KV caches only; from Q8 on codes with a scale */
static const char *const TYPE_NAMES[] = {"?", "f32", "f16", "q8", "q4", "nf4", "q16"};
enum { PANEL = 32, MAX_GROUP = 128, BLOCK = 64, MAX_HEAD_DIM = 512 };       /* BLOCK: tokens that a product takes at once */

typedef struct {
    char     magic[8];                  /* "mistralc" */
    uint32_t version, n_tensors;
    uint64_t file_size, tokenizer_offset, tokenizer_size;
    uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size;
    uint32_t window;                    /* positions a token attends to, itself included; 0: all */
    uint32_t max_positions;
    float    norm_eps;
    double   rope_theta;
    uint32_t chat_template;             /* 0 none, 1 v1, 2 v3 */
    char     name[68];
    uint8_t  zeros[96];
} Header;
static_assert(sizeof(Header) == 256, "the header's layout is the file's");

typedef struct {
    char     name[48];
    uint32_t type, group;
    uint64_t rows, cols, offset, size;
    uint8_t  zeros[8];
} Tensor;
static_assert(sizeof(Tensor) == 96, "the table's layout is the file's");

/* A matrix as it lies in the file, [rows, cols]:
 *
 *              group 0     group 1
 *            +-----------+-----------+--
 *   panel 0  | block     | block     |       32 rows; a block of q8, q4 or nf4: 32 scales, 32 zeros, 32 x group codes,
 *            +-----------+-----------+--     a weight being scale * (code - zero)
 *   panel 1  | block     | block     |       f32 and f16 have neither scales nor groups; here they count as blocks of
 *            +-----------+-----------+--     128 columns, which divides a long sum
 *
 * Within a block, behind scales and zeros where it has some:
 *   f32, f16   [column][32 rows]
 *   q8         [column / 4][32 rows][4 columns], a byte each
 *   q4, nf4    [column / 4][16 rows][4 columns], a byte for row r, in its low half, and row r + 16 */
typedef struct {
    int    type;
    size_t rows, cols;                  /* [output, input], without padding */
    size_t group, n_groups, n_panels;
    size_t block_bytes, panel_bytes, bytes;
    const unsigned char *data;          /* panel p, group g: data + p * panel_bytes + g * block_bytes */
} Matrix;

typedef struct {                        /* six matrices, in the file's order */
    Matrix rms_att_weight;              /* [dim, 1] */
    Matrix wqkv;                        /* [(n_heads + 2 n_kv_heads) head_dim, dim] */
    Matrix wo;                          /* [dim, n_heads head_dim] */
    Matrix rms_ffn_weight;              /* [dim, 1] */
    Matrix w13;                         /* [2 hidden_dim, dim]: gate, then up */
    Matrix w2;                          /* [dim, hidden_dim] */
} Layer;
static_assert(sizeof(Layer) == 6 * sizeof(Matrix), "map_model() fills layers as arrays of matrices");

/* The tokenizer, which also stands in the file. */
typedef struct {
    const char *text;                   /* in the mapped file, not ended by a zero */
    uint32_t    length;
    uint32_t    type;                   /* enum below */
    float       score;
    unsigned    byte;                   /* of a byte piece */
} Piece;
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 };    /* SentencePiece's numbers */

typedef struct {
    Piece   *pieces;                    /* [n_pieces] */
    size_t   n_pieces;
    bool     dummy_prefix, byte_fallback;
    int      unk, bos, eos[3];          /* -1: none */
    int      byte_ids[256];             /* id of the piece <0xHH>, or unk */
    int     *table;                     /* open addressing from text to id for normal and user-defined pieces */
    size_t   table_mask;
    int     *user_defined;              /* their ids, n_user_defined of them */
    size_t   n_user_defined;
    bool     starts_user_defined[256];  /* whether one of them starts with this byte */
    bool     by_words;                  /* no piece has a space after another character: words can be merged one by one */
} Tokenizer;

typedef struct Backend Backend;         /* what runs the model */

typedef struct {
    const char  *path;
    const Backend *backend;
    void        *device;                /* the backend's copy of the weights, if it makes one */
    Header       c;                     /* the hyperparameters */
    int          kv_type;               /* of the KV cache: F32 with FP32 weights, else Q16 (a GPU: F16), or Q8 (--kv q8) */
    Matrix       token_embedding;       /* [vocab_size, dim] */
    Layer       *layers;                /* [n_layers] */
    Matrix       rms_final_weight;      /* [dim, 1] */
    Matrix       wcls;                  /* [vocab_size, dim]; the embedding again where the two are tied */
    Tokenizer    tokenizer;
    const unsigned char *map;           /* the whole file, file_size bytes */
} Model;

/* Fills in the layout of a matrix of this type and shape; false if the type or the group is unknown or a size does
 * not fit in size_t. */
static bool matrix_layout(Matrix *m, uint32_t type, uint32_t group, uint64_t rows, uint64_t cols) {
    memset(m, 0, sizeof *m);
    if (type < F32 || type > NF4 || rows == 0 || cols == 0 || rows > UINT32_MAX || cols > UINT32_MAX) return false;
    if (type >= Q8 ? group != 32 && group != 64 && group != 128 : group != 0) return false;
    size_t bits = type == F32 ? 32 : type == F16 ? 16 : type == Q8 ? 8 : 4;
    m->type = (int)type;
    m->rows = rows;
    m->cols = cols;
    m->group = type >= Q8 ? group : (uint32_t)MAX_GROUP;
    m->n_groups = (cols + m->group - 1) / m->group;
    m->n_panels = (rows + PANEL - 1) / PANEL;
    m->block_bytes = PANEL * m->group * bits / 8 + (type >= Q8 ? PANEL * 4 : 0);
    m->panel_bytes = type >= Q8 ? m->n_groups * m->block_bytes : PANEL * cols * bits / 8;
    return !__builtin_mul_overflow(m->n_panels, m->panel_bytes, &m->bytes);
}

/* Name and shape of the i-th tensor of a model: the one place that knows which there are and in which order.
 * Returns false past the last. A model has 6 n_layers + 2 tensors, and one more where the classifier is its own. */
static bool tensor_shape(const Header *c, uint64_t i, char name[48], uint64_t *rows, uint64_t *cols) {
    uint64_t q_dim = (uint64_t)c->n_heads * c->head_dim, kv_dim = (uint64_t)c->n_kv_heads * c->head_dim;
    uint64_t l = (i - 1) / 6, last = 6ull * c->n_layers + 1;
    const struct { const char *name; uint64_t rows, cols; } shapes[6] = {
        {"rms_att_weight", c->dim, 1}, {"wqkv", q_dim + 2 * kv_dim, c->dim}, {"wo", c->dim, q_dim},
        {"rms_ffn_weight", c->dim, 1}, {"w13", 2ull * c->hidden_dim, c->dim}, {"w2", c->dim, c->hidden_dim}};
    if (i >= c->n_tensors || i > last + 1) return false;
    memset(name, 0, 48);
    *rows = i == last ? c->dim : c->vocab_size;
    *cols = i == last ? 1 : c->dim;
    if (i == 0) strcpy(name, "token_embedding");
    else if (i == last) strcpy(name, "rms_final_weight");
    else if (i > last) strcpy(name, "wcls");
    else {
        snprintf(name, 48, "layers.%u.%s", (unsigned)l, shapes[(i - 1) % 6].name);
        *rows = shapes[(i - 1) % 6].rows;
        *cols = shapes[(i - 1) % 6].cols;
    }
    return true;
}

/* Dies unless the header makes sense by itself; `path` is for the message. */
static void check_header(const char *path, const Header *c) {
    if (memcmp(c->magic, "mistralc", 8)) die("%s: not a mistral.c checkpoint (make one with export.py)", path);
    if (c->version != 1) die("%s: version %u of the format; this program reads version 1", path, c->version);
    const struct { const char *name; uint32_t value, max; } counts[] = {
        {"dim", c->dim, 1 << 20}, {"hidden_dim", c->hidden_dim, 1 << 24}, {"n_layers", c->n_layers, 1 << 16},
        {"n_heads", c->n_heads, 1 << 16}, {"n_kv_heads", c->n_kv_heads, 1 << 16}, {"head_dim", c->head_dim, MAX_HEAD_DIM},
        {"vocab_size", c->vocab_size, 1 << 24}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value == 0 || counts[i].value > counts[i].max)
            die("%s: header: %s is %u, not between 1 and %u", path, counts[i].name, counts[i].value, counts[i].max);
    if (c->n_heads % c->n_kv_heads) die("%s: header: %u heads do not share %u key heads", path, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2) die("%s: header: head_dim is %u, which is odd", path, c->head_dim);
    if (!(c->norm_eps >= 0 && c->norm_eps < 1)) die("%s: header: norm_eps is %g", path, c->norm_eps);
    if (!(c->rope_theta > 0 && c->rope_theta < 1e300)) die("%s: header: rope_theta is %g", path, c->rope_theta);
    if (c->chat_template > 2) die("%s: header: chat_template is %u, not 0, 1 or 2", path, c->chat_template);
    if (c->name[sizeof c->name - 1]) die("%s: header: the name is not ended by a zero", path);
    for (const char *p = c->name; *p; p++)
        if ((unsigned char)*p < ' ' || *p == 0x7f) die("%s: header: the name has control characters", path);
    if (c->n_tensors != 6 * c->n_layers + 2 && c->n_tensors != 6 * c->n_layers + 3)
        die("%s: header: %u tensors do not make %u layers", path, c->n_tensors, c->n_layers);
    uint64_t table_end = sizeof *c + (uint64_t)c->n_tensors * sizeof(Tensor);
    if (c->tokenizer_offset % 64 || c->tokenizer_offset < table_end || c->tokenizer_offset > c->file_size ||
        c->tokenizer_size < 32 || c->tokenizer_size > c->file_size - c->tokenizer_offset)
        die("%s: header: the tokenizer (%llu bytes at %llu) is not inside the file", path,
            (unsigned long long)c->tokenizer_size, (unsigned long long)c->tokenizer_offset);
}

/* Checks entry i of the table against the header, the file's size and *end, where the tensor before it ends, which it
 * moves on. Returns the layout (without data). */
static Matrix check_tensor(const char *path, const Header *c, const Tensor *t, uint64_t i, uint64_t *end) {
    char name[48];
    uint64_t rows, cols;
    Matrix m;
    if (!tensor_shape(c, i, name, &rows, &cols) || memcmp(name, t->name, sizeof name))
        die("%s: tensor %llu is '%.47s', not '%s'", path, (unsigned long long)i, t->name, name);
    if (t->rows != rows || t->cols != cols)
        die("%s: %s: shape [%llu, %llu], not [%llu, %llu]", path, name, (unsigned long long)t->rows,
            (unsigned long long)t->cols, (unsigned long long)rows, (unsigned long long)cols);
    if (!matrix_layout(&m, t->type, t->group, rows, cols) || (cols == 1 && t->type != F32))
        die("%s: %s: unknown type %u or group size %u", path, name, t->type, t->group);
    if (t->size != m.bytes || t->offset % 64 || t->offset > c->file_size || t->size > c->file_size - t->offset)
        die("%s: %s: %llu bytes at %llu, where %zu are needed within the file's %llu", path, name,
            (unsigned long long)t->size, (unsigned long long)t->offset, m.bytes, (unsigned long long)c->file_size);
    if (t->offset < *end) die("%s: %s does not follow what stands before it", path, name);
    *end = t->offset + t->size;
    return m;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. The tokenizer: SentencePiece BPE                                                                               */

static const char SPACE[] = "\xe2\x96\x81";          /* U+2581, which stands for a space in pieces */
static const char REPLACEMENT[] = "\xef\xbf\xbd";    /* U+FFFD, which stands for a byte that is not UTF-8 */

/* A growing string of bytes, text[length] being 0. */
typedef struct { char *text; size_t length, room; } Text;

static void append(Text *t, const char *bytes, size_t n) {
    t->text = (char *)grow(t->text, t->length + n, &t->room, 1);
    if (n) memcpy(t->text + t->length, bytes, n);
    t->text[t->length += n] = 0;
}

/* Bytes of the UTF-8 character at the start of s (n > 0 bytes), 0 if there is no valid one: RFC 3629, so no overlong
 * forms, no surrogates, nothing past U+10FFFF. */
static size_t utf8_length(const char *s, size_t n) {
    static const struct { unsigned char first, last, low, high, length; } FORMS[] = {      /* lead byte, second byte */
        {0x00, 0x7f, 0x00, 0xff, 1}, {0xc2, 0xdf, 0x80, 0xbf, 2}, {0xe0, 0xe0, 0xa0, 0xbf, 3}, {0xe1, 0xec, 0x80, 0xbf, 3},
        {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3}, {0xf0, 0xf0, 0x90, 0xbf, 4}, {0xf1, 0xf3, 0x80, 0xbf, 4},
        {0xf4, 0xf4, 0x80, 0x8f, 4}};
    const unsigned char *u = (const unsigned char *)s;
    for (size_t f = 0; f < sizeof FORMS / sizeof *FORMS; f++) {
        if (u[0] < FORMS[f].first || u[0] > FORMS[f].last) continue;
        size_t length = FORMS[f].length;
        if (length > n || (length > 1 && (u[1] < FORMS[f].low || u[1] > FORMS[f].high))) return 0;
        for (size_t i = 2; i < length; i++) if ((u[i] & 0xc0) != 0x80) return 0;
        return length;
    }
    return 0;
}

/* Appends any bytes as UTF-8: where no character starts, one byte becomes U+FFFD. */
static void append_repaired(Text *t, const char *s, size_t n) {
    for (size_t i = 0, length; i < n; i += length + !length) {
        length = utf8_length(s + i, n - i);
        append(t, length ? s + i : REPLACEMENT, length ? length : 3);
    }
}

static size_t hash(const char *s, size_t n) {        /* FNV-1a */
    uint64_t h = 14695981039346656037ull;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 1099511628211ull;
    return (size_t)(h ^ h >> 32);
}

/* The id of the normal or user-defined piece with this text, -1 if there is none. */
static int find_piece(const Tokenizer *t, const char *s, size_t n) {
    for (size_t i = hash(s, n) & t->table_mask; t->table[i] >= 0; i = (i + 1) & t->table_mask) {
        const Piece *p = &t->pieces[t->table[i]];
        if (p->length == n && !memcmp(p->text, s, n)) return t->table[i];
    }
    return -1;
}

/* Reads the tokenizer at `data` (c->tokenizer_size bytes that are known to be in the file); dies if it is damaged. */
static void load_tokenizer(const char *path, const Header *c, const unsigned char *data, Tokenizer *t) {
    uint32_t head[8];
    const unsigned char *at = data + sizeof head, *end = data + c->tokenizer_size;
    memcpy(head, data, sizeof head);
    if (head[0] != 1) die("%s: tokenizer of kind %u; this program knows 1, SentencePiece BPE", path, head[0]);
    if (head[1] == 0 || head[1] > c->vocab_size)
        die("%s: tokenizer: %u pieces for a vocabulary of %u", path, head[1], c->vocab_size);
    t->n_pieces = head[1];
    t->dummy_prefix = head[2] & 1;
    t->byte_fallback = head[2] & 2;
    t->unk = (int)head[3];
    t->bos = (int)head[4];
    for (int i = 0; i < 3; i++) t->eos[i] = (int)head[5 + i];
    for (int i = 0; i < 5; i++)
        if ((int32_t)head[3 + i] < (i ? -1 : 0) || (int32_t)head[3 + i] >= (int32_t)c->vocab_size)
            die("%s: tokenizer: special id %d is not in the vocabulary of %u", path, (int)head[3 + i], c->vocab_size);

    t->by_words = true;
    for (t->table_mask = 1; t->table_mask < 2 * t->n_pieces; t->table_mask *= 2) {}
    t->pieces = (Piece *)allocate(t->n_pieces, sizeof(Piece), path);
    t->table = (int *)allocate(t->table_mask, sizeof(int), path);
    t->user_defined = (int *)allocate(t->n_pieces, sizeof(int), path);
    memset(t->table, 0xff, t->table_mask * sizeof(int));
    t->table_mask--;
    for (int i = 0; i < 256; i++) t->byte_ids[i] = t->unk;
    for (size_t i = 0; i < t->n_pieces; i++) {
        Piece *p = &t->pieces[i];
        uint16_t type, length;
        if (end - at < 8) die("%s: tokenizer: cut in piece %zu", path, i);
        memcpy(&p->score, at, 4);
        memcpy(&type, at + 4, 2);
        memcpy(&length, at + 6, 2);
        at += 8;
        if (end - at < length) die("%s: tokenizer: cut in piece %zu", path, i);
        p->text = (const char *)at;
        p->length = length;
        p->type = type;
        at += length;
        if (type < NORMAL || type > BYTE || type == UNUSED) die("%s: tokenizer: piece %zu is of type %u", path, i, type);
        for (size_t j = 0, step; type == USER_DEFINED && j < length; j += step)    /* encode() goes from character to character */
            if (!(step = utf8_length(p->text + j, length - j))) die("%s: tokenizer: piece %zu is no UTF-8", path, i);
        if (type == USER_DEFINED && length) {
            t->user_defined[t->n_user_defined++] = (int)i;
            t->starts_user_defined[*(const unsigned char *)p->text] = true;
        }
        for (size_t j = 1; j + 3 <= length; j++)
            if (!memcmp(p->text + j, SPACE, 3) && (j < 3 || memcmp(p->text + j - 3, SPACE, 3))) t->by_words = false;
        if ((type == NORMAL || type == USER_DEFINED) && length && find_piece(t, p->text, length) < 0) {
            size_t h = hash(p->text, length) & t->table_mask;
            while (t->table[h] >= 0) h = (h + 1) & t->table_mask;
            t->table[h] = (int)i;
        }
        if (type == BYTE) {
            char digits[8] = {0};
            memcpy(digits, p->text, length == 6 ? 6 : 0);
            if (sscanf(digits, "<0x%2X>", &p->byte) != 1 || strspn(digits + 3, "0123456789ABCDEFabcdef") != 2 || digits[5] != '>')
                die("%s: tokenizer: byte piece %zu is not <0xHH>", path, i);
            t->byte_ids[p->byte] = (int)i;
        }
    }
}

static int find_control(const Tokenizer *t, const char *text) {     /* -1 if there is none */
    for (size_t i = 0; i < t->n_pieces; i++)
        if (t->pieces[i].type == CONTROL && t->pieces[i].length == strlen(text) && !memcmp(t->pieces[i].text, text, strlen(text)))
            return (int)i;
    return -1;
}

/* A possible merge of two neighbours, in a heap: the highest score first, the leftmost of equal ones. */
typedef struct { float score; uint32_t left, right, length; } Merge;
/* A part of the text, linked to its neighbours; next of the last and previous of the first is NONE. */
typedef struct { uint32_t start, length, previous, next; int id; bool frozen; } Symbol;     /* frozen: user-defined, never merged */

static bool is_space(const char *text, const Symbol *s) { return s->length >= 3 && !memcmp(text + s->start, SPACE, 3); }
#define NONE UINT32_MAX

static bool goes_first(const Merge *a, const Merge *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void heap_push(Merge *heap, size_t *n, Merge m) {
    size_t i = (*n)++;
    for (; i && goes_first(&m, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = m;
}

static Merge heap_pop(Merge *heap, size_t *n) {
    Merge top = heap[0], last = heap[--*n];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < *n) {
        if (child + 1 < *n && goes_first(&heap[child + 1], &heap[child])) child++;
        if (!goes_first(&heap[child], &last)) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static void push_merge(const Tokenizer *t, const char *text, const Symbol *s, uint32_t left, uint32_t right, Merge *heap,
                       size_t *n) {
    if (left == NONE || right == NONE || s[left].frozen || s[right].frozen) return;
    uint32_t length = s[left].length + s[right].length;
    int id = find_piece(t, text + s[left].start, length);
    if (id < 0) return;
    Merge m = {t->pieces[id].score, left, right, length};
    heap_push(heap, n, m);
}

/* Encodes a text of n bytes, any bytes, as the SentencePiece library does; returns the ids, to be freed, and their
 * number. BOS is not among them. Spaces become U+2581, one more stands before the text; then neighbours are merged,
 * best score first, until no two make a piece (Sennrich et al. 2016); what is no piece then becomes its bytes. */
static int *encode(const Tokenizer *t, const char *text, size_t n, size_t *n_ids) {
    Text norm = {NULL, 0, 0};
    size_t n_symbols = 0, n_merges = 0;
    if (n > (1u << 30)) die("a text of %zu bytes is too long to encode", n);
    append(&norm, SPACE, n && t->dummy_prefix ? 3 : 0);
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i; end < n && text[end] != ' ';) end++;
        append_repaired(&norm, text + i, end - i);
        for (; end < n && text[end] == ' '; end++) append(&norm, SPACE, 3);
    }

    /* one symbol for each character, or for the longest user-defined piece that starts there */
    Symbol *s = (Symbol *)allocate(norm.length, sizeof(Symbol), "tokenizer");
    Merge *heap = (Merge *)allocate(2 * norm.length, sizeof(Merge), "tokenizer");
    for (size_t i = 0; i < norm.length; i += s[n_symbols++].length) {
        Symbol symbol = {(uint32_t)i, (uint32_t)utf8_length(norm.text + i, norm.length - i), (uint32_t)n_symbols - 1,
                         (uint32_t)n_symbols + 1, -1, false};
        for (size_t u = 0; u < t->n_user_defined && t->starts_user_defined[(unsigned char)norm.text[i]]; u++) {
            const Piece *p = &t->pieces[t->user_defined[u]];
            if (p->length <= norm.length - i && p->length >= symbol.length &&
                !memcmp(p->text, norm.text + i, p->length)) { symbol.length = p->length; symbol.frozen = true; }
        }
        s[n_symbols] = symbol;
    }
    if (n_symbols) s[n_symbols - 1].next = NONE;    /* the first's previous is 0 - 1 = NONE */
    for (uint32_t first = 0, end; first < n_symbols; first = end) {
        for (end = first + 1; end < n_symbols; end++) {         /* a word ends before a space that no space precedes */
            if (t->by_words && is_space(norm.text, &s[end]) && !is_space(norm.text, &s[end - 1])) break;
            push_merge(t, norm.text, s, end - 1, end, heap, &n_merges);
        }
        while (n_merges) {
            Merge m = heap_pop(heap, &n_merges);
            Symbol *left = &s[m.left], *right = &s[m.right];
            if (!left->length || !right->length || left->length + right->length != m.length) continue;   /* one is gone */
            left->length += right->length;
            left->next = right->next;
            right->length = 0;
            if (left->next != NONE) s[left->next].previous = m.left;
            push_merge(t, norm.text, s, left->previous, m.left, heap, &n_merges);
            push_merge(t, norm.text, s, m.left, left->next, heap, &n_merges);
        }
    }

    int *ids = (int *)allocate(norm.length, sizeof(int), "tokenizer");
    bool unknown = false;               /* was the last symbol unknown? A run of unknown ones is one id */
    *n_ids = 0;
    for (uint32_t i = 0; i < n_symbols; i = s[i].next) {
        int id = find_piece(t, norm.text + s[i].start, s[i].length);
        if (id >= 0) ids[(*n_ids)++] = id;
        else if (t->byte_fallback)
            for (uint32_t j = 0; j < s[i].length; j++) ids[(*n_ids)++] = t->byte_ids[(unsigned char)norm.text[s[i].start + j]];
        else if (!unknown) ids[(*n_ids)++] = t->unk;
        unknown = id < 0;
    }
    free(norm.text);
    free(s);
    free(heap);
    return ids;
}

/* Text of ids that come one by one: what has come so far, valid UTF-8 always, and the bytes of a character that is
 * not whole yet. */
typedef struct {
    Text   text;
    char   pending[4];
    size_t n_pending;
    bool   started;                     /* something was put out: a space at the start is no dummy prefix any more */
} Decoder;

/* Puts out what is certain of the pending bytes, or all of them: a byte that starts no character becomes U+FFFD. */
static void decode_pending(Decoder *d, bool all) {
    while (d->n_pending) {
        unsigned char lead = (unsigned char)d->pending[0];
        size_t length = utf8_length(d->pending, d->n_pending), want = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
        if (!length && !all && lead >= 0xc0 && d->n_pending < want) return;
        append(&d->text, length ? d->pending : REPLACEMENT, length ? length : 3);
        length += !length;
        memmove(d->pending, d->pending + length, d->n_pending -= length);
    }
}

static void decode(Decoder *d, const Tokenizer *t, int id) {
    if (id < 0 || (size_t)id >= t->n_pieces) return;
    const Piece *p = &t->pieces[id];
    if (p->type == BYTE) {
        d->pending[d->n_pending++] = (char)p->byte;
        d->started = true;
        decode_pending(d, false);
        return;
    }
    decode_pending(d, true);
    if (p->type == CONTROL) return;
    if (p->type == UNKNOWN) append(&d->text, " \xe2\x81\x87 ", 5);
    else for (size_t i = 0; i < p->length;) {
        bool space = p->length - i >= 3 && !memcmp(p->text + i, SPACE, 3);
        if (!space) append(&d->text, p->text + i, 1);
        else if (i || d->started || !t->dummy_prefix) append(&d->text, " ", 1);
        i += space ? 3 : 1;
    }
    d->started = true;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. Both at once                                                                                                   */

/* Maps a checkpoint and checks all of it that is not weights. Dies with a message if anything is wrong. */
static Model map_model(const char *path) {
    Model m;
    struct stat st;
    memset(&m, 0, sizeof m);
    int fd = open(path, O_RDONLY | O_NONBLOCK);         /* of a named pipe: it is refused, not waited for */
    if (fd < 0 || fstat(fd, &st) != 0) die("%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s: not a file", path);
    if ((uint64_t)st.st_size < sizeof(Header)) die("%s: %lld bytes are too few for a checkpoint", path, (long long)st.st_size);
    void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
#ifdef MADV_HUGEPAGE
    madvise(map, (size_t)st.st_size, MADV_HUGEPAGE);    /* a wish: SPEED.md, Pages: q4 decodes 8% faster */
#endif
    close(fd);
    m.path = path;
    m.map = (const unsigned char *)map;
    memcpy(&m.c, m.map, sizeof m.c);
    const Header *c = &m.c;
    if (!memcmp(c->magic, "mistralc", 8) && c->version == 1 && c->file_size != (uint64_t)st.st_size)
        die("%s: has %lld bytes, should have %llu: an incomplete copy?", path, (long long)st.st_size,
            (unsigned long long)c->file_size);
    check_header(path, c);

    const Tensor *table = (const Tensor *)(m.map + sizeof(Header));
    uint64_t end = c->tokenizer_offset + c->tokenizer_size;
    m.layers = (Layer *)allocate(c->n_layers, sizeof(Layer), path);
    for (uint64_t i = 0; i < c->n_tensors; i++) {
        Matrix w = check_tensor(path, c, &table[i], i, &end);
        w.data = m.map + table[i].offset;
        if (i == 0) m.token_embedding = m.wcls = w;
        else if (i <= 6ull * c->n_layers) ((Matrix *)m.layers)[i - 1] = w;
        else if (i == 6ull * c->n_layers + 1) m.rms_final_weight = w;
        else m.wcls = w;
    }
    m.kv_type = m.layers[0].wqkv.type == F32 ? F32 : Q16;
    load_tokenizer(path, c, m.map + c->tokenizer_offset, &m.tokenizer);
    return m;
}

static void unmap_model(Model *m) {
    munmap((void *)m->map, (size_t)m->c.file_size);
    free(m->layers);
    free(m->tokenizer.pieces);
    free(m->tokenizer.table);
    free(m->tokenizer.user_defined);
}
#endif
