/* run_cuda.cu - the engine of run.c on a GPU.
 *
 *   nvcc -O3 -arch=native run_cuda.cu -o run_cuda && ./run_cuda demo/tiny-mistral-q8.bin -b 32 -n 200      (a Hopper: -arch=sm_90a)
 *
 * Includes run.c for all that is not GPU, and gives the same command line. From top to bottom:
 *   1. Weights        uploaded once, laid out as the tensor cores read them
 *   2. Tensor cores   the two instructions everything rests on, and what they do in plain C
 *   3. Products       plain; for up to 8 tokens; for more of them, of many sequences or of a prefill; hopper.h: a Hopper's
 *   4. Between        embedding, norms, RoPE, quantizing: one kernel each
 *   5. Attention      plain; and on the tensor cores, for both decoding and prefill
 *   6. The sampler
 *   7. The step       forward() as a list of launches, which CUDA keeps as a graph
 *
 * Words: a row tile is 16 rows of a matrix, a column tile 128 columns (of FP16 64), a token tile 8 tokens (TILES counts these).
 * Parts are shares of a product's columns that are summed apart (split-K). A run is neighbouring tokens of a sequence, a span 256
 * or 512 positions of one; halves are FP16 numbers. What has no plain kernel here has its plain form in run.c: matrix_row (embed),
 * rms_norm (norm_input), quantize_activations (write_inputs), rope and cache_store (make_head), swiglu (store), merge_softmax
 * (attention_input), sample (sample_kernel).
 *
 * A token's numbers are the same whatever else is in the batch, and from run to run: every sum has an order that depends on the
 * model, the place in the text, the number of slots, the GPU and whether this is prefill or decoding. They differ from the CPU's:
 * sums over groups are added in another order (those within a group are of whole numbers, and the same). That is the last digits,
 * until an activation rounds to its other neighbour: then single logits move by up to 2% of the largest (SPEED.md).
 *
 * Written for compute capability 7.5 (the T4) and later, older ones are slow. On 9.0 a kernel starts while the one before it
 * ends. */
#define RUN_NO_MAIN
#pragma nv_diag_suppress 128, 161, 177  /* a template's loops without turns; OpenMP's pragmas; functions that a GPU does not use */
#include "run.c"
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

/* Ends the program with one line if a call to CUDA fails. */
#define CUDA(call) do { if (cudaError_t error = (call)) die("CUDA: %s (%.40s)", cudaGetErrorString(error), #call); } while (0)

#ifndef __maxnreg__                     /* before CUDA 12.4 */
#define __maxnreg__(n)
#endif
#undef UNROLL                           /* simd.h's, which for nvcc is nothing */
#define UNROLL _Pragma("unroll")

enum {
    COLUMNS = 128,                      /* of a tile of codes; all matrices and activations are padded to a multiple */
    MAX_PARTS = 8                       /* into which a product's columns are cut, for more blocks to have something to do */
};

/* Programmatic dependent launch: lets the next kernel begin, and waits until the one before, and with it all before that, has
 * ended. Until then a kernel may only read weights, and the step's entries, which no kernel writes. Before 9.0 kernels simply
 * follow one another. */
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
#endif
}

/* ------------------------------------------------------------------------------------------------------------------
 * 1. Weights                                                                                                        */

/* A matrix on the device, [rows, cols]; f32 becomes FP16.
 *
 * It lies in tiles of 16 rows by 128 columns, of FP16 by 64, a tile being what the 32 threads of a warp hold when they give it to
 * the tensor cores. Thread 4 g + q has of the rows 2 g and 2 g + 1 the q-th of each four strips of columns: 32 columns a row (FP16:
 * 16), which are 16 bytes in q4 and nf4 and 32 in q8 and FP16. A strip is 4 columns; in q8 and FP16 it is the 16 bytes that a
 * thread reads at once, since a Hopper takes those from shared memory as they lie, but not with groups of 32, two of which an
 * instruction would then cross.
 *   codes   [8 row tiles][column tile][row tile][row 2 g, 2 g + 1][q8, f16: strip q, strip 4 + q][thread_place] of 16 bytes. In q4
 *           a word has eight columns, the low halves of its bytes the first four, the high halves the others; in nf4 from the
 *           lowest bits on in their order. f16: [column tile][row tile], so that any neighbouring rows lie together.
 *   scales  [8 row tiles][column tile][row tile][group][16 rows] of (scale, zero)
 * All are padded to multiples of 128 rows (w13: of 256) and columns. The rows of w13 change places: after each of the gate comes
 * that of up which it is multiplied with. So both stand in the same thread. */
typedef struct {
    int     type, group, shift;         /* F16, Q8, Q4 or NF4; shift: group is 2^shift */
    int     strip_shift;                /* a strip is 2^strip_shift bytes of activations */
    int     rows, cols, width;          /* width: cols rounded up to a multiple of 128 */
    int     row_tiles, column_tiles;
    int     units;                      /* of w13: columns of its output, SwiGLU's; else 0, by which all below know w13 */
    uint4  *codes;
    __half2 *scales;
    int     parts, most_parts;          /* into so many a launch cuts the columns; at most */
    int     block_tiles;                /* row tiles of a block of product_halves, where there is a Hopper */
    bool    to_halves;                  /* of w13: w2 is FP16 as well, so that SwiGLU's output can be left as its input */
    double  bytes;                      /* in the file: what a step counts as read */
} Weights;

/* To nearest; beyond the largest it stays there. */
__device__ inline __half to_half(float x) { return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

/* Of a byte of a tile's activations, 32 q + j: it is the j-th of those for the threads 4 g + q. A strip is 2^shift bytes. */
__host__ __device__ inline int of_byte(int shift, int byte) {
    return (byte >> shift & 3) * 32 + (byte >> (shift + 2) << shift) + (byte & ((1 << shift) - 1));
}

/* Where a thread's 16 bytes stand among those of a warp: so that wgmma finds them as it wants 8 rows of 64 bytes (PTX ISA, its
 * layout swizzled by 64). It is its own inverse. */
__device__ inline int thread_place(int thread) { return thread ^ thread / 8; }

/* The place of a tile among all: of codes, eight below one another lie together, which is what one block of threads needs. */
__device__ inline size_t tile_index(const Weights &w, int row_tile, int column_tile) {
    return w.type == F16 ? (size_t)column_tile * w.row_tiles + row_tile
                         : ((size_t)(row_tile / 8) * w.column_tiles + column_tile) * 8 + row_tile % 8;
}

/* The first bit of the code or FP16 number of a row and column; the place of its (scale, zero). */
__device__ inline size_t code_bit(const Weights &w, int row, int col) {
    int wide = w.type == F16 ? 2 : 1, at = of_byte(w.strip_shift, col * wide % COLUMNS), j = at % 32;
    int place = thread_place(row % 16 / 2 * 4 + at / 32);
    size_t of_row = tile_index(w, row / 16, col * wide / COLUMNS) * 2 + row % 2;
    if (w.type <= Q8) return ((of_row * 2 + j / 16) * 32 + place) * 128 + j % 16 * 8;
    return (of_row * 32 + place) * 128 + j / 8 * 32 + (w.type == NF4 ? j % 8 * 4 : j % 4 * 8 + j % 8 / 4 * 4);
}
__device__ inline size_t scale_at(const Weights &w, int row, int col) {
    return (tile_index(w, row / 16, col / COLUMNS) * (COLUMNS / w.group) + col % COLUMNS / w.group) * 16 + row % 16;
}

/* Puts 16 rows by 128 columns of m, a block each, where w has them; beyond m's rows and columns all stays 0 (memory is zeroed). m
 * lies as in the file (drawn in model.h), but on the device. */
__global__ void lay_out(Weights w, Matrix m) {
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += blockDim.x) {
        int row = blockIdx.x % w.row_tiles * 16 + i / COLUMNS, col = blockIdx.x / w.row_tiles * COLUMNS + i % COLUMNS;
        if (row >= w.rows || col >= w.cols) continue;
        int from = w.units ? row % 2 * (w.rows / 2) + row / 2 : row, r = from % PANEL, k = col % w.group;       /* from: m's row */
        const unsigned char *block = m.data + from / PANEL * m.panel_bytes + col / w.group * m.block_bytes;
        const unsigned char *codes = block + 4 * PANEL;
        const __half *halves = (const __half *)block;           /* numbers; or scales, then zeros */
        unsigned bits = m.type == F32 ? __half_as_ushort(to_half(((const float *)block)[k * PANEL + r]))
                      : m.type == F16 ? __half_as_ushort(halves[k * PANEL + r])
                      : m.type == Q8 ? codes[(k / 4 * PANEL + r) * 4 + k % 4]
                      : codes[(k / 4 * 16 + r % 16) * 4 + k % 4] >> r / 16 * 4 & 15;
        size_t bit = code_bit(w, row, col);
        atomicOr((unsigned *)w.codes + bit / 32, bits << bit % 32);             /* neighbours share a word */
        if (w.type != F16 && k == 0) w.scales[scale_at(w, row, col)] = __halves2half2(halves[r], halves[PANEL + r]);
    }
}

/* Four codes of nf4, in the low 16 bits, as codes of q8: NF4_CODES, looked up among the first and among the last eight. */
__device__ inline uint32_t of_nf4(uint32_t codes) {
    uint32_t low = __byte_perm(0x4e3d2801, 0x8074695c, codes & 0x7777), high = __byte_perm(0xab9f948a, 0xffdcc7b8, codes & 0x7777);
    return __byte_perm(low, high, 0x3210 + ((codes & 0x8888) >> 1));
}

/* One weight, as the plain product and the embedding read it. */
__device__ inline float weight_at(const Weights &w, int row, int col) {
    size_t bit = code_bit(w, row, col);
    const uint8_t *at = (const uint8_t *)w.codes + bit / 8;
    if (w.type == F16) return __half2float(*(const __half *)at);
    int code = w.type == Q8 ? *at : *at >> bit % 8 & 15;
    float2 scale = __half22float2(w.scales[scale_at(w, row, col)]);
    return scale.x * ((float)(w.type == NF4 ? of_nf4(code) & 255 : code) - scale.y);
}

static size_t ceil_div(size_t n, size_t per_block) { return (n + per_block - 1) / per_block; }

/* Device memory that is freed together. */
typedef struct { void **all; size_t n, room, bytes; } Memory;

/* Some more of it, zeroed; dies if there is none. */
static void *device_allocate(size_t bytes, Memory *m, const char *what) {
    void *p;
    if (cudaMalloc(&p, bytes) != cudaSuccess) die("%s: no room on the GPU for %.1f MB more", what, (double)bytes / 1e6);
    CUDA(cudaMemset(p, 0, bytes));
    m->all = (void **)grow(m->all, m->n, &m->room, sizeof(void *));
    m->all[m->n++] = p;
    m->bytes += bytes;
    return p;
}

static void device_free(Memory *m) {
    for (size_t i = 0; i < m->n; i++) cudaFree(m->all[i]);
    free(m->all);
    memset(m, 0, sizeof *m);
}

/* m on the device. gated: it is w13; whole: whoever reads its output adds up no parts. staging: room for m there. */
static Weights upload(const Matrix *m, bool gated, bool whole, void *staging, Memory *memory, const char *path) {
    Weights w = {};
    w.type = m->type < Q8 ? F16 : m->type;
    w.group = (int)m->group;
    w.shift = m->group == 32 ? 5 : m->group == 64 ? 6 : 7;
    w.strip_shift = m->type < Q8 || (m->type == Q8 && m->group > 32) ? 4 : 2;
    w.rows = (int)m->rows;
    w.cols = (int)m->cols;
    w.width = (int)round_up(m->cols, COLUMNS);
    w.units = gated ? (int)round_up(m->rows / 2, COLUMNS) : 0;
    w.row_tiles = gated ? w.units / 8 : (int)ceil_div(m->rows, 128) * 8;
    w.column_tiles = w.width / (w.type == F16 ? 64 : COLUMNS);
    w.most_parts = gated || whole ? 1 : max(1, min((int)MAX_PARTS, w.width / (4 * COLUMNS)));
    w.bytes = (double)m->bytes;
    size_t n = (size_t)w.row_tiles * 16 * w.width;
    Matrix raw = *m;
    raw.data = (const unsigned char *)staging;
    CUDA(cudaMemcpy(staging, m->data, m->bytes, cudaMemcpyHostToDevice));
    w.codes = (uint4 *)device_allocate(w.type == F16 ? 2 * n : w.type == Q8 ? n : n / 2, memory, path);
    if (w.type != F16) w.scales = (__half2 *)device_allocate(n / m->group * sizeof(__half2), memory, path);
    lay_out<<<n / (16 * COLUMNS), 256>>>(w, raw);
    CUDA(cudaGetLastError());
    return w;
}

