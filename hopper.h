/* hopper.h - products on GPUs of compute capability 9.0 (a Hopper), built for sm_90a. Skip this on a first reading: run_cuda.cu,
 * which includes it, has the same products for all GPUs; what shows there is the order of codes and inputs, and how blocks are cut.
 *
 * A Hopper's tensor cores do twice the work if a group of four warps gives it to them at once (wgmma, PTX ISA), and can take it
 * from shared memory, where a single thread can have it copied. From top to bottom:
 *   1. What both share      stages that are filled ahead, and the instruction
 *   2. product_wide         for prefill, and for more than 64 slots, with codes
 *   3. product_halves       with FP16 weights
 * Built for other GPUs these kernels are empty. */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL        /* whether this is built for a Hopper's own instructions */
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif
__device__ int has_wgmma = HAS_WGMMA;           /* for the host to ask */
static int built_for_wgmma(void) {
    int has;
    CUDA(cudaMemcpyFromSymbol(&has, has_wgmma, sizeof has));
    return has;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 1. What both share                                                                                                */

#if HAS_WGMMA
/* Stages in shared memory that a thread fills, ahead, with copies that need no thread once they are begun, and others read: a
 * step's is step % STAGES. Barriers tell when all bytes of a stage have come and when all threads have read them. */
template <int STAGES> struct Pipeline {
    uint32_t full, empty;               /* shared addresses: of STAGES barriers each */

    __device__ inline void start(uint64_t *barriers, int readers) {
        full = shared_address(barriers);
        asm volatile("" : "+r"(full));  /* in a register: else each step asks a slow one, of the block's number in its cluster */
        empty = full + 8 * STAGES;
        for (int i = 0; i < STAGES && threadIdx.x == 0; i++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; mbarrier.init.shared::cta.b64 [%1], %2;"
                         ::"r"(full + 8 * i), "r"(empty + 8 * i), "r"(readers));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncthreads();
    }
    static __device__ inline void await(uint32_t barrier, int phase) {      /* until it has ended its phase of this parity */
        uint32_t done = 0;
        while (!done)
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                         : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
    }
    __device__ inline uint32_t full_at(unsigned step) const { return full + 8 * (step % STAGES); }  /* what copies report to */
    __device__ inline void announce(unsigned step, int bytes) const {       /* so many bytes, once it is empty */
        if (step >= STAGES) await(empty + 8 * (step % STAGES), (step / STAGES - 1) & 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full_at(step)), "r"(bytes) : "memory");
    }
    __device__ inline void wait_full(unsigned step) const { await(full_at(step), step / STAGES & 1); }
    __device__ inline void release(unsigned step) const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * (step % STAGES)) : "memory");
    }
};

