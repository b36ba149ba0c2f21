/* limits.c - the ceilings of this machine: how fast all threads together read memory, multiply int8 and multiply FP32.
 *
 *   cc -O3 -march=native -fopenmp bench/limits.c -o limits && ./limits
 *
 * Machines are shared and their clocks move, so a speed means something as a share of what the machine could do in the
 * same minute: run this beside every measurement. It prints a line for each ceiling, "name value unit how", the best of
 * five tries, in about two seconds in all; a multiplication and its addition are two operations. OMP_NUM_THREADS sets
 * the threads. With LIMITS_NO_MAIN it is only the three functions at the end, for another program to measure with. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE       /* madvise */
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>     /* madvise */
#include <time.h>         /* clock_gettime */
#ifdef _OPENMP
#include <omp.h>
static size_t thread(void) { return (size_t)omp_get_thread_num(); }
static size_t n_threads(void) { return (size_t)omp_get_max_threads(); }
#else
static size_t thread(void) { return 0; }
static size_t n_threads(void) { return 1; }
#endif

#if defined(__AVX512BW__)
enum { WIDTH = 64 };                    /* bytes of a vector */
#elif defined(__AVX__)
enum { WIDTH = 32 };
#else
enum { WIDTH = 16 };                    /* SSE, NEON */
#endif
typedef uint64_t Words  __attribute__((vector_size(WIDTH)));
typedef float    Floats __attribute__((vector_size(WIDTH)));
typedef int32_t  Ints   __attribute__((vector_size(WIDTH)));
static volatile double sink;            /* takes results, so that a compiler cannot leave the work out */

static double now(void) {               /* seconds */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Calls work() in every thread, five times; it returns how much it did. Returns 1e9 of that a second, of the best time. */
static double rate(double (*work)(void)) {
    double best = 0;
    for (int i = 0; i < 5; i++) {
        double done = 0, start = now();
        #pragma omp parallel reduction(+:done)
        done += work();
        double r = 1e-9 * done / (now() - start);
        if (r > best) best = r;
    }
    return best;
}

/* Memory: 2 GiB that no cache holds, on huge pages where there are any. Each thread reads its part in four places at once:
 * with a single one, the prefetcher's stop at the end of each page shows. */
enum { PAGE = 2 << 20, PAGES = 1024, PLACES = 4 };
static unsigned char *memory;

static double read_memory(void) {       /* returns bytes */
    size_t n = (size_t)PAGE * PAGES / sizeof(Words) / PLACES / n_threads();
    const Words *p = (const Words *)memory + thread() * PLACES * n;
    Words sum[PLACES] = {{0}};
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < PLACES; k++) sum[k] += p[k * n + i];
    for (size_t k = 0; k < PLACES; k++) sink = (double)sum[k][0];
    return (double)(n * PLACES * sizeof(Words));
}

/* Arithmetic: one instruction again and again on registers that do not wait for each other, without memory: as many as hide
 * its latency and fit. Their first values come from a volatile: a compiler that knew them equal would do the work once. */
#ifdef __aarch64__
enum { CHAINS = 16 };
#else
enum { CHAINS = 12 };
#endif
enum { TURNS = 5000000 };
#define EACH _Pragma("GCC unroll 16") for (int k = 0; k < CHAINS; k++)

/* FMA: x += u * u */
#if defined(__FMA__)
#define FP32_HOW "vfmadd231ps"
#define FMA(x) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(x) : "x"(u));
#elif defined(__aarch64__)
#define FP32_HOW "fmla"
#define FMA(x) __asm__ volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(x) : "w"(u));
#else
#define FP32_HOW "plain C"
#define FMA(x) x = x * u + u;           /* not x + u * u, which a compiler would multiply once */
#endif

static double fp32(void) {              /* returns operations */
    volatile float start = 0.5f;
    Floats zero = {0}, u = zero + start, x[CHAINS];
    EACH x[k] = zero + start;
    for (int n = 0; n < TURNS; n++) EACH FMA(x[k])
    EACH sink = (double)x[k][0];
    return 2.0 * TURNS * CHAINS * WIDTH / sizeof(float);
}

/* DOT: each int32 of x += the dot product of four int8 of u and four of u. */
#if defined(__AVX512VNNI__)
#define INT8_HOW "vpdpbusd (AVX-512)"
#define DOT(x) __asm__ volatile("vpdpbusd %1, %1, %0" : "+x"(x) : "x"(u));
#elif defined(__AVXVNNI__)
#define INT8_HOW "vpdpbusd (AVX)"
#define DOT(x) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(x) : "x"(u));
#elif defined(__AVX512BW__) || defined(__AVX2__)        /* what 8 bits need; sums of 4-bit codes can do with fewer */
#define INT8_HOW "vpmaddubsw, vpmaddwd, vpaddd"
#define DOT(x) __asm__ volatile("vpmaddubsw %2, %2, %1\n vpmaddwd %2, %1, %1\n vpaddd %1, %0, %0" \
                                : "+x"(x), "=&x"(t) : "x"(u));
#elif defined(__ARM_FEATURE_DOTPROD)
#define INT8_HOW "sdot"
#define DOT(x) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(x) : "w"(u));
#else
#define INT8_HOW "as FP32, no int8 dot products"
#endif

static double int8(void) {              /* returns operations */
#ifndef DOT
    return fp32();
#else
    volatile int32_t start = 0x01010101;
    Ints zero = {0}, u = zero + start, t = u, x[CHAINS];
    EACH x[k] = zero + start;
    for (int n = 0; n < TURNS; n++) EACH DOT(x[k])
    EACH sink = (double)(x[k][0] + t[0]);
    return 2.0 * TURNS * CHAINS * WIDTH;
#endif
}

/* GB/s; 0 where there is no memory. It is kept for the next time: a virtual machine gives freed memory back to its host, some
 * seconds later and in pieces, and everything waits meanwhile (SPEED.md, What a measurement leaves behind). */
double read_bandwidth(void) {
    if (!memory) {
        memory = (unsigned char *)aligned_alloc(PAGE, (size_t)PAGE * PAGES);
        if (!memory) return 0;
#ifdef MADV_HUGEPAGE
        madvise(memory, (size_t)PAGE * PAGES, MADV_HUGEPAGE);
#endif
        #pragma omp parallel for schedule(static)
        for (int i = 0; i < PAGES; i++) memset(memory + (size_t)i * PAGE, i + 1, PAGE);
    }
    return rate(read_memory);
}

double int8_peak(void) { return rate(int8); }          /* GOP/s */
double fp32_peak(void) { return rate(fp32); }          /* GFLOP/s */

#ifndef LIMITS_NO_MAIN
int main(void) {
    printf("threads %zu\n", n_threads());
    printf("read_bandwidth %.1f GB/s\n", read_bandwidth());
    printf("int8_peak %.0f GOP/s %s\n", int8_peak(), INT8_HOW);
    printf("fp32_peak %.0f GFLOP/s %s (%d bits)\n", fp32_peak(), FP32_HOW, 8 * WIDTH);
    return 0;
}
#endif