/* A model's weights on the device. */
typedef struct { Weights wqkv, wo, w13, w2; float *rms_att, *rms_ffn; } DeviceLayer;
typedef struct {
    Weights embedding, wcls;
    DeviceLayer *layers;                                        /* [n_layers] */
    float  *rms_final;
    bool    has_halves;                                         /* each matrix has a type of its own */
    Memory  memory;
    size_t  peak;                                               /* bytes of device memory while they were uploaded */
} DeviceModel;

static void cuda_load(Model *m) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || !count) die("no NVIDIA GPU can be used (%s); run needs none", cudaGetErrorString(error));
    const Header *c = &m->c;
    size_t n = c->n_layers, largest = max_size(m->token_embedding.bytes, m->wcls.bytes), free_bytes, all;
    for (size_t i = 0; i < 6 * n; i++) largest = max_size(largest, ((Matrix *)m->layers)[i].bytes);
    size_t need = largest + (size_t)c->file_size / (m->layers[0].wqkv.type == F32 ? 2 : 1);        /* f32 becomes FP16 */
    CUDA(cudaMemGetInfo(&free_bytes, &all));
    if (need > free_bytes)
        die("%s: its weights need %.1f GB of GPU memory and %.1f of %.1f GB are free: quantize it further (q8, q4)", m->path,
            (double)need / 1e9, (double)free_bytes / 1e9, (double)all / 1e9);
    DeviceModel *d = (DeviceModel *)allocate(1, sizeof *d, m->path);
    d->layers = (DeviceLayer *)allocate(n, sizeof *d->layers, m->path);
    Memory for_now = {};
    void *staging = device_allocate(largest, &for_now, m->path);
    auto matrix = [&](const Matrix &of, bool gated = false, bool whole = false) {
        d->has_halves |= of.type < Q8;
        return upload(&of, gated, whole, staging, &d->memory, m->path);
    };
    auto norm = [&](const Matrix &of) {
        float *p = (float *)device_allocate(round_up(of.rows, COLUMNS) * sizeof(float), &d->memory, m->path);
        CUDA(cudaMemcpy(p, of.data, of.rows * sizeof(float), cudaMemcpyHostToDevice));
        return p;
    };
    d->embedding = d->wcls = matrix(m->token_embedding, false, true);
    if (m->wcls.data != m->token_embedding.data) d->wcls = matrix(m->wcls, false, true);
    d->rms_final = norm(m->rms_final_weight);
    for (size_t l = 0; l < n; l++) {
        const Layer &w = m->layers[l];
        d->layers[l] = {matrix(w.wqkv), matrix(w.wo), matrix(w.w13, true), matrix(w.w2), norm(w.rms_att_weight),
                        norm(w.rms_ffn_weight)};
        d->layers[l].w13.to_halves = d->layers[l].w13.type == F16 && d->layers[l].w2.type == F16;
    }
    CUDA(cudaDeviceSynchronize());
    d->peak = d->memory.bytes + for_now.bytes;
    device_free(&for_now);
    m->device = d;
    if (m->kv_type != Q8) m->kv_type = F16;         /* here keys and values are never FP32 or Q16 */
}

static void cuda_unload(Model *m) {
    DeviceModel *d = (DeviceModel *)m->device;
    device_free(&d->memory);
    free(d->layers);
    free(d);
}

/* Activations on their way into a product, as `write_inputs` below leaves them. */
typedef struct {
    int8_t *q;                          /* [column tile][stride tokens][128 bytes], int8 or, for FP16 weights, FP16; a tile's in the
                                           order of its threads (of_byte) */
    float2 *scale;                      /* [group][stride tokens] of (scale, sum of q) */
    int     stride;                     /* room for so many tokens, a multiple of 256 */
    bool    swizzled;                   /* for wgmma, which finds in shared memory what a copy leaves there: a tile's are in their
                                           order, but pieces of 16 bytes change places by token, so that 8 tokens' lie in
                                           different banks */
} Inputs;

/* Where the activation of a column stands, of BYTES bytes; 4 neighbours stand together. */
template <int BYTES>
__host__ __device__ inline int8_t *input_at(const Inputs &in, const Weights &w, int token, int column) {
    int byte = column * BYTES % 128;
    return in.q + ((size_t)(column * BYTES / 128) * in.stride + token) * 128 +
           (in.swizzled ? (byte / 16 ^ token % 8) * 16 + byte % 16 : of_byte(BYTES == 2 ? 4 : w.strip_shift, byte));
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. Tensor cores                                                                                                   */

/* d = a b + c for a of 16 rows by 32 columns of codes, b of 32 columns by 8 tokens, d and c of 16 by 8, spread over the threads
 * of a warp. With g = thread / 4 and q = thread % 4 a thread has
 *   a[0], a[1]: columns 4 q to 4 q + 3 of the rows g and g + 8;  a[2], a[3]: columns 16 + 4 q on of the same
 *   b[0], b[1]: columns 4 q on, 16 + 4 q on, of token g
 *   d[0], d[1]: row g, tokens 2 q and 2 q + 1;  d[2], d[3]: row g + 8
 * (PTX ISA, mma.m16n8k32). Which columns of a group those are matters to nobody, as long as a and b have the same; nor which rows:
 * row g here is row 2 g of a tile of weights, g + 8 is 2 g + 1. The T4's instruction is a quarter of it. mma_plain is what they do;
 * it is here to be read, and runs where a program was built for older GPUs. */
template <class Add> __device__ inline void mma_plain(const uint32_t *a, const uint32_t *b, Add add) {
    int lane = threadIdx.x % 32;
    for (int k = 0; k < 2; k++)
        for (int from = 0; from < 4; from++)
            for (int i = 0; i < 4; i++)         /* to d[i] what four columns, or two, of this row and this token give */
                add(i, __shfl_sync(~0u, a[i / 2 + 2 * k], lane / 4 * 4 + from),
                    __shfl_sync(~0u, b[k], (lane % 4 * 2 + i % 2) * 4 + from));
}
__device__ inline void mma_codes(int *d, const uint32_t *a, const uint32_t *b, const int *c) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#elif __CUDA_ARCH__ >= 750
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < 2; k++) {
            const int *before = k ? d : c;
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
                : "=r"(d[2 * h]), "=r"(d[2 * h + 1]) : "r"(a[h + 2 * k]), "r"(b[k]), "r"(before[2 * h]), "r"(before[2 * h + 1]));
        }
#else
    int sum[4] = {c[0], c[1], c[2], c[3]};
    mma_plain(a, b, [&](int i, uint32_t row, uint32_t token) {
        for (int byte = 0; byte < 32; byte += 8) sum[i] += (int)(row >> byte & 255) * (int8_t)(token >> byte);
    });
    for (int i = 0; i < 4; i++) d[i] = sum[i];
#endif
}

/* d += a b for a of 16 rows by 16 columns, b of 16 columns by 8 tokens, FP16, d of 16 by 8, FP32. As above with two columns
 * in a register: a[0], a[1]: columns 2 q and 2 q + 1 of the rows g and g + 8; a[2], a[3]: 8 + 2 q on; b alike (PTX ISA,
 * mma.m16n8k16; the T4's m16n8k8 is the half). */
__device__ inline void mma_halves(float *d, const uint32_t *a, const uint32_t *b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
    for (int k = 0; k < 2; k++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#else
    mma_plain(a, b, [&](int i, uint32_t row, uint32_t token) {
        float2 x = __half22float2(*(__half2 *)&row), y = __half22float2(*(__half2 *)&token);
        d[i] = fmaf(x.x, y.x, fmaf(x.y, y.y, d[i]));
    });
#endif
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. Products: out[token][row] = sum over columns of w[row][column] * x[token][column]                              */

/* The plain one, to be read, and for test_all.c to compare with: a thread for each output. */
__global__ void product_plain(float *out, Weights w, Inputs in, int n) {
    int row = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    float sum = 0;
    if (row >= w.rows || token >= n) return;
    for (int k = 0; k < w.cols; k++) {
        float x = w.type == F16 ? __half2float(*(const __half *)input_at<2>(in, w, token, k))
                                : *input_at<1>(in, w, token, k) * in.scale[(size_t)(k / w.group) * in.stride + token].x;
        sum += weight_at(w, row, k) * x;
    }
    out[(size_t)token * w.rows + row] = sum;
}

/* What a warp has under way of two tiles of weights, one below the other. */
template <int TYPE, int GROUPS> struct Stage {
    static const int PIECES = TYPE == Q4 || TYPE == NF4 ? 2 : 4;        /* of 16 bytes a thread, of a tile */
    uint4 codes[2][PIECES];
    uint2 scales[2][GROUPS];            /* (scale, zero) of row 2 g, of row 2 g + 1 */
    uint32_t codes_at, scales_at;       /* of the rows' first tile, in pieces of 16 bytes and of 8: fewer than 2^32 */

    __device__ inline Stage(const Weights &w, int row_tile) {
        uint32_t lane = threadIdx.x % 32, tile = TYPE == F16 ? row_tile : row_tile / 8 * w.column_tiles * 8 + row_tile % 8;
        codes_at = tile * PIECES * 32 + thread_place(lane);
        scales_at = tile * GROUPS * 8 + lane / 4;
    }

    /* k: of the tiles of columns. once: no other block reads these codes, so that they need not stay in a cache, where others would
     * be pushed out. */
    __device__ inline void load(const Weights &w, int k, bool once) {
        int apart = TYPE == F16 ? w.row_tiles : 8;
        UNROLL for (int m = 0; m < 2; m++) {
            UNROLL for (int p = 0; p < PIECES; p++) {
                const uint4 *from = w.codes + (codes_at + (apart * k + m) * (PIECES * 32)) + p * 32;
                codes[m][p] = once ? __ldcs(from) : __ldg(from);
            }
            UNROLL for (int g = 0; g < GROUPS && TYPE != F16; g++)
                scales[m][g] = __ldg((const uint2 *)w.scales + (scales_at + (8 * k + m) * (GROUPS * 8)) + g * 8);
        }
    }

    /* 16 rows as the tensor cores want them, four codes or two halves a register: a[i] for the i-th instruction of a tile. */
    __device__ inline void unpack(uint32_t (*a)[4], int m) const {
        const uint32_t *words = (const uint32_t *)codes[m];     /* q4, nf4: [row 2 g, 2 g + 1][4]; q8, f16: [row][8] */
        UNROLL for (int i = 0; i < 4; i++)
            UNROLL for (int r = 0; r < 4; r++) {                /* rows 2 g and 2 g + 1 of the first columns; of the others */
                uint32_t word = words[4 * (r % 2) + i];
                if (TYPE == Q4) a[i][r] = word >> r / 2 * 4 & 0x0f0f0f0f;
                else if (TYPE == NF4) a[i][r] = of_nf4(word >> r / 2 * 16);
                else a[i][r] = words[8 * (r % 2) + 2 * i + r / 2];
            }
    }
};

/* A group's sum as FP32. Where converting is slow (a T4 does 16 a cycle, and 64 additions) the sum starts at run.c's ROUNDER_BITS:
 * then the integer's bits, read as a float, are ROUNDER more than it is (less than 2^22: 128 * 255 * 127). BLOCKS_HELD: blocks of
 * product_many that a multiprocessor shall hold at once; a T4's shared memory often holds one, which may then have twice the
 * registers. */
#if __CUDA_ARCH__ >= 800
enum { SUM_START = 0, BLOCKS_HELD = 2 };
__device__ inline float sum_value(int sum) { return (float)sum; }
#else
enum { SUM_START = ROUNDER_BITS, BLOCKS_HELD = 1 };
__device__ inline float sum_value(int sum) { return __int_as_float(sum) - ROUNDER; }
#endif

/* Adds to the totals of a row and two tokens a group's sums. row: the weights' (scale, zero); tokens: (scale, sum) of each. */
__device__ inline void add_sums(float to[2], float2 row, float4 tokens, const int sum[2]) {
    to[0] = fmaf(row.x * tokens.x, fmaf(-row.y, tokens.y, sum_value(sum[0])), to[0]);
    to[1] = fmaf(row.x * tokens.z, fmaf(-row.y, tokens.w, sum_value(sum[1])), to[1]);
}

/* Adds a stage's columns to total[token tile][two row tiles][row 2 g, 2 g + 1; token 2 q, 2 q + 1], of N token tiles.
 *   a       [row tile][instruction][register], of Stage::unpack
 *   scales  [row tile][group], of Stage
 *   x       [token tile]: 16 bytes twice of the activations of token g
 *   scale   [token tile][group]: (scale, sum) of the tokens 2 q and 2 q + 1
 * The instructions of a sum wait for one another, and for long; those of 2 N sums stand side by side, so that there is something
 * to do. */
template <int TYPE, int GROUPS, int N>
__device__ inline void add_tiles(float total[N][2][4], const uint32_t a[2][4][4], const uint2 scales[2][GROUPS],
                                 const uint4 x[N][2], const float4 scale[N][GROUPS]) {
    const int start[4] = {SUM_START, SUM_START, SUM_START, SUM_START}, COUNT = 4 / GROUPS;
    UNROLL for (int g = 0; g < GROUPS; g++) {
        int sum[N][2][4];
        UNROLL for (int i = 0; i < COUNT; i++)
            UNROLL for (int t = 0; t < N; t++)
                UNROLL for (int m = 0; m < 2; m++) {
                    const uint32_t *b = (const uint32_t *)x[t] + 2 * (g * COUNT + i);
                    if (TYPE == F16) mma_halves(total[t][m], a[m][i], b);
                    else mma_codes(sum[t][m], a[m][g * COUNT + i], b, i ? sum[t][m] : start);
                }
        if (TYPE == F16) return;
        UNROLL for (int m = 0; m < 2; m++)
            UNROLL for (int h = 0; h < 2; h++) {
                float2 w = __half22float2(((const __half2 *)&scales[m][g])[h]);
                UNROLL for (int t = 0; t < N; t++) add_sums(total[t][m] + 2 * h, w, scale[t][g], sum[t][m] + 2 * h);
            }
    }
}

/* With the GPU's own exponential and reciprocal, and nothing for numbers below 2^-126: silu(-88) is -0. */
__device__ inline float silu(float x) {
    float e, share;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.44269504f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.0f + e));
    return x * share;
}