__device__ inline void bulk_copy(void *to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

/* Where tiles of 8 rows or tokens of `swizzle` bytes, 128 or 64, begin in shared memory, one each 1,024 bytes (PTX ISA, wgmma,
 * matrix descriptor, in units of 16 bytes). */
__device__ inline uint64_t descriptor(uint32_t address, int swizzle) {
    return (uint64_t)(address >> 4) | 1ull << 16 | 64ull << 32 | (swizzle == 128 ? 1ull : 2ull) << 62;
}

/* sum = (more ? sum : 0) + a b for a of 64 rows by 16 columns of halves, or 32 of codes, in shared memory; or codes in registers,
 * 16 rows of each warp as for mma_codes; and b of the same columns by 8 TILES tokens in shared memory. Of 8 tokens a thread has
 * four sums, as mma_codes and mma_halves give them. Runs on by itself. A, B, MORE: the operands' places behind the sums. */
#define START_WGMMA(TYPE, TILES, SHAPE, A_TYPE, A, B, MORE, FLAGS, SUMS, A_VALUES)                                               \
    __device__ inline void start_wgmma(TYPE (&sum)[TILES][4], A_TYPE, uint64_t b, int more) {                                    \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " MORE ", 0; wgmma.mma_async.sync.aligned." SHAPE " {" NAMES_##TILES "}, "   \
                     A ", " B ", p" FLAGS ";}" : SUMS : A_VALUES, "l"(b), "r"(more));                                            \
    }
#define NAMES_1 "%0, %1, %2, %3"
#define NAMES_2 NAMES_1 ", %4, %5, %6, %7"
#define NAMES_4 NAMES_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_8 NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_16 NAMES_8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
                 "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_32 NAMES_16 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
                 "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
                 "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
                 "%122, %123, %124, %125, %126, %127"
#define SUMS_1(C, t) C(sum[t][0]), C(sum[t][1]), C(sum[t][2]), C(sum[t][3])
#define SUMS_2(C, t) SUMS_1(C, t), SUMS_1(C, t + 1)
#define SUMS_4(C, t) SUMS_2(C, t), SUMS_2(C, t + 2)
#define SUMS_8(C, t) SUMS_4(C, t), SUMS_4(C, t + 4)
#define SUMS_16(C, t) SUMS_8(C, t), SUMS_8(C, t + 8)
#define SUMS_32(C, t) SUMS_16(C, t), SUMS_16(C, t + 16)
#define IN_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define START_HALVES(TILES, N, A, B, MORE)                                                                                       \
    START_WGMMA(float, TILES, "m64n" N "k16.f32.f16.f16", uint64_t a, A, B, MORE, ", 1, 1, 0, 0", SUMS_##TILES("+f", 0), "l"(a))
START_WGMMA(int, 16, "m64n128k32.s32.u8.s8", const uint32_t a[4], "{%64, %65, %66, %67}", "%68", "%69", "", SUMS_16("+r", 0),
            IN_REGISTERS)
START_WGMMA(int, 16, "m64n128k32.s32.u8.s8", uint64_t a, "%64", "%65", "%66", "", SUMS_16("+r", 0), "l"(a))
START_HALVES(1, "8", "%4", "%5", "%6")
START_HALVES(2, "16", "%8", "%9", "%10")
START_HALVES(4, "32", "%16", "%17", "%18")
START_HALVES(8, "64", "%32", "%33", "%34")
START_HALVES(32, "256", "%128", "%129", "%130")

/* Waits for what has been begun, and keeps the sums from being read before. */
__device__ inline void read_later(int &sum) { asm volatile("" : "+r"(sum)); }
__device__ inline void read_later(float &sum) { asm volatile("" : "+f"(sum)); }
template <class T, int TILES> __device__ inline void wait_wgmma(T (&sum)[TILES][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    UNROLL for (int i = 0; i < 4 * TILES; i++) read_later(sum[i / 4][i % 4]);
}
#endif

/* ------------------------------------------------------------------------------------------------------------------
 * 2. product_wide                                                                                                   */

/* A block makes 128 rows by 128 tokens: two groups of four warps have 64 rows each, and a thread of a third fetches, WIDE_STAGES
 * steps of 128 columns ahead, all that they read. Activations lie in memory as wgmma wants them, Inputs.swizzled. At most as
 * many blocks as there are multiprocessors go over all of the output, so that the next tiles arrive while the last are stored. */
enum { WIDE_ROWS = 8, WIDE_STAGES = 4 };            /* row tiles of a block, and so many warps that compute */
template <int TYPE, int GROUPS> struct alignas(1024) Wide {         /* a stage; swizzling wants multiples of 1,024 bytes */
    static const int PIECES = Stage<TYPE, GROUPS>::PIECES;
    uint4  x[128 * 8];                  /* [token][8 pieces of 16 bytes] */
    uint4  codes[WIDE_ROWS][PIECES][32];            /* of q8 each 32 are 8 rows of 64 bytes, swizzled: a multiple of 512 bytes on */
    float4 x_scales[GROUPS][64];        /* (scale, sum) of two tokens */
    uint2  w_scales[WIDE_ROWS][GROUPS][8];
};

template <int TYPE, int GROUPS>
__global__ void __launch_bounds__(WIDE_ROWS * 32 + 128, 1) product_wide(float *out, Weights w, Inputs in, int n) {
#if HAS_WGMMA
    typedef Wide<TYPE, GROUPS> OneStage;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ uint64_t barriers[2 * WIDE_STAGES];
    uint32_t first_stage = shared_address(shared);
    asm volatile("" : "+r"(first_stage));           /* in a register, as Pipeline's */
    OneStage *stages = (OneStage *)__cvta_shared_to_generic(first_stage);
    const int COUNT = 4 / GROUPS;
    const bool IN_SHARED = TYPE == Q8 && GROUPS < 4;            /* wgmma reads codes there (strips of 16); else in registers */
    const bool LATE = TYPE == Q8 && !IN_SHARED;     /* the registers are the codes themselves; ptxas gives them to the next codes as
                                                       soon as the instruction is issued, so the next may not come before it ends */
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned step = 0;
    int token_blocks = (n + 127) / 128, blocks = token_blocks * w.row_tiles / WIDE_ROWS;
    Pipeline<WIDE_STAGES> pipeline;
    pipeline.start(barriers, 32 * WIDE_ROWS);
    if (warp >= WIDE_ROWS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");    /* for the others */
        wait_for_inputs();              /* the others need not: what they read comes from here, and then they store */
        /* the thread that fetches */
        for (int block = blockIdx.x; block < blocks && threadIdx.x == 32 * WIDE_ROWS; block += gridDim.x)
            for (int k = 0; k < w.column_tiles; k++, step++) {
                OneStage *s = stages + step % WIDE_STAGES;
                uint32_t barrier = pipeline.full_at(step);
                size_t tile = tile_index(w, block / token_blocks * WIDE_ROWS, k), token = block % token_blocks * 128;
                pipeline.announce(step, (int)(sizeof s->x + sizeof s->codes + sizeof s->x_scales + sizeof s->w_scales));
                auto copy = [&](auto &to, const void *from) { bulk_copy(&to, from, sizeof to, barrier); };
                copy(s->x, in.q + ((size_t)k * in.stride + token) * COLUMNS);
                copy(s->codes, w.codes + tile * (OneStage::PIECES * 32));
                copy(s->w_scales, w.scales + tile * (GROUPS * 16));
                for (int g = 0; g < GROUPS; g++) copy(s->x_scales[g], in.scale + ((size_t)k * GROUPS + g) * in.stride + token);
            }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        float total[16][4] = {};
        Stage<TYPE, GROUPS> weights(w, 0);
        auto load = [&](unsigned step) {            /* this warp's weights, once they have come */
            const OneStage *s = stages + step % WIDE_STAGES;
            pipeline.wait_full(step);
            UNROLL for (int p = 0; p < OneStage::PIECES && !IN_SHARED; p++)
                weights.codes[0][p] = s->codes[warp][p][thread_place(lane)];
            UNROLL for (int g = 0; g < GROUPS; g++) weights.scales[0][g] = s->w_scales[warp][g][lane / 4];
        };
        load(step);
        for (int k = 0; k < w.column_tiles; k++, step++) {
            const OneStage *s = stages + step % WIDE_STAGES;
            uint32_t a[4][4];
            float2 rows[GROUPS][2];
            uint64_t codes = descriptor(shared_address(s->codes[warp / 4 * 4]), 64), x = descriptor(shared_address(s->x), 128);
            if (!IN_SHARED) {
                weights.unpack(a, 0);
                UNROLL for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i / 4][i % 4]));   /* before the first instruction */
            }
            UNROLL for (int i = 0; i < 2 * GROUPS; i++)
                rows[i / 2][i % 2] = __half22float2(((const __half2 *)weights.scales[0])[i]);
            UNROLL for (int g = 0; g < GROUPS; g++) {
                int sum[16][4];
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                UNROLL for (int i = 0; i < COUNT; i++) {
                    int at = g * COUNT + i;         /* 32 columns: the codes of 64 are 512 bytes, 16 a unit */
                    if (IN_SHARED) start_wgmma(sum, codes + at / 2 * 32 + at % 2 * 2, x + at * 2, i);
                    else start_wgmma(sum, a[at], x + at * 2, i);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                bool next = g == 0 && k + 1 < w.column_tiles;
                if (next && !LATE) load(step + 1);              /* meanwhile */
                wait_wgmma(sum);
                if (next && LATE) load(step + 1);
                UNROLL for (int t = 0; t < 16; t++) {
                    float4 tokens = s->x_scales[g][t * 4 + lane % 4];
                    UNROLL for (int h = 0; h < 2; h++) add_sums(total[t] + 2 * h, rows[g][h], tokens, sum[t] + 2 * h);
                }
            }
            pipeline.release(step);
        }
        store<TYPE, 16>(out, w, in, total, 1, block / token_blocks * WIDE_ROWS + warp, block % token_blocks * 128, n);
    }
#endif
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. product_halves                                                                                                 */

/* Weights and activations lie in shared memory as wgmma reads them, and no other instruction sees them: a thread fetches up to 128
 * rows of weights, ahead, the first before the kernel before this one has ended; another the activations. Two groups of four warps
 * have 64 rows each. At most as many blocks as there are multiprocessors go over all of the output. */
enum { HALVES_ROOM = 184 << 10,                     /* bytes: over 40 KB are left for a block of attention to wait in */
       HALVES_AHEAD = 2 };                          /* stages under way until all have been asked for once, since the kernels
                                                       before this one may still read: more would stand before what they wait
                                                       for */
template <int TILES> struct Halves {                /* a stage: of few tokens two tiles of columns */
    static const int DEEP = TILES > 8 ? 1 : 2, STAGES = TILES > 8 ? 4 : HALVES_ROOM / ((16 + TILES) * DEEP << 10);
    uint4 w[DEEP][128 * 8], x[DEEP][TILES * 8 * 8]; /* [row tile] as in memory; [token] of 8 pieces of 16 bytes */
};

template <int TILES>
__global__ void __launch_bounds__(WIDE_ROWS * 32 + 64, 1) product_halves(float *out, Weights w, Inputs in, int n) {
#if HAS_WGMMA
    typedef Halves<TILES> OneStage;
    const int STAGES = OneStage::STAGES, DEEP = OneStage::DEEP;
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ uint64_t barriers[4 * STAGES];
    OneStage *stages = (OneStage *)shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int row_blocks = (w.row_tiles + w.block_tiles - 1) / w.block_tiles, token_blocks = (n + TILES * 8 - 1) / (TILES * 8);
    unsigned step = 0;
    Pipeline<STAGES> weights, inputs;
    weights.start(barriers, 32 * WIDE_ROWS);
    inputs.start(barriers + 2 * STAGES, 32 * WIDE_ROWS);
    inputs.empty = weights.empty;                   /* both are read together; neither thread gets a turn ahead of the other, since
                                                       a stage is read only when both have filled it */
    auto each_block = [&](auto use) {               /* use(first row tile, first token, part, first stage, their end) */
        for (int block = blockIdx.x; block < row_blocks * token_blocks * w.parts; block += gridDim.x) {
            int part = block / token_blocks / row_blocks, all = w.column_tiles / DEEP;
            use(block / token_blocks % row_blocks * w.block_tiles, block % token_blocks * TILES * 8, part, all * part / w.parts,
                all * (part + 1) / w.parts);
        }
    };
    if (warp != WIDE_ROWS) wait_for_inputs();       /* weights need not wait */
    if (warp >= WIDE_ROWS) {                        /* a thread fetches weights, another activations */
        bool codes = warp == WIDE_ROWS;
        Pipeline<STAGES> to = codes ? weights : inputs;
        if (lane == 0) each_block([&](int row_tile, int token, int, int k, int end) {
            int bytes = codes ? min(w.block_tiles, w.row_tiles - row_tile) * 2048 : TILES * 1024;
            for (; k < end; k++, step++) {
                OneStage &s = stages[step % STAGES];
                if (codes && step >= HALVES_AHEAD && step < STAGES) to.wait_full(step - HALVES_AHEAD);
                to.announce(step, bytes * DEEP);
                for (int i = 0; i < DEEP; i++)
                    if (codes) bulk_copy(s.w[i], w.codes + tile_index(w, row_tile, k * DEEP + i) * 128, bytes, to.full_at(step));
                    else bulk_copy(s.x[i], in.q + ((size_t)(k * DEEP + i) * in.stride + token) * 128, bytes, to.full_at(step));
            }
        });
        return;
    }
    each_block([&](int row_tile, int token, int part, int first, int end) {
        float sum[TILES][4];
        for (int k = first; k < end; k++, step++) {
            OneStage &s = stages[step % STAGES];
            weights.wait_full(step);
            inputs.wait_full(step);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            UNROLL for (int i = 0; i < 4 * DEEP; i++)
                start_wgmma(sum, descriptor(shared_address(s.w[i / 4]) + warp / 4 * 8192, 64) + i % 4 / 2 * 32 + i % 2 * 2,
                            descriptor(shared_address(s.x[i / 4]), 128) + i % 4 * 2, k > first || i);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (TILES > 8) {                        /* they run on while the next stage's are begun */
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (k > first) weights.release(step - 1);
            } else {
                wait_wgmma(sum);
                weights.release(step);
            }
        }
        if (TILES > 8) { wait_wgmma(sum); weights.release(step - 1); }
        row_tile += warp;
        const int N = TILES > 8 ? 8 : TILES;          /* fewer registers */
        if (warp < w.block_tiles && row_tile < w.row_tiles)
            UNROLL for (int t = 0; t < TILES; t += N)
                store<F16, N>(out + (size_t)part * n * w.row_tiles * 16, w, in, sum + t, 1, row_tile, token + t * 8, n);
    });
#endif
}

/* How many rows a block of product_halves has in decoding, and into how many parts columns are cut, is chosen so that all
 * multiprocessors end together; of equals the highest block, of which most is read ahead, and then the fewest parts. */
static void choose_blocks(Weights *w, int multiprocessors) {
    double least = INFINITY;
    for (int tiles = 8; tiles > 4; tiles--)
        for (int parts = 1; parts <= w->most_parts; parts++) {
            size_t rounds = ceil_div(ceil_div(w->row_tiles, tiles) * parts, multiprocessors);
            double time = (double)rounds * tiles / parts;
            if (time < least) { least = time; w->block_tiles = tiles; w->parts = parts; }
        }
}