/* Stores what a warp has of 16 rows by 8 N tokens, the first of them `token`; tile t of 8 tokens is total[t * apart]. out: [n]
 * [w.row_tiles * 16]; or, of w13, where an even row is the gate of the next, h = silu(gate) * up, [n][w.units], or (w.to_halves) as
 * w2's input, which lies as w13's does, since both are FP16 in the same step. */
template <int TYPE, int N>
__device__ inline void store(float *out, const Weights &w, Inputs in, const float total[][4], int apart, int row_tile, int token,
                             int n) {
    int lane = threadIdx.x % 32, first = token + lane % 4 * 2, left = n - first, unit = row_tile * 8 + lane / 4;
    uint32_t width = w.units ? w.units : w.row_tiles * 16;
    float *to = out + (size_t)first * width + (w.units ? unit : 2 * unit);
    in.q = (int8_t *)out;
    int8_t *halves[2] = {input_at<2>(in, w, first, unit), input_at<2>(in, w, first + 1, unit)};     /* 8 tokens on: 1,024 bytes */
    if (w.units) {
        float h[N][2];                  /* all of them at once, since each takes long */
        UNROLL for (int i = 0; i < 2 * N; i++)
            h[i / 2][i % 2] = silu(total[i / 2 * apart][i % 2]) * total[i / 2 * apart][i % 2 + 2];
        if (TYPE == F16 && w.to_halves)
            UNROLL for (int i = 0; i < 2 * N; i++) {
                __half x = to_half(h[i / 2][i % 2]);
                if (i / 2 * 8 + i % 2 < left) *(__half *)(halves[i % 2] + i / 2 * 1024) = x;
            }
        else
            UNROLL for (int i = 0; i < 2 * N; i++)
                if (i / 2 * 8 + i % 2 < left) to[(size_t)width * (i / 2 * 8 + i % 2)] = h[i / 2][i % 2];
    } else
        UNROLL for (int i = 0; i < 2 * N; i++)
            if (i / 2 * 8 + i % 2 < left)
                *(float2 *)(to + (size_t)width * (i / 2 * 8 + i % 2)) =
                    make_float2(total[i / 2 * apart][i % 2], total[i / 2 * apart][i % 2 + 2]);
}

__device__ inline void add(float4 &sum, float4 x, float share = 1) {
    sum.x = fmaf(share, x.x, sum.x); sum.y = fmaf(share, x.y, sum.y);
    sum.z = fmaf(share, x.z, sum.z); sum.w = fmaf(share, x.w, sum.w);
}

/* Adds to the sums of the first ROW_WARPS of a block's warps those of the others that have the same rows, every ROW_WARPS-th, in
 * order. total: as above; room: [others][total's pairs of tiles][thread]. */
template <int TOKEN_TILES, int ROW_WARPS>
__device__ inline void add_warps(float total[][2][4], float4 (*room)[TOKEN_TILES * 2][32], int others) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    if (warp >= ROW_WARPS)
        UNROLL for (int t = 0; t < TOKEN_TILES * 2; t++) room[warp - ROW_WARPS][t][lane] = *(float4 *)total[t / 2][t % 2];
    __syncthreads();
    for (int other = warp; warp < ROW_WARPS && other < others; other += ROW_WARPS)
        UNROLL for (int t = 0; t < TOKEN_TILES * 2; t++) add(*(float4 *)total[t / 2][t % 2], room[other][t][lane]);
}

/* For up to 8 tokens, where reading the weights is all that takes time. A block's warps share 32 rows and take turns at the tiles
 * of columns: the next is on its way while others compute, the first before the kernel before this one has ended. That little is
 * asked for ahead leaves registers for many blocks, which is worth more (SPEED.md). gridDim.x: blocks of 32 rows. gridDim.y: parts
 * of the columns (split-K), each with an out of its own, which whoever reads it adds up. Blocks of 8 warps, because parts are then
 * few; of 4 for w13, which is not cut into parts: a 7B's blocks then have room on an H100 all at once. */
template <int TYPE, int GROUPS>
__global__ void __launch_bounds__(256, TYPE == Q4 ? 3 : 2)
product_few(float *out, Weights w, Inputs in, int n) {
    __shared__ float4 room[7][2][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int row_tile = blockIdx.x * 2, all = w.column_tiles;
    int k = all * blockIdx.y / gridDim.y + warp, end = all * (blockIdx.y + 1) / gridDim.y;
    Stage<TYPE, GROUPS> s(w, row_tile);
    float total[1][2][4] = {};
    if (k < end) s.load(w, k, true);
    wait_for_inputs();

    const uint4 *inputs = (const uint4 *)in.q + lane / 4 * 8 + lane % 4 * 2;
    const float4 *input_scales = (const float4 *)in.scale + lane % 4;
    uint4 x[1][2] = {};
    float4 scale[1][GROUPS];
    auto load_inputs = [&](int k) {     /* of the tokens that there are */
        UNROLL for (int h = 0; h < 2; h++)
            if (lane / 4 < n) x[0][h] = inputs[(size_t)k * in.stride * 8 + h];
        UNROLL for (int g = 0; g < GROUPS && TYPE != F16; g++)
            scale[0][g] = input_scales[(size_t)(k * GROUPS + g) * (in.stride / 2)];
    };
    if (k < end) load_inputs(k);
    for (; k < end; k += warps) {
        uint32_t a[2][4][4];
        s.unpack(a[0], 0);
        s.unpack(a[1], 1);
        add_tiles<TYPE, GROUPS, 1>(total, a, s.scales, x, scale);
        if (k + warps < end) { s.load(w, k + warps, true); load_inputs(k + warps); }
    }
    add_warps<1, 1>(total, room, warps - 1);
    for (int m = 0; m < 2 && warp == 0; m++)
        store<TYPE, 1>(out + (size_t)blockIdx.y * n * w.row_tiles * 16, w, in, total[0] + m, 0, row_tile + m, 0, n);
}

__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* Copies of 16 bytes into shared memory that go on while the thread computes (from 8.0 on); before, the bytes wait in a register,
 * and land() stores them. wait_for_copies: for all but the last LATEST groups. */
typedef struct { uint4 value; uint32_t to; bool wanted; } Copy;         /* before 8.0 */
#if __CUDA_ARCH__ >= 800
__device__ inline void start_copy(Copy &, uint32_t to, const void *from, bool wanted) {
    if (wanted) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ inline void land(Copy *, int) {}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;"); }
template <int LATEST> __device__ inline void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LATEST)); }
#else
__device__ inline void start_copy(Copy &c, uint32_t to, const void *from, bool wanted) {
    if (wanted) c.value = *(const uint4 *)from;
    c.to = to;
    c.wanted = wanted;
}
__device__ inline void land(Copy *copies, int n) {
    UNROLL for (int i = 0; i < n; i++) if (copies[i].wanted) *(uint4 *)__cvta_shared_to_generic(copies[i].to) = copies[i].value;
}
__device__ inline void end_group() {}
template <int LATEST> __device__ inline void wait_for_copies() {}
#endif

/* For more tokens. A block makes 128 rows by 8 TILES tokens: 4 warps of 32 rows, and 4 more that have other tokens (TOKEN_WARPS),
 * or other tiles of columns (COLUMN_WARPS). Activations go through shared memory, DEPTH steps ahead; weights through registers, a
 * step ahead. A token's 128 bytes have pieces of 16 exchanged where the token is odd, so that the threads of a quarter warp meet
 * eight different banks. ABREAST: how many token tiles a warp computes side by side. gridDim.x: blocks of tokens; y: of 128 rows;
 * z: parts of the columns, as above. */
template <int TYPE, int GROUPS, int TILES>
__global__ void __launch_bounds__(256, TILES < 8 && GROUPS < 4 ? BLOCKS_HELD : 1)
product_many(float *out, Weights w, Inputs in, int n) {
    const int TOKEN_WARPS = TILES == 16 ? 2 : 1, COLUMN_WARPS = 3 - TOKEN_WARPS, TOKEN_TILES = TILES / TOKEN_WARPS;
    const int TOKENS = 8 * TILES, DEPTH = TILES < 8 ? 3 : 1, ABREAST = TILES == 4 ? 4 : 2;
    const int SCALES = COLUMN_WARPS * GROUPS * TOKENS / 2;
    const int X = COLUMN_WARPS * TOKENS * 8, COPIES = X / 256;  /* pieces of 16 bytes of a step's activations; of a thread */
    __shared__ uint4 x[(DEPTH + 1) * X];                        /* [DEPTH + 1][COLUMN_WARPS][TOKENS][8] */
    __shared__ float4 scales[(DEPTH + 1) * SCALES];             /* [DEPTH + 1][COLUMN_WARPS][GROUPS][TOKENS / 2] */
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row_warp = warp % 4, token_warp = warp / 4 % TOKEN_WARPS, column_warp = warp / 4 / TOKEN_WARPS;
    int row_tile = (blockIdx.y * 4 + row_warp) * 2, token = blockIdx.x * TOKENS, all = w.column_tiles;
    int first = all * blockIdx.z / gridDim.z, end = all * (blockIdx.z + 1) / gridDim.z;
    int steps = (end - first + COLUMN_WARPS - 1) / COLUMN_WARPS, k = first + column_warp;
    Stage<TYPE, GROUPS> s(w, row_tile);
    float total[TOKEN_TILES][2][4] = {};
    s.load(w, min(k, end - 1), TOKEN_WARPS == 1);               /* two: many tokens, and blocks of them */

    /* What this thread copies: COPIES pieces of 16 bytes, 32 tokens or a tile from one another, the first being `piece` of token t0
     * of tile tile0; and, if it is among the first, a (scale, sum) of two tokens. */
    Copy copies[COPIES + 1];
    int piece = threadIdx.x % 8, t0 = threadIdx.x / 8 % TOKENS, tile0 = threadIdx.x / 8 / TOKENS;
    int scale_row = threadIdx.x / (TOKENS / 2);
    const uint4 *from = (const uint4 *)in.q + ((size_t)(first + tile0) * in.stride + token + t0) * 8 + piece;
    const float2 *scale_from = in.scale + (size_t)(first * GROUPS + scale_row) * in.stride + token + threadIdx.x % (TOKENS / 2) * 2;
    uint32_t to = shared_address(x + (tile0 * TOKENS + t0) * 8 + (piece ^ t0 % 2));
    uint32_t scale_to = shared_address(scales + threadIdx.x);
    size_t tile_step = (size_t)in.stride * 8;
    bool has_scale = TYPE != F16 && threadIdx.x < SCALES;
    wait_for_inputs();

    auto fetch = [&](int step) {        /* the activations of a step, on their way */
        int buffer = step % (DEPTH + 1), left = end - first - step * COLUMN_WARPS;
        UNROLL for (int i = 0; i < COPIES; i++) {               /* 32 tokens further each, or tiles */
            int rows = i * 32, tile = rows / TOKENS, t = rows % TOKENS;
            start_copy(copies[i], to + (buffer * X + rows * 8) * 16, from + tile * tile_step + t * 8, tile0 + tile < left);
        }
        start_copy(copies[COPIES], scale_to + buffer * SCALES * 16, scale_from, has_scale && scale_row / GROUPS < left);
        from += COLUMN_WARPS * tile_step;
        scale_from += (size_t)COLUMN_WARPS * GROUPS * in.stride;
        end_group();
    };
    /* What it reads, of token lane / 4 of 8: two pieces, exchanged as above, and two tokens' scales. */
    int b_at = (column_warp * TOKENS + token_warp * TOKEN_TILES * 8 + lane / 4) * 8, odd = lane / 4 % 2;
    int b_piece[2] = {b_at + (lane % 4 * 2 ^ odd), b_at + ((lane % 4 * 2 + 1) ^ odd)};
    int scale_at = column_warp * GROUPS * (TOKENS / 2) + token_warp * TOKEN_TILES * 4 + lane % 4;
    for (int step = 0; step < DEPTH; step++) { fetch(step); land(copies, COPIES + 1); }
    for (int step = 0; step < steps; step++, k += COLUMN_WARPS) {
        uint32_t a[2][4][4];
        uint2 scales_now[2][GROUPS];
        int buffer = step % (DEPTH + 1);
        wait_for_copies<DEPTH - 1>();
        __syncthreads();
        fetch(step + DEPTH);
        if (COLUMN_WARPS == 1 || k < end) {
            s.unpack(a[0], 0);
            s.unpack(a[1], 1);
            memcpy(scales_now, s.scales, sizeof scales_now);
            s.load(w, min(k + COLUMN_WARPS, end - 1), TOKEN_WARPS == 1);
            UNROLL for (int t = 0; t < TOKEN_TILES; t += ABREAST) {
                uint4 b[ABREAST][2];
                float4 scale[ABREAST][GROUPS];
                UNROLL for (int i = 0; i < ABREAST; i++) {
                    UNROLL for (int h = 0; h < 2; h++) b[i][h] = x[buffer * X + b_piece[h] + (t + i) * 64];
                    UNROLL for (int g = 0; g < GROUPS && TYPE != F16; g++)
                        scale[i][g] = scales[buffer * SCALES + scale_at + g * (TOKENS / 2) + (t + i) * 4];
                }
                add_tiles<TYPE, GROUPS, ABREAST>(total + t, a, scales_now, b, scale);
            }
        }
        land(copies, COPIES + 1);
    }
    if (COLUMN_WARPS > 1) add_warps<TOKEN_TILES, 4>(total, (float4(*)[TOKEN_TILES * 2][32])x, 4);
    if (column_warp) return;
    out += (size_t)blockIdx.z * n * w.row_tiles * 16;
    UNROLL for (int m = 0; m < 2; m++)
        store<TYPE, TOKEN_TILES>(out, w, in, total[0] + m, 2, row_tile + m, token + token_warp * TOKEN_TILES * 8, n);
}

#include "hopper.h"      /* products on a Hopper; skip it on a first reading */

/* ------------------------------------------------------------------------------------------------------------------
 * 4. Between the products                                                                                           */

/* What a step must know, as it is copied to the device: three lists side by side, each with a length of its own. */
typedef struct {
    int id, pos, slot;                  /* the i-th token */
    int first, n;                       /* the i-th run of tokens, a tile of queries of attention: its first, and how many */
    int wanted;                         /* the i-th token whose logits are wanted */
    double random;                      /* what its next id is drawn with */
} Entry;

/* The largest of x, or the sum, over the threads that have a group of activations, 4 each. */
__device__ inline int over_group(int x, bool largest, int group) {
#if __CUDA_ARCH__ >= 800
    if (group == COLUMNS) return largest ? __reduce_max_sync(~0u, x) : __reduce_add_sync(~0u, x);
#endif
    for (int apart = group / 8; apart; apart /= 2) {
        int other = __shfl_xor_sync(~0u, x, apart);
        x = largest ? max(x, other) : x + other;
    }
    return x;
}

/* Puts 128 activations of a token where the product with w reads them: rounded to int8 by group, or as FP16. By a
 * warp, each thread of which has four neighbours. */
__device__ inline void write_inputs(Inputs in, const Weights &w, int token, int tile, float4 x) {
    int lane = threadIdx.x % 32, group = w.group;
    float v[4] = {x.x, x.y, x.z, x.w}, max = 0;
    if (w.type == F16) {
        __half2 low = __halves2half2(to_half(v[0]), to_half(v[1])), high = __halves2half2(to_half(v[2]), to_half(v[3]));
        *(uint2 *)input_at<2>(in, w, token, tile * COLUMNS + lane * 4) = make_uint2(*(uint32_t *)&low, *(uint32_t *)&high);
        return;
    }
    for (int i = 0; i < 4; i++) max = fmaxf(max, fabsf(v[i]));
    max = __int_as_float(over_group(__float_as_int(max), true, group));         /* floats >= 0 order as their bits do */
    float inverse = max > 0 ? 127.0f / max : 0;
    int sum = 0;
    uint32_t bytes = 0;
    for (int i = 0; i < 4; i++) {
        int q = __float_as_int(fmaf(v[i], inverse, ROUNDER)) - (int)ROUNDER_BITS;      /* to nearest, as in run.c */
        bytes |= (uint32_t)(q & 255) << 8 * i;
        sum += q;
    }
    *(uint32_t *)input_at<1>(in, w, token, tile * COLUMNS + lane * 4) = bytes;
    sum = over_group(sum, false, group);
    if (lane * 4 % group == 0)
        in.scale[(size_t)((tile * COLUMNS + lane * 4) >> w.shift) * in.stride + token] = make_float2(max / 127.0f, (float)sum);
}

/* x[token] = the embedding's row; rotations[token] = cos and sin of RoPE's angles. blockIdx.x: the token; y: 0 for the angles, else
 * a part of the row, so that neither waits for the other. */
enum { ROW_BLOCKS = 8 };
__global__ void embed(float *x, float2 *rotations, const Entry *entries, Weights w, const double *frequencies, int half) {
    wait_for_inputs();
    int token = blockIdx.x, first = ((int)blockIdx.y - 1) * blockDim.x + threadIdx.x;
    for (int i = first; blockIdx.y && i < w.cols; i += ROW_BLOCKS * blockDim.x)
        x[(size_t)token * w.width + i] = weight_at(w, entries[token].id, i);
    for (int i = threadIdx.x; blockIdx.y == 0 && i < half; i += blockDim.x) {
        double sine, cosine;
        sincos(entries[token].pos * frequencies[i], &sine, &cosine);
        rotations[(size_t)token * half + i] = make_float2((float)cosine, (float)sine);
    }
}

/* x += the parts of a product; then its norm goes into the product with w. A block for each token, or for each of `wanted`: WARPS
 * warps, each with every WARPS-th 128 columns, MOST at most. What counts here is the time until an answer comes: all that is
 * read of 128, or of 256, is asked for before any of it is used. PARTS: as many as there can be; or one, for a prefill, two
 * blocks of which then fit on a multiprocessor. x: [n][width]; parts: [n_parts][n][width]. */
enum { MAX_DIM = 16384 };
template <int WARPS, int MOST, int PARTS>
__global__ void __launch_bounds__(32 * WARPS, PARTS == 1 ? 2 : 1)
norm_input(float *x, const float *parts, int n_parts, int n, const float *weight, float eps, Inputs in, Weights w,
           const Entry *wanted) {
    const int STEP = WARPS * COLUMNS, TOGETHER = MOST < 2 ? MOST : 2;
    __shared__ float sums[WARPS];
    int warp = threadIdx.x / 32, n_tiles = (w.width / COLUMNS - warp + WARPS - 1) / WARPS;
    auto load = [](const float *from, bool there) { return there ? *(const float4 *)from : make_float4(0, 0, 0, 0); };
    float4 v[MOST], weights[MOST];
    UNROLL for (int i = 0; i < MOST; i++) weights[i] = load(weight + threadIdx.x * 4 + i * STEP, i < n_tiles);
    wait_for_inputs();
    int token = wanted ? wanted[blockIdx.x].wanted : blockIdx.x;
    size_t width = w.width, first = token * width + threadIdx.x * 4;
    float squares = 0;
    UNROLL for (int pair = 0; pair < MOST; pair += TOGETHER) {
        float4 part[TOGETHER][PARTS];
        if (pair >= n_tiles) break;
        UNROLL for (int i = 0; i < TOGETHER; i++) {
            size_t at = first + (pair + i) * STEP;
            v[pair + i] = load(x + at, pair + i < n_tiles);
            UNROLL for (int p = 0; p < PARTS; p++) part[i][p] = load(parts + p * n * width + at, p < n_parts && pair + i < n_tiles);
        }
        UNROLL for (int i = 0; i < TOGETHER; i++) {
            float4 &sum = v[pair + i];
            UNROLL for (int p = 0; p < PARTS; p++) add(sum, part[i][p]);
            squares += (sum.x * sum.x + sum.y * sum.y) + (sum.z * sum.z + sum.w * sum.w);
        }
    }
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    if (threadIdx.x % 32 == 0) sums[warp] = squares;
    __syncthreads();
    squares = sums[threadIdx.x % WARPS];            /* over the block, to all its threads; always in the same order */
    for (int other = WARPS / 2; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
    float scale = rsqrtf(squares / (float)w.cols + eps);
    UNROLL for (int i = 0; i < MOST; i++) {
        if (i >= n_tiles) break;
        *(float4 *)(x + first + i * STEP) = v[i];
        write_inputs(in, w, blockIdx.x, warp + WARPS * i,
                     make_float4(weights[i].x * (v[i].x * scale), weights[i].y * (v[i].y * scale),
                                 weights[i].z * (v[i].z * scale), weights[i].w * (v[i].w * scale)));
    }
}

/* wqkv's product becomes what attention reads: its parts are added up, queries and keys turned.
 *   queries: FP16, [n][n_heads][width], times query_scale = log2(e) / sqrt(head_dim), because attention's softmax is in powers
 *   of two
 *   keys and values: [slot][n_kv_heads][ring / 32] blocks of 32 positions; keys [32][width], values [width][32]. E, the type of
 *   an element, is FP16, or with --kv q8 bytes, behind which come 32 FP16 scales, one of each position: x is about
 *   scale * (byte - 128)
 * group: query heads of a key head; width: head_dim rounded up to a power of two; cache: bytes of a ring. All of attention's
 * kernels are given all of this. */
typedef struct {
    int      n_heads, n_kv_heads, group, head_dim, width, ring, window;
    float    query_scale;
    size_t   cache;
    const Entry *entries;
    int      n, n_runs;                 /* tokens; runs of them, in a prefill */
    int      n_parts, parts_width;      /* of wqkv's product, which are still to be added up: */
    const float *parts;                 /* [n_parts][n][parts_width] */
    float2  *rotations;                 /* [n][head_dim / 2] of (cos, sin) */
    __half  *queries;                   /* [n][n_heads][width] */
    unsigned char *keys, *values;       /* [n_layers][slot] as above; a kernel's are those of its layer */
    float   *out;                       /* what attention found in each span, [n_spans][n][n_heads][width] */
    float2  *softmax;                   /* [n_spans][n][n_heads] of (maximum, sum), the maximum as an exponent of two */
    int      span, n_spans;             /* positions that a block of decoding attention takes; how many of these there are */
    int      head_parts;                /* blocks among which a key head's query heads are divided */
    Inputs   in;                        /* of the product with wo, */
    Weights  wo;
    bool     fused;                     /* which the result goes straight into: one span, one part, heads that fill its tiles */
} Heads;
template <class E>
__device__ constexpr size_t cache_block(int width) { return 32 * (width * sizeof(E) + (sizeof(E) == 1 ? sizeof(__half) : 0)); }

/* Head `head` of a token, by a warp: the parts of its product are added up, it is turned if it is no value, and then it is put
 * where attention reads it: a query in `query`, a key or value in the cache. Thread i has the elements i and i + head_dim / 2,
 * i + 32 and i + 32 + head_dim / 2. As norm_input it asks for everything first. */
template <class E> __device__ inline void make_head(__half *query, const Heads &c, int token, int head) {
    int half = c.head_dim / 2, lane = threadIdx.x % 32, pos = c.entries[token].pos;
    const float *of_head = c.parts + (size_t)token * c.parts_width + head * c.head_dim;
    bool turned = head < c.n_heads + c.n_kv_heads;      /* a query or a key */
    float2 x[2], part[2][MAX_PARTS], turn[2];
    UNROLL for (int j = 0; j < 2; j++) {
        int i = lane + 32 * j;
        turn[j] = i < half && turned ? c.rotations[(size_t)token * half + i] : make_float2(1, 0);
        UNROLL for (int p = 0; p < MAX_PARTS; p++) {
            const float *at = of_head + (size_t)p * c.n * c.parts_width + i;
            part[j][p] = i < half && p < c.n_parts ? make_float2(at[0], at[half]) : make_float2(0, 0);
        }
    }
    UNROLL for (int j = 0; j < 2; j++) {
        float2 sum = part[j][0];
        UNROLL for (int p = 1; p < MAX_PARTS; p++) { sum.x += part[j][p].x; sum.y += part[j][p].y; }
        x[j] = make_float2(sum.x * turn[j].x - sum.y * turn[j].y, sum.y * turn[j].x + sum.x * turn[j].y);
    }
    auto each = [&](auto use) {                         /* use(element, its value) */
        for (int j = 0, i = lane; j < 2; j++, i += 32)
            if (i < half) { use(i, x[j].x); use(i + half, x[j].y); }
    };
    if (head < c.n_heads) { each([&](int i, float v) { query[i] = to_half(v * c.query_scale); }); return; }

    int at = pos % 32;
    size_t kv_head = (size_t)c.entries[token].slot * c.n_kv_heads + (head - c.n_heads) % c.n_kv_heads;
    unsigned char *block = (turned ? c.keys : c.values) + kv_head * c.cache + pos % c.ring / 32 * cache_block<E>(c.width);
    float max = fmaxf(fmaxf(fabsf(x[0].x), fabsf(x[0].y)), fmaxf(fabsf(x[1].x), fabsf(x[1].y))), inverse = 0;
    if (sizeof(E) == 1) {
        for (int other = 16; other; other /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, other));
        __half scale = __float2half_ru(fminf(max / 127.0f, 65504.0f));
        inverse = __half2float(scale) > 0 ? 1 / __half2float(scale) : 0;
        if (lane == 0) ((__half *)(block + 32 * c.width))[at] = scale;
    }
    each([&](int i, float v) {
        size_t to = turned ? at * c.width + i : i * 32 + at;
        if (sizeof(E) == 1) block[to] = (unsigned char)(128 + __float2int_rn(fminf(fmaxf(v * inverse, -127.0f), 127.0f)));
        else ((__half *)block)[to] = to_half(v);
    });
}

/* What attention starts from, in a prefill. A warp for each head, 8 in a block; blockIdx.y: the token. */
template <class E> __global__ void rope_and_cache(Heads c) {
    wait_for_inputs();
    int head = blockIdx.x * 8 + threadIdx.x / 32, token = blockIdx.y;
    if (head >= c.n_heads + 2 * c.n_kv_heads) return;
    make_head<E>(c.queries + ((size_t)token * c.n_heads + head) * c.width, c, token, head);
}

/* Activations that stand in memory as FP32, [n][width], into the product with w. A warp for each 128 columns, 8 in a block;
 * blockIdx.y: the token. */
__global__ void quantize_input(const float *from, Inputs in, Weights w) {
    wait_for_inputs();
    int tile = blockIdx.x * 8 + threadIdx.x / 32, token = blockIdx.y, first = tile * COLUMNS + threadIdx.x % 32 * 4;
    if (first < w.width) write_inputs(in, w, token, tile, *(const float4 *)(from + (size_t)token * w.width + first));
}

/* The same, of what attention found in each span. */
__global__ void attention_input(Heads c) {
    wait_for_inputs();
    int tile = blockIdx.x * 8 + threadIdx.x / 32, token = blockIdx.y;
    float out[4];
    if (tile * COLUMNS >= c.wo.width) return;
    UNROLL for (int i = 0; i < 4; i++) {
        int column = tile * COLUMNS + threadIdx.x % 32 * 4 + i;
        size_t head = (size_t)token * c.n_heads + column / c.head_dim, step = (size_t)c.n * c.n_heads;
        const float *of_head = c.out + head * c.width + column % c.head_dim;
        float max = -INFINITY, sum = 0, x = 0;
        out[i] = 0;
        if (column >= c.wo.cols) continue;
        for (int s = 0; s < c.n_spans; s++) max = fmaxf(max, c.softmax[head + s * step].x);
        for (int s = 0; s < c.n_spans; s++) {
            float2 of = c.softmax[head + s * step];
            if (of.y == 0) continue;
            float share = exp2f(of.x - max);
            x = fmaf(share, of_head[s * step * c.width], x);
            sum = fmaf(share, of.y, sum);
        }
        out[i] = x * (1.0f / sum);      /* as where attention does it itself */
    }
    write_inputs(c.in, c.wo, token, tile, make_float4(out[0], out[1], out[2], out[3]));
}

/* ------------------------------------------------------------------------------------------------------------------
 * 5. Attention                                                                                                      */

__device__ inline int first_position(int pos, int window) { return window && pos >= window ? pos - window + 1 : 0; }

/* The plain one, to be read, and for test_all.c to compare with: a thread for each query head of each token, two passes over the
 * keys. */
template <class E> __global__ void attention_plain(Heads c) {
    int at = blockIdx.x * blockDim.x + threadIdx.x, token = at / c.n_heads, head = at % c.n_heads;
    if (token >= c.n) return;
    const __half *q = c.queries + (size_t)at * c.width;
    size_t cache = ((size_t)c.entries[token].slot * c.n_kv_heads + head / c.group) * c.cache;
    auto element = [&](const unsigned char *of, int p, int i) {
        const unsigned char *block = of + cache + p % c.ring / 32 * cache_block<E>(c.width);
        return sizeof(E) == 1 ? __half2float(((const __half *)(block + 32 * c.width))[p % 32]) * (block[i] - 128)
                              : __half2float(((const __half *)block)[i]);
    };
    float max = -INFINITY, sum = 0;
    for (int d = 0; d < c.head_dim; d++) c.out[(size_t)at * c.width + d] = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int p = first_position(c.entries[token].pos, c.window); p <= c.entries[token].pos; p++) {
            float score = 0;
            for (int d = 0; d < c.head_dim; d++) score += __half2float(q[d]) * element(c.keys, p, p % 32 * c.width + d);
            if (pass == 0) { max = fmaxf(max, score); continue; }
            float e = exp2f(score - max);
            sum += e;
            for (int d = 0; d < c.head_dim; d++) c.out[(size_t)at * c.width + d] += e * element(c.values, p, d * 32 + p % 32);
        }
    c.softmax[at] = make_float2(max, sum);
}

/* Eight neighbours of a cache as FP16. Bytes become the low ones of halves of which 0x64 is the high one: 1,024 + byte. */
__device__ inline uint4 eight_halves(uint4 x) { return x; }
__device__ inline uint4 eight_halves(uint2 x) {
    const __half2 zero = __floats2half2_rn(1152, 1152);
    uint32_t words[4] = {__byte_perm(x.x, 0x64646464, 0x4140), __byte_perm(x.x, 0x64646464, 0x4342),
                         __byte_perm(x.y, 0x64646464, 0x4140), __byte_perm(x.y, 0x64646464, 0x4342)};
    for (int i = 0; i < 4; i++) *(__half2 *)&words[i] = __hsub2(*(__half2 *)&words[i], zero);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/* A warp takes 16 queries - neighbouring tokens of a sequence, and the heads that share a key head - and goes over their keys by
 * 32, with a running maximum (FlashAttention-2, Dao 2023). Scores and values are two products on the tensor cores: what the first
 * leaves in a thread is what the second wants there. This much both kernels below share. WIDTH: head_dim rounded up to a power of
 * two. E: of an element of the cache. q: the queries of row g, row g + 8, in shared or global memory, or NULL. */
template <int WIDTH, class E> struct Attention {
    uint32_t a[WIDTH / 32][2][4];       /* the queries: of 32 elements, of two instructions */
    float sum[WIDTH / 8][4];            /* of 8 elements: row g, elements 2 q and 2 q + 1; row g + 8 */
    float max[2], total[2];             /* the largest score, and the sum of 2^(score - max): of row g, row g + 8 */

    __device__ Attention(const __half *const q[2]) {
        int lane = threadIdx.x % 32;
        memset(sum, 0, sizeof sum);
        UNROLL for (int h = 0; h < 2; h++) {
            max[h] = -INFINITY;
            total[h] = 0;
            UNROLL for (int j = 0; j < WIDTH / 32; j++) {
                uint4 x = make_uint4(0, 0, 0, 0);
                if (q[h]) x = *(const uint4 *)(q[h] + 32 * j + 8 * (lane % 4));
                a[j][0][h] = x.x; a[j][0][2 + h] = x.y; a[j][1][h] = x.z; a[j][1][2 + h] = x.w;
            }
        }
    }

    /* The 32 positions from `start` on, of which row g sees those from first[0] to pos[0], row g + 8 those from first[1] to
     * pos[1]. */
    __device__ inline void add(const unsigned char *keys, const unsigned char *values, int ring, int start, const int first[2],
                               const int pos[2]) {
        typedef std::conditional_t<sizeof(E) == 1, uint2, uint4> Eights;
        int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        size_t block = start % ring / 32 * cache_block<E>(WIDTH);
        const E *k = (const E *)(keys + block), *v = (const E *)(values + block);
        float score[4][4] = {};
        Eights value[WIDTH / 8];        /* asked for before the scores, which take their time */
        uint4 scales[2];                /* of this thread's eight keys and values */
        UNROLL for (int d = 0; d < WIDTH / 8; d++) value[d] = *(const Eights *)(v + (8 * d + g) * 32 + 8 * q);
        if (sizeof(E) == 1) {
            scales[0] = *(const uint4 *)(k + 32 * WIDTH + 16 * q);
            scales[1] = *(const uint4 *)(v + 32 * WIDTH + 16 * q);
        }
        UNROLL for (int t = 0; t < 4; t++)      /* 8 keys: column 2 q + i of the t-th is key 8 q + 2 t + i, as the values want it */
            UNROLL for (int j = 0; j < WIDTH / 32; j++) {
                uint4 x = eight_halves(*(const Eights *)(k + (8 * (g / 2) + 2 * t + g % 2) * WIDTH + 32 * j + 8 * q));
                mma_halves(score[t], a[j][0], &x.x);
                mma_halves(score[t], a[j][1], &x.z);
            }
        UNROLL for (int i = 0; i < 16 && sizeof(E) == 1; i++)
            score[i / 4][i % 4] *= __half2float(((const __half *)&scales[0])[i / 4 * 2 + i % 2]);
        uint32_t p[2][4];               /* 2^(score - max) as FP16: [t / 2][t % 2][row g, row g + 8] */
        UNROLL for (int h = 0; h < 2; h++) {
            if (start + 31 > pos[h] || start < first[h])
                UNROLL for (int t = 0; t < 4; t++)
                    UNROLL for (int i = 0; i < 2; i++) {
                        int at = start + 8 * q + 2 * t + i;
                        if (at > pos[h] || at < first[h]) score[t][2 * h + i] = -INFINITY;
                    }
            float largest = max[h];
            UNROLL for (int t = 0; t < 4; t++) largest = fmaxf(largest, fmaxf(score[t][2 * h], score[t][2 * h + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            float base = largest == -INFINITY ? 0 : largest, shrink = exp2f(max[h] - base);
            max[h] = largest;
            total[h] *= shrink;
            UNROLL for (int t = 0; t < 4; t++) {
                float x = exp2f(score[t][2 * h] - base), y = exp2f(score[t][2 * h + 1] - base);
                total[h] += x + y;
                if (sizeof(E) == 1) {
                    float2 of_values = __half22float2(((const __half2 *)&scales[1])[t]);
                    x *= of_values.x;
                    y *= of_values.y;
                }
                __half2 both = __floats2half2_rn(x, y);
                p[t / 2][t % 2 * 2 + h] = *(uint32_t *)&both;
            }
            UNROLL for (int d = 0; d < WIDTH / 8; d++) { sum[d][2 * h] *= shrink; sum[d][2 * h + 1] *= shrink; }
        }
        UNROLL for (int d = 0; d < WIDTH / 8; d++) {
            uint4 x = eight_halves(value[d]);
            mma_halves(sum[d], p[0], &x.x);
            mma_halves(sum[d], p[1], &x.z);
        }
    }

    __device__ inline void finish() {   /* puts together the sums of the four threads that share a row */
        UNROLL for (int h = 0; h < 2; h++) {
            total[h] += __shfl_xor_sync(~0u, total[h], 1);
            total[h] += __shfl_xor_sync(~0u, total[h], 2);
        }
    }
};

/* What attention found goes into the product with wo: a token's n_heads heads from `head` on, which fill tiles of columns. By a
 * warp: every `step`-th tile from `first` on. found(h, d): elements d to d + 3 of the h-th. */
template <class Found>
__device__ inline void write_heads(const Heads &c, int token, int head, int n_heads, int first, int step, Found found) {
    for (int tile = first, head_dim = c.head_dim; tile < n_heads * head_dim / COLUMNS; tile += step) {
        int column = tile * COLUMNS + threadIdx.x % 32 * 4;
        write_inputs(c.in, c.wo, token, head * head_dim / COLUMNS + tile, found(column / head_dim, column % head_dim));
    }
}

/* Prefill: each warp of a block has queries of its own and all their keys. Tile i is the tokens of run i / head_parts with the
 * heads of part i % head_parts, 16 at most. gridDim.x: blocks of 4 tiles; y: key heads. */
template <int WIDTH, class E> __global__ void __launch_bounds__(128, 1) attention_prefill(Heads c) {
    __shared__ float4 room[4][16][WIDTH / 4];       /* pieces exchanged by row, so that few lie in the same banks */
    wait_for_inputs();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, index = blockIdx.x * 4 + warp;
    int heads = min(c.group, 16), kv_head = blockIdx.y;
    if (index >= c.n_runs * c.head_parts) return;
    Entry run = c.entries[index / c.head_parts], at_first = c.entries[run.first];
    size_t cache = ((size_t)at_first.slot * c.n_kv_heads + kv_head) * c.cache;
    const __half *query[2];
    int pos[2], first[2], head[2];      /* of row g, row g + 8; where their output goes, in heads, or -1 */
    UNROLL for (int h = 0; h < 2; h++) {
        int row = lane / 4 + 8 * h, of_tile = min(row / heads, run.n - 1), of_group = index % c.head_parts * heads + row % heads;
        bool valid = row < run.n * heads && of_group < c.group;
        pos[h] = at_first.pos + of_tile;
        first[h] = first_position(pos[h], c.window);
        head[h] = valid ? (run.first + of_tile) * c.n_heads + kv_head * c.group + of_group : -1;
        query[h] = valid ? c.queries + (size_t)head[h] * WIDTH : NULL;
    }
    Attention<WIDTH, E> sums(query);
    for (int start = first_position(at_first.pos, c.window) / 32 * 32; start < at_first.pos + run.n; start += 32)
        sums.add(c.keys + cache, c.values + cache, c.ring, start, first, pos);
    sums.finish();
    UNROLL for (int h = 0; h < 2; h++) {
        if (head[h] < 0) continue;
        float *to = c.fused ? (float *)room[warp][lane / 4 + 8 * h] : c.out + (size_t)head[h] * WIDTH;
        float share = c.fused ? 1.0f / sums.total[h] : 1;
        int exchange = c.fused ? lane / 4 : 0;
        if (!c.fused && lane % 4 == 0) c.softmax[head[h]] = make_float2(sums.max[h], sums.total[h]);
        UNROLL for (int d = 0; d < WIDTH / 8; d++)
            *(float2 *)(to + ((2 * d + lane % 4 / 2) ^ exchange) * 4 + lane % 2 * 2) =
                make_float2(sums.sum[d][2 * h] * share, sums.sum[d][2 * h + 1] * share);
    }
    __syncwarp();
    for (int t = 0; t < run.n && c.fused; t++)
        write_heads(c, run.first + t, kv_head * c.group, c.group, 0, 1,
                    [&](int h, int d) { return room[warp][t * heads + h][d / 4 ^ (t * heads + h) % 8]; });
}

/* Query heads of a block of decoding attention: as many as have room in shared memory. */
__host__ __device__ constexpr int decode_heads(int warps) { return 64 / warps; }

/* Decoding: a block is there for a token, a key head with up to HEADS of its query heads, and a span of positions (flash-decoding),
 * of which its WARPS take 32 each in turn. It makes the queries from wqkv's product itself, and in the last span the token's key
 * and value (each part of the heads does: the same bytes). 200 registers leave room for one of product_halves's blocks for up to 8
 * tokens to wait in. gridDim.x: tokens times parts of the heads; y: key heads; z: spans. */
template <int WIDTH, class E, int WARPS> __global__ void __maxnreg__(200) attention_decode(Heads c) {
    const int HEADS = decode_heads(WARPS), THREADS = 32 * WARPS;
    __shared__ __align__(16) __half query[HEADS][WIDTH];
    __shared__ __align__(16) float shared_out[WARPS][HEADS][WIDTH + 4];
    __shared__ float2 shared_softmax[WARPS][HEADS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.x / c.head_parts, kv_head = blockIdx.y;
    int first_head = kv_head * c.group + (int)blockIdx.x % c.head_parts * HEADS;
    int n_heads = min(HEADS, (kv_head + 1) * c.group - first_head);
    int pos = c.entries[token].pos, from = first_position(pos, c.window), to = pos + 1;      /* no kernel writes entries */
    int start = (from / c.span + (int)blockIdx.z) * c.span;
    from = max(from, start);
    to = min(to, start + c.span);
    size_t of_head = ((size_t)c.entries[token].slot * c.n_kv_heads + kv_head) * c.cache;
    bool last = from <= pos && pos < to;

    /* Where each block has a multiprocessor of its own it has long begun, and asks for its first keys and values meanwhile, into
     * that one's cache: what this token adds to them the block writes itself. */
    int at_first = from / 32 * 32 + warp * 32;
    size_t first_block = of_head + at_first % c.ring / 32 * cache_block<E>(WIDTH);
    for (int i = lane * 128; WARPS == 8 && at_first < to && i < (int)cache_block<E>(WIDTH); i += 32 * 128)
        asm volatile("prefetch.global.L1 [%0]; prefetch.global.L1 [%1];"
                     ::"l"(c.keys + first_block + i), "l"(c.values + first_block + i));
    wait_for_inputs();
    for (int row = warp; from < to && row < n_heads + 2 * last; row += WARPS) {
        int head = row < n_heads ? first_head + row : c.n_heads + kv_head + (row - n_heads) * c.n_kv_heads;
        make_head<E>(query[row], c, token, head);
    }
    for (int at = threadIdx.x; at < n_heads * (WIDTH - c.head_dim); at += THREADS)
        query[at / (WIDTH - c.head_dim)][c.head_dim + at % (WIDTH - c.head_dim)] = 0;
    __syncthreads();
    const __half *rows_of[2] = {lane / 4 < n_heads ? query[lane / 4] : NULL, lane / 4 + 8 < n_heads ? query[lane / 4 + 8] : NULL};
    int first[2] = {from, from}, until[2] = {to - 1, to - 1};
    Attention<WIDTH, E> sums(rows_of);
    for (int at = from / 32 * 32 + warp * 32; at < to; at += THREADS)
        sums.add(c.keys + of_head, c.values + of_head, c.ring, at, first, until);
    sums.finish();
    UNROLL for (int h = 0; h < HEADS / 8; h++) {
        if (lane % 4 == 0) shared_softmax[warp][lane / 4 + 8 * h] = make_float2(sums.max[h], sums.total[h]);
        UNROLL for (int d = 0; d < WIDTH / 8; d++)
            *(float2 *)&shared_out[warp][lane / 4 + 8 * h][8 * d + 2 * (lane % 4)] =
                make_float2(sums.sum[d][2 * h], sums.sum[d][2 * h + 1]);
    }
    __syncthreads();
    auto merged = [&](int row, int d, float2 *of_row) {         /* the warps' sums, put together: of d to d + 3; (maximum, sum) */
        float4 x = make_float4(0, 0, 0, 0);
        *of_row = make_float2(-INFINITY, 0);
        for (int w = 0; w < WARPS; w++) of_row->x = fmaxf(of_row->x, shared_softmax[w][row].x);
        for (int w = 0; w < WARPS; w++) {
            float2 of = shared_softmax[w][row];
            float share = of.y == 0 ? 0 : exp2f(of.x - of_row->x);
            add(x, *(const float4 *)&shared_out[w][row][d], share);
            of_row->y = fmaf(share, of.y, of_row->y);
        }
        return x;
    };
    if (c.fused) {
        write_heads(c, token, first_head, n_heads, warp, WARPS, [&](int h, int d) {
            float2 of_row;
            float4 x = merged(h, d, &of_row);
            float share = 1.0f / of_row.y;
            return make_float4(x.x * share, x.y * share, x.z * share, x.w * share);
        });
        return;
    }
    for (int at = threadIdx.x; at < n_heads * WIDTH / 4; at += THREADS) {
        int row = at / (WIDTH / 4), d = at % (WIDTH / 4) * 4;
        size_t to_head = ((size_t)blockIdx.z * c.n + token) * c.n_heads + first_head + row;
        float2 of_row;
        *(float4 *)(c.out + to_head * WIDTH + d) = merged(row, d, &of_row);
        if (d == 0) c.softmax[to_head] = of_row;
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 * 6. The sampler                                                                                                    */

typedef unsigned long long Mass;        /* of probability, in units of 2^-31 of the most probable id's: whole numbers, so that the
                                           order in which threads add them does not matter */
__device__ inline uint32_t mass(float p) { return __float2uint_rn(p * 0x1p31f); }

__device__ inline Mass warp_max(Mass x) {
    for (int other = 16; other; other /= 2) { Mass o = __shfl_xor_sync(~0u, x, other); x = o > x ? o : x; }
    return x;
}

/* The sum of x over the threads of a warp up to this one, itself included. */
__device__ inline Mass warp_scan(Mass x) {
    for (int step = 1; step < 32; step *= 2) {
        Mass before = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += before;
    }
    return x;
}

/* The same over a block of 1,024; *all: over all. */
__device__ inline Mass scan(Mass x, Mass *all) {
    __shared__ Mass sums[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_scan(x);
    __syncthreads();
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    Mass of_warps = warp_scan(sums[lane]), before = __shfl_sync(~0u, of_warps, (warp + 31) % 32);
    *all = __shfl_sync(~0u, of_warps, 31);
    return warp ? before + x : x;
}

/* The next id, as sample() in run.c finds it; a block of 1,024 threads for each wanted token. logits: [n][width], overwritten. */
__global__ void __launch_bounds__(1024)
sample_kernel(float *logits, int width, int vocab, float temperature, float top_p, const Entry *entries, int *ids) {
    __shared__ uint32_t low[1024], high[1024];      /* a digit's mass, 32 bits each: shared memory adds these in one go */
    __shared__ Mass best_of[32], above_shared, larger_before, equal_before;
    __shared__ int digit_shared, reached;
    wait_for_inputs();
    float *p = logits + (size_t)blockIdx.x * width;
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    float max = -INFINITY;
    int top = thread;
#pragma unroll 8                        /* here and below: so that so many loads are on their way */
    for (int i = thread; i < vocab; i += 1024) if (p[i] > max) { max = p[i]; top = i; }
    uint32_t of_max = __float_as_uint(max);         /* floats order as their bits do, once those of negative ones are inverted */
    uint32_t ordered = thread >= vocab ? 0 : of_max >> 31 ? ~of_max : of_max | 0x80000000;
    Mass all, best = warp_max((Mass)ordered << 32 | (0xffffffffu - (uint32_t)top));             /* of equal ones the first */
    if (lane == 0) best_of[warp] = best;
    __syncthreads();
    top = (int)(0xffffffffu - (uint32_t)warp_max(best_of[lane]));
    if (thread == 0) { ids[blockIdx.x] = top; reached = 0; }
    if (temperature == 0 || top_p == 0) return;

    float scale = 1.44269504f / temperature;
    max = p[top];
    Mass mine = 0;
    __syncthreads();
#pragma unroll 8
    for (int i = thread; i < vocab; i += 1024) {
        p[i] = exp2f((p[i] - max) * scale);
        mine += mass(p[i]);
    }
    scan(mine, &all);
    Mass total = all, limit = top_p < 1 ? (Mass)(top_p * (double)total) : total, above = 0;
    limit = limit ? limit : 1;
    uint32_t smallest = 0;
    for (int shift = 20; shift >= 0 && top_p < 1; shift -= 10) {        /* the smallest probability that is in: its next 10 bits */
        low[thread] = high[thread] = 0;
        __syncthreads();
#pragma unroll 8
        for (int i = thread; i < vocab; i += 1024) {
            uint32_t bits = __float_as_uint(p[i]), digit = bits >> shift & 1023;
            if (bits >> shift >> 10 != smallest) continue;
            uint32_t x = mass(p[i]), before = atomicAdd(&low[digit], x);
            if (before + x < x) atomicAdd(&high[digit], 1);
        }
        __syncthreads();
        Mass own = (Mass)high[1023 - thread] << 32 | low[1023 - thread];
        Mass with = above + scan(own, &all), without = with - own;      /* from the top down */
        if (without < limit && (with >= limit || thread == 1023)) { digit_shared = 1023 - thread; above_shared = without; }
        __syncthreads();
        smallest = smallest << 10 | (uint32_t)digit_shared;
        above = above_shared;
        __syncthreads();
    }
    /* In the order of ids: all with a larger probability, and as many of just this one as are needed. First what each warp has of
     * both, then, of the warp where the mass reaches r, a thread for each id. */
    Mass each = mass(__uint_as_float(smallest));
    Mass wanted = top_p < 1 && each ? (limit - above + each - 1) / each : (Mass)vocab;
    int chunk = (vocab + 1023) / 1024 * 32, from = min(warp * chunk, vocab), to = min(from + chunk, vocab);     /* a warp's */
    Mass larger = 0, equal = 0, all_larger, all_equal;
#pragma unroll 8
    for (int i = from + lane; i < to; i += 32) {
        uint32_t bits = __float_as_uint(p[i]);
        larger += bits > smallest ? mass(p[i]) : 0;
        equal += bits == smallest;
    }
    Mass larger_to = scan(larger, &all_larger), equal_to = scan(equal, &all_equal);
    auto in_set = [&](Mass larger, Mass equal) { return larger + (equal < wanted ? equal : wanted) * each; };
    Mass r = (Mass)(entries[blockIdx.x].random * (double)in_set(all_larger, all_equal));
    if (lane == 0 && in_set(larger_to - larger, equal_to - equal) <= r) atomicMax(&reached, warp);
    __syncthreads();
    if (lane == 0 && warp == reached) { larger_before = larger_to - larger; equal_before = equal_to - equal; }
    __syncthreads();
    from = reached * chunk;
    to = min(from + chunk, vocab);
    for (Mass l = larger_before, e = equal_before; from < to && in_set(l, e) <= r; from += 1024, l += all_larger, e += all_equal) {
        int i = from + thread;
        uint32_t bits = i < to ? __float_as_uint(p[i]) : 0;     /* 0 adds nothing: either it is not in the set, or it has no mass */
        larger = bits > smallest ? mass(__uint_as_float(bits)) : 0;
        equal = bits == smallest;
        larger_to = l + scan(larger, &all_larger);
        equal_to = e + scan(equal, &all_equal);
        if (in_set(larger_to, equal_to) > r && in_set(larger_to - larger, equal_to - equal) <= r) ids[blockIdx.x] = i;
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 * 7. The step                                                                                                       */

/* A State on the device. */
typedef struct {
    cudaStream_t stream;
    int      multiprocessors;
    bool     overlap;                   /* kernels may start before the one before has ended */
    int      wgmma;                     /* built for, and on, a GPU that has it */
    Memory   memory;
    Heads    heads;
    float   *x, *h;                     /* [room, dim]; [room, hidden_dim], or that as w2's input; widths rounded up to 128,
                                           the rest 0 */
    float   *parts;                     /* of products: [parts, n, rows], of the last one the logits; rows rounded up to 128 */
    double  *frequencies;
    Inputs   in;
    Entry   *entries_host;              /* heads.entries in the host's memory, from where a step copies them */
    int     *ids;                       /* the next ones, in the host's memory, where the sampler writes them */
    int      max_spans, most_wanted;    /* over how many the keys of a token can go; tokens whose logits have room */
    int      n, n_want;                 /* of this step: tokens; wanted ones */
    struct { cudaGraphExec_t exec; int n_spans; float temperature, top_p; double bytes; } *graphs;
                                        /* [n_slots + 1]: decoding steps of so many tokens, what they were recorded with, and what
                                           they read */
    struct { cudaEvent_t at; int operation; } *events;          /* of -P: after each launch */
    size_t   n_events, events_room;
    bool     profiled;
} Device;

/* With -P: an event where an operation ends. */
static void mark(Device *d, int operation) {
    if (!d->profiled) return;
    size_t room = d->events_room;
    d->events = (decltype(d->events))grow(d->events, d->n_events, &d->events_room, sizeof *d->events);
    for (size_t i = room; i < d->events_room; i++) CUDA(cudaEventCreate(&d->events[i].at));
    d->events[d->n_events].operation = operation;
    CUDA(cudaEventRecord(d->events[d->n_events++].at, d->stream));
}

/* Launches a kernel of operation `operation`. */
typedef struct { dim3 blocks, threads; size_t shared; } Grid;           /* threads of a block; its bytes of dynamic shared memory */
template <class... P, class... A>
static void launch(Device *d, int operation, void (*kernel)(P...), Grid grid, A... arguments) {
    cudaLaunchAttribute early = {cudaLaunchAttributeProgrammaticStreamSerialization};
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid.blocks, grid.threads, grid.shared, d->stream, &early, d->overlap && !d->profiled};
    if (grid.shared > 48 * 1024)        /* more than kernels have unasked */
        CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)grid.shared));
    CUDA(cudaLaunchKernelEx(&config, kernel, (P)arguments...));
    mark(d, operation);
}

/* Token tiles of 8 that a decoding step's products are made for: by the slots there are, not by the tokens of this step, so that a
 * sequence does not notice when another ends. 16: a prefill's, and those of more than 64 slots. */
static int token_tiles(const State *s) {
    size_t n = s->n_slots;
    return !s->decoding || n > 64 ? 16 : n > 32 ? 8 : n > 16 ? 4 : n > 8 ? 2 : 1;
}

/* Where a product with w finds its inputs, and how they lie: swizzled if product_wide makes it, which is there for codes and 16
 * token tiles, or product_halves, for FP16. */
static Inputs inputs(const State *s, const Weights &w) {
    const Device *d = (const Device *)s->device;
    Inputs in = d->in;
    in.swizzled = d->wgmma && (w.type == F16 || token_tiles(s) == 16);
    return in;
}

template <int TYPE, int GROUPS>
static void launch_product(State *s, int operation, float *out, Weights w, Inputs in, int n) {
    const int CODES = TYPE == F16 ? Q8 : TYPE;      /* for product_wide, which is given no FP16, but must compile */
    Device *d = (Device *)s->device;
    int tiles = token_tiles(s), row_blocks = w.row_tiles / 8;
    auto token_blocks = [&] { return (int)ceil_div(n, 8 * tiles); };
    auto kernel = tiles == 1 ? product_few<TYPE, GROUPS> : tiles == 2 ? product_many<TYPE, GROUPS, 2>
                : tiles == 4 ? product_many<TYPE, GROUPS, 4> : tiles == 8 ? product_many<TYPE, GROUPS, 8>
                : product_many<TYPE, GROUPS, 16>;
    Grid grid = {dim3(token_blocks(), row_blocks, w.parts), 256};
    if (tiles == 1) grid = {dim3(4 * row_blocks, w.parts), w.units ? 128 : 256};
    if (in.swizzled && TYPE == F16) {
        /* Of 16 token tiles blocks have 256 tokens, or 64, where the large ones would leave multiprocessors idle; the bits are the
         * same. How often all multiprocessors take a block: one of 256 takes 8/3 as long, by an estimate (SPEED.md). */
        auto turns = [&](int tokens) { return ceil_div(ceil_div(n, tokens) * row_blocks, d->multiprocessors); };
        if (tiles == 16) tiles = 8 * turns(256) > 3 * turns(64) ? 8 : 32;
        kernel = tiles == 1 ? product_halves<1> : tiles == 2 ? product_halves<2> : tiles == 4 ? product_halves<4>
               : tiles == 8 ? product_halves<8> : product_halves<32>;
        grid = {min(d->multiprocessors, (int)ceil_div(w.row_tiles, w.block_tiles) * w.parts * token_blocks()), WIDE_ROWS * 32 + 64,
                tiles == 32 ? sizeof(Halves<32>) * Halves<32>::STAGES : HALVES_ROOM};
    } else if (in.swizzled) {
        kernel = product_wide<CODES, GROUPS>;
        grid = {min(d->multiprocessors, token_blocks() * row_blocks), WIDE_ROWS * 32 + 128,
                WIDE_STAGES * sizeof(Wide<CODES, GROUPS>)};
    }
    launch(d, operation, kernel, grid, out, w, in, n);
}

/* out: [parts][n][w.row_tiles * 16], or of w13 SwiGLU's, as store() leaves it; returns the number of parts: so many that there are
 * two or three blocks for each multiprocessor, or, for product_halves, as choose_blocks() chose. */
static int device_product(State *s, int operation, float *out, Weights w, Inputs in, int n) {
    static void (*const LAUNCH[][3])(State *, int, float *, Weights, Inputs, int) = {               /* groups of 32, 64, 128 */
        {NULL, NULL, launch_product<F16, 1>}, {launch_product<Q8, 4>, launch_product<Q8, 2>, launch_product<Q8, 1>},
        {launch_product<Q4, 4>, launch_product<Q4, 2>, launch_product<Q4, 1>},
        {launch_product<NF4, 4>, launch_product<NF4, 2>, launch_product<NF4, 1>}};
    Device *d = (Device *)s->device;
    int tiles = token_tiles(s);
    int held = tiles > 1 || w.type == Q8 || w.type == NF4 ? 2 : 3;         /* blocks that a multiprocessor has registers for */
    count(s, operation, 2.0 * n * w.rows * w.cols, w.bytes);
    if (tiles == 16) { w.parts = 1; w.block_tiles = WIDE_ROWS; }
    else if (in.swizzled) choose_blocks(&w, d->multiprocessors);                /* FP16, on a Hopper */
    else w.parts = max(1, min(w.most_parts, held * d->multiprocessors / (w.row_tiles / (tiles == 1 ? 2 : 8))));
    LAUNCH[w.type - F16][w.shift - 5](s, operation, out, w, in, n);
    return w.parts;
}

/* From wqkv's product to the input of the one with wo. */
template <int WIDTH, class E>
static void launch_attention(State *s, size_t layer, int n_parts) {
    Device *d = (Device *)s->device;
    Heads c = d->heads;
    const DeviceLayer &w = ((const DeviceModel *)s->model->device)->layers[layer];
    int warps = s->n_slots * c.n_kv_heads <= (size_t)d->multiprocessors ? 8 : 4;        /* 8: each block has one of its own */
    c.keys += layer * s->n_slots * c.n_kv_heads * c.cache;
    c.values += layer * s->n_slots * c.n_kv_heads * c.cache;
    c.parts = d->parts;
    c.n_parts = n_parts;
    c.parts_width = w.wqkv.row_tiles * 16;
    c.head_parts = (int)ceil_div(c.group, s->decoding ? decode_heads(warps) : 16);
    c.wo = w.wo;
    c.in = inputs(s, w.wo);
    c.fused = c.group * c.head_dim % COLUMNS == 0 && c.head_dim % 4 == 0 && c.n_spans == 1 && c.head_parts == 1;
    if (s->decoding)
        launch(d, ATTENTION, warps == 8 ? attention_decode<WIDTH, E, 8> : attention_decode<WIDTH, E, 4>,
               {dim3(c.n * c.head_parts, c.n_kv_heads, c.n_spans), 32 * warps}, c);
    else {
        launch(d, ROPE, rope_and_cache<E>, {dim3((c.n_heads + 2 * c.n_kv_heads + 7) / 8, c.n), 256}, c);
        launch(d, ATTENTION, attention_prefill<WIDTH, E>, {dim3((c.n_runs * c.head_parts + 3) / 4, c.n_kv_heads), 128}, c);
    }
    if (!c.fused) launch(d, ATTENTION, attention_input, {dim3((w.wo.width + 1023) / 1024, c.n), 256}, c);
}

/* All launches of a forward over the tokens of prepare(), below. The logits are in d->parts afterwards. */
static void launch_forward(State *s) {
    static void (*const ATTEND[][3])(State *, size_t, int) = {      /* heads of 32, 64, 128 elements */
        {launch_attention<32, __half>, launch_attention<64, __half>, launch_attention<128, __half>},
        {launch_attention<32, uint8_t>, launch_attention<64, uint8_t>, launch_attention<128, uint8_t>}};
    Device *d = (Device *)s->device;
    const Header *c = &s->model->c;
    const DeviceModel *m = (const DeviceModel *)s->model->device;
    int n = d->n, n_parts = 0;

    bool large = c->dim > 32 * COLUMNS;
    auto norm = [&](const float *weight, const Weights &next, const Entry *wanted) {  /* of x and the parts of the last product */
        launch(d, NORM, large ? norm_input<16, MAX_DIM / COLUMNS / 16, MAX_PARTS>
                        : s->decoding ? norm_input<32, 1, MAX_PARTS> : norm_input<16, 2, 1>,
               {wanted ? d->n_want : n, !large && s->decoding ? 1024 : 512}, d->x, d->parts, n_parts, n, weight,
               c->norm_eps, inputs(s, next), next, wanted);
    };

    CUDA(cudaMemcpyAsync((void *)d->heads.entries, d->entries_host, (size_t)n * sizeof(Entry), cudaMemcpyHostToDevice, d->stream));
    mark(d, EMBEDDING);                 /* where the first begins */
    launch(d, EMBEDDING, embed, {dim3(n, 1 + ROW_BLOCKS), 128}, d->x, d->heads.rotations, d->heads.entries, m->embedding,
           d->frequencies, (int)c->head_dim / 2);
    for (size_t l = 0; l < c->n_layers; l++) {
        const DeviceLayer &w = m->layers[l];
        norm(w.rms_att, w.wqkv, NULL);
        n_parts = device_product(s, WQKV, d->parts, w.wqkv, inputs(s, w.wqkv), n);
        ATTEND[s->model->kv_type == Q8][s->head_width / 64](s, l, n_parts);
        n_parts = device_product(s, WO, d->parts, w.wo, inputs(s, w.wo), n);
        norm(w.rms_ffn, w.w13, NULL);
        Inputs h = inputs(s, w.w2);
        device_product(s, W13, d->h, w.w13, inputs(s, w.w13), n);
        if (w.w13.to_halves) h.q = (int8_t *)d->h;
        else launch(d, SWIGLU, quantize_input, {dim3((w.w2.width + 1023) / 1024, n), 256}, d->h, h, w.w2);
        n_parts = device_product(s, W2, d->parts, w.w2, h, n);
    }
    if (!d->n_want) return;
    norm(m->rms_final, m->wcls, d->heads.entries);
    device_product(s, CLASSIFIER, d->parts, m->wcls, inputs(s, m->wcls), d->n_want);
}

/* Writes the tokens to entries_host, and the tiles of queries, which are the runs among them; counts these, and the spans of
 * positions that decoding needs, rounded up to a power of two. Books what attention computes and reads. */
static void prepare(State *s, const Token *tokens, size_t n, const Draw *draws) {
    Device *d = (Device *)s->device;
    const Header *c = &s->model->c;
    size_t needed, spans = 1, most = (size_t)max(16 / d->heads.group, 1);
    double n_keys, n_reads;
    d->profiled = s->profiled;
    d->n = d->heads.n = (int)n;
    d->heads.n_runs = (int)find_runs(s->runs, tokens, n, most, c->window, (size_t)d->heads.span, &n_keys, &n_reads, &needed);
    while (spans < needed) spans *= 2;
    d->heads.n_spans = s->decoding ? (int)min_size(spans, (size_t)d->max_spans) : 1;
    d->n_want = 0;
    for (size_t i = 0; i < n; i++) {
        const Token *t = &tokens[i];
        const Run *run = &s->runs[i];   /* what it holds where there is none is read by nobody */
        d->entries_host[i] = {t->id, (int)t->pos, (int)t->slot, (int)run->first, (int)run->n, 0, 0};
        if (!t->want) continue;
        d->entries_host[d->n_want].wanted = (int)i;
        d->entries_host[d->n_want].random = draws ? draws[d->n_want].random : 0;
        d->n_want++;
    }
    count(s, ATTENTION, 4.0 * n_keys * c->n_heads * c->head_dim * c->n_layers,
          2.0 * n_reads * (double)(c->n_kv_heads * s->position_bytes * c->n_layers));
    if (d->n_want > d->most_wanted) die("%d logits at once, and room for %d", d->n_want, d->most_wanted);
}

/* Waits for the step, and adds the times between its events to its operations. */
static void finish(State *s) {
    Device *d = (Device *)s->device;
    CUDA(cudaStreamSynchronize(d->stream));
    for (size_t i = 1; i < d->n_events; i++) {
        float ms;
        CUDA(cudaEventElapsedTime(&ms, d->events[i - 1].at, d->events[i].at));
        s->profile[d->events[i].operation].seconds += 1e-3 * ms;
    }
    d->n_events = 0;
}

static void cuda_forward(State *s, const Token *tokens, size_t n, float *logits) {
    Device *d = (Device *)s->device;
    size_t vocab = s->model->c.vocab_size * sizeof(float), pitch = round_up(s->model->c.vocab_size, 128) * sizeof(float);
    prepare(s, tokens, n, NULL);
    launch_forward(s);
    if (d->n_want)
        CUDA(cudaMemcpy2DAsync(logits, vocab, d->parts, pitch, vocab, (size_t)d->n_want, cudaMemcpyDeviceToHost, d->stream));
    finish(s);
}

/* A decoding step's launches, 230 to 260 of a 7B, take the CPU longer than the GPU: they are recorded once, as a graph, for each
 * number of tokens, and again whenever what they were recorded with has changed. */
static void cuda_step(State *s, const Token *tokens, size_t n, Draw *draws, float temperature, float top_p) {
    Device *d = (Device *)s->device;
    int vocab = (int)s->model->c.vocab_size;
    auto launch_step = [&] {
        launch_forward(s);
        if (d->n_want)
            launch(d, SAMPLING, sample_kernel, {d->n_want, 1024}, d->parts, (int)round_up(vocab, 128), vocab, temperature, top_p,
                   d->heads.entries, d->ids);
    };
    prepare(s, tokens, n, draws);
    if (s->decoding && n <= s->n_slots && (size_t)d->n_want == n && !s->profiled) {
        auto *g = &d->graphs[n];
        double before = s->bytes;       /* recording books what the step reads (and a profile, which none but -P prints) */
        if (!g->exec || g->n_spans != d->heads.n_spans || g->temperature != temperature || g->top_p != top_p) {
            cudaGraph_t graph;
            if (g->exec) CUDA(cudaGraphExecDestroy(g->exec));
            CUDA(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal));
            launch_step();
            CUDA(cudaStreamEndCapture(d->stream, &graph));
            CUDA(cudaGraphInstantiate(&g->exec, graph, 0));
            CUDA(cudaGraphDestroy(graph));
            *g = {g->exec, d->heads.n_spans, temperature, top_p, s->bytes - before};
        }
        s->bytes = before + g->bytes;
        CUDA(cudaGraphLaunch(g->exec, d->stream));
    } else launch_step();
    finish(s);
    for (int i = 0; i < d->n_want; i++) draws[i].id = d->ids[i];
}

static double cuda_peak(const State *s) {
    const DeviceModel *m = (const DeviceModel *)s->model->device;
    return (double)max_size(m->memory.bytes + ((const Device *)s->device)->memory.bytes, m->peak);
}

static void cuda_open(State *s) {
    const Model *m = s->model;
    const Header *c = &m->c;
    Device *d = (Device *)allocate(1, sizeof *d, m->path);
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    CUDA(cudaGetDeviceProperties(&properties, 0));
    CUDA(cudaFuncGetAttributes(&attributes, quantize_input));
    int built_for = attributes.ptxVersion;
    d->overlap = properties.major >= 9 && built_for >= 90;
    d->wgmma = built_for_wgmma();
    if (built_for < 75 || (properties.major == 9 && !d->wgmma))         /* the latter is what -arch=native builds on a Hopper */
        fprintf(stderr, "%s: built without this GPU's own instructions: nvcc -O3 -arch=%s run_cuda.cu -o run_cuda makes it %s\n",
                program, properties.major == 9 ? "sm_90a" : "native",
                built_for < 75 ? "many times as fast" : "up to twice as fast");
    d->multiprocessors = properties.multiProcessorCount;
    s->device = d;
    s->head_width = c->head_dim <= 32 ? 32 : c->head_dim <= 64 ? 64 : 128;
    s->position_bytes = position_bytes(m->kv_type, s->head_width);
    if (c->head_dim > 128) die("%s: heads of %u elements; run_cuda takes up to 128 (run takes them)", m->path, c->head_dim);
    if (c->dim > MAX_DIM) die("%s: a dim of %u; run_cuda takes up to %d (run takes it)", m->path, c->dim, MAX_DIM);
    if (s->n_slots > 65535) die("-b %zu: run_cuda takes up to 65535", s->n_slots);
    d->heads = {(int)c->n_heads, (int)c->n_kv_heads, (int)(c->n_heads / c->n_kv_heads), (int)c->head_dim, (int)s->head_width,
                (int)s->ring, (int)min_size(c->window, INT32_MAX), 1.44269504f / sqrtf((float)c->head_dim),
                s->ring * s->position_bytes};
    d->heads.span = s->n_slots * c->n_kv_heads >= 128 ? 512 : 256;
    d->max_spans = (int)(s->ring / (size_t)d->heads.span + 2);

    /* sizes of all that a step needs, and whether it fits */
    size_t q_dim = (size_t)c->n_heads * c->head_dim, qkv_dim = q_dim + 2ull * c->n_kv_heads * c->head_dim;
    size_t room = round_up(s->chunk, 256), slots = min_size(s->n_slots, room);      /* room: for so many tokens */
    size_t widest_out = round_up(max_size(qkv_dim, c->dim), 128), part_rows = max_size(room, MAX_PARTS * 64);
    size_t most_wanted = max_size(slots, CHUNK);                /* generating, scoring */
    size_t widest_in = round_up(max_size(max_size(c->dim, q_dim), c->hidden_dim), COLUMNS);
    size_t input_bytes = ((const DeviceModel *)m->device)->has_halves ? sizeof(__half) : 1;
    size_t span_rows = max_size(slots * (size_t)d->max_spans, room);
    s->kv_bytes = cache_bytes(s, 1e18, properties.name);        /* dies where it is more than a size_t holds */
    const struct { void **to; size_t bytes; } all[] = {
        {(void **)&d->x, room * round_up(c->dim, COLUMNS) * sizeof(float)},
        {(void **)&d->parts, max_size(part_rows * widest_out, most_wanted * round_up(c->vocab_size, 128)) * sizeof(float)},
        {(void **)&d->h, room * round_up(c->hidden_dim, COLUMNS) * sizeof(float)},
        {(void **)&d->heads.out, span_rows * c->n_heads * s->head_width * sizeof(float)},
        {(void **)&d->heads.softmax, span_rows * c->n_heads * sizeof(float2)},
        {(void **)&d->heads.rotations, room * (c->head_dim / 2) * sizeof(float2)},
        {(void **)&d->heads.queries, room * c->n_heads * s->head_width * sizeof(__half)},
        {(void **)&d->heads.keys, s->kv_bytes / 2}, {(void **)&d->heads.values, s->kv_bytes / 2},
        {(void **)&d->frequencies, c->head_dim / 2 * sizeof(double)},
        {(void **)&d->in.q, room * widest_in * input_bytes}, {(void **)&d->in.scale, room * widest_in / 32 * sizeof(float2)},
        {(void **)&d->heads.entries, room * sizeof(Entry)}};
    double need = 0, per_slot = (double)s->kv_bytes / (double)s->n_slots;
    size_t free_bytes, total;
    for (const auto &one : all) need += (double)one.bytes;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    if (need > (double)free_bytes) {
        double left = (double)free_bytes - (need - (double)s->kv_bytes);
        die("%s: %zu sequences of %zu positions need %.1f GB beside the weights and %.1f of %s's %.1f GB are free: "
            "%s%.0f would fit", m->path, s->n_slots, s->ring, need / 1e9, (double)free_bytes / 1e9, properties.name,
            (double)total / 1e9, left >= per_slot ? "-b " : "-b 1 -c ",
            left >= per_slot ? floor(left / per_slot) : left > 0 ? floor(left / per_slot * (double)s->ring / KEYS) * KEYS : 0);
    }
    for (const auto &one : all) *one.to = device_allocate(one.bytes, &d->memory, m->path);
    d->in.stride = (int)room;
    d->most_wanted = (int)most_wanted;
    CUDA(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking));
    CUDA(cudaMallocHost((void **)&d->entries_host, room * sizeof(Entry)));
    CUDA(cudaMallocHost((void **)&d->ids, room * sizeof(int)));
    d->graphs = (decltype(d->graphs))allocate(s->n_slots + 1, sizeof *d->graphs, m->path);
    CUDA(cudaMemcpy(d->frequencies, s->frequencies, c->head_dim / 2 * sizeof(double), cudaMemcpyHostToDevice));
    CUDA(cudaDeviceSynchronize());
}

static void cuda_close(State *s) {
    Device *d = (Device *)s->device;
    device_free(&d->memory);
    for (size_t i = 0; i <= s->n_slots; i++) if (d->graphs[i].exec) cudaGraphExecDestroy(d->graphs[i].exec);
    for (size_t i = 0; i < d->events_room; i++) cudaEventDestroy(d->events[i].at);
    cudaFreeHost(d->entries_host);
    cudaFreeHost(d->ids);
    cudaStreamDestroy(d->stream);
    free(d->graphs);
    free(d->events);
    free(d);
}

static const Backend GPU = {"cuda", 4096, cuda_load, cuda_unload, cuda_open, cuda_close, cuda_forward, cuda_step, cuda_peak};

#ifndef TESTING
int main(int argc, char **argv) {
    program = "run_cuda";
    backend = &GPU;
    return run(argc, argv);
}
#endif
