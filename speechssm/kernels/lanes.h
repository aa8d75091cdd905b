/* Sixteen floats at a time, in the vector types that GCC and Clang share: the compiler cuts them to
 * the registers of the processor. Arithmetic is float32; memory holds float32 or bfloat16.
 */
#ifndef LANES_H
#define LANES_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t words __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

enum type { FLOAT32 = 0, BFLOAT16 = 1 };

/* How stores treat the caches. STREAM writes past them, whole lines at a time: no line is read only
 * to be overwritten, which is a third of the traffic where the result is larger than the caches. */
enum way { CACHE = 0, STREAM = 1 };

INLINE int64_t bytes_of(enum type type) { return type == FLOAT32 ? 4 : 2; }

INLINE const void *at(const void *base, int64_t index, enum type type)
{
    return (const char *)base + index * bytes_of(type);
}

INLINE lanes all(float value) { return value - (lanes){0}; }

INLINE lanes choose(words mask, lanes yes, lanes no)
{
    return (lanes)((mask & (words)yes) | (~mask & (words)no));
}

/* The first `count` lanes from memory, zeros in the others. */
INLINE lanes load(const void *base, int64_t index, int count, enum type type)
{
    if (type == FLOAT32) {
        lanes value = {0};
        if (count == LANES) /* a copy of a size that is not known here would be a call */
            memcpy(&value, at(base, index, type), sizeof value);
        else
#ifdef __AVX512F__
            value = (lanes)_mm512_maskz_loadu_ps((1u << count) - 1, at(base, index, type));
#else
            memcpy(&value, at(base, index, type), count * sizeof(float));
#endif
        return value;
    }
    halves half = {0};
    memcpy(&half, at(base, index, type), count * sizeof(uint16_t));
    return (lanes)(__builtin_convertvector(half, bits) << 16);
}

/* Round to nearest even; NaN stays NaN. */
INLINE halves to_bfloat16(lanes value)
{
    bits raw = (bits)value;
    bits rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
    bits nan = (bits)(value != value);
    return __builtin_convertvector((nan & ((raw >> 16) | 0x40)) | (~nan & rounded), halves);
}

INLINE void store(void *base, int64_t index, lanes value, int count, enum type type, enum way way)
{
    void *address = (void *)at(base, index, type);
    if (type == BFLOAT16) {
        halves half = to_bfloat16(value);
#ifdef __AVX__
        if (way == STREAM && count == LANES) {
            _mm256_stream_si256(address, (__m256i)half);
            return;
        }
#endif
        memcpy(address, &half, count * sizeof(uint16_t));
        return;
    }
#if defined(__AVX512F__)
    if (way == STREAM && count == LANES) {
        _mm512_stream_ps(address, (__m512)value);
        return;
    }
#elif defined(__AVX__)
    if (way == STREAM && count == LANES) {
        __m256 half[2];
        memcpy(half, &value, sizeof value);
        _mm256_stream_ps((float *)address, half[0]);
        _mm256_stream_ps((float *)address + 8, half[1]);
        return;
    }
#endif
    if (count == LANES)
        memcpy(address, &value, sizeof value);
    else
        memcpy(address, &value, count * sizeof(float));
}

/* After the last STREAM store of a thread, before another reads what it wrote. */
INLINE void finish_streams(void)
{
#ifdef __AVX__
    _mm_sfence();
#endif
}

/* Of a [B, T, D] tensor whose channels lie side by side; strides in elements. */
typedef struct {
    void *data;
    int64_t batch_stride, time_stride;
} rows;

INLINE void *row_of(rows rows, int64_t row, int64_t time, int64_t channel, enum type type)
{
    int64_t index = row * rows.batch_stride + time * rows.time_stride + channel;
    return (void *)at(rows.data, index, type);
}

/* Elements between the present row and the later one that is asked for in advance. */
INLINE int64_t ahead(rows rows, enum type type)
{
    const int64_t distance = 8192 / bytes_of(type), step = rows.time_stride;
    return step > 0 && step < distance ? distance / step * step : step;
}

INLINE void prefetch(const void *base, int64_t index, enum type type)
{
    __builtin_prefetch(at(base, index, type));
}

/* a b + c, rounded once where the processor can. Written out where the same sum must have the same
 * bits in several loops: left to itself, the compiler may fuse in one of them and not in another. */
INLINE lanes multiply_add(lanes a, lanes b, lanes c)
{
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 left[2], right[2], sum[2];
    memcpy(left, &a, sizeof a);
    memcpy(right, &b, sizeof b);
    memcpy(sum, &c, sizeof c);
    for (int half = 0; half < 2; ++half)
        sum[half] = _mm256_fmadd_ps(left[half], right[half], sum[half]);
    memcpy(&c, sum, sizeof c);
    return c;
#elif defined(__FP_FAST_FMAF)
    for (int lane = 0; lane < LANES; ++lane)
        c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE lanes square_root(lanes value)
{
#ifdef __AVX512F__
    return (lanes)_mm512_sqrt_ps((__m512)value);
#else
    for (int lane = 0; lane < LANES; ++lane)
        value[lane] = __builtin_sqrtf(value[lane]);
    return value;
#endif
}

/* Cut x = n log 2 + rest with n whole. Returns 2^n and puts expm1(rest) into `fraction`, so that
 * exp(x) = 2^n + 2^n fraction and expm1(x) = 2^n fraction + (2^n - 1), each to about 1e-7 of itself.
 * Outside of -87 ... 88 the result is that of the nearer end; NaN comes out as NaN. */
INLINE lanes exponential(lanes x, lanes *fraction)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = choose(x < -87.0f, all(-87.0f), x);
    x = choose(x > 88.0f, all(88.0f), x);
    lanes shifted = x * 1.44269504f + shift;
    lanes whole = shifted - shift;
    lanes rest = x - whole * 0.693359375f; /* log 2 in two parts, of which the first is exact */
    rest = rest + whole * 2.12194440e-4f;
    lanes series = all(1.9875691500e-4f); /* (exp(r) - 1 - r) / r^2 on |r| < log(2) / 2 */
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    *fraction = series * (rest * rest) + rest;
    return (lanes)((((words)shifted - (words)all(shift)) + 127) << 23);
}

INLINE lanes exp_lanes(lanes x)
{
    lanes fraction, power = exponential(x, &fraction);
    return power * fraction + power;
}

/* Channels are cut into tiles such that rows times tiles is a multiple of the number of threads.
 * Tiles are as wide as that allows: memory likes long stretches of a row. */
#define LARGEST_TILE 4096
#define SMALLEST_TILE 64

INLINE int64_t tile_width(int64_t batch, int64_t width, int threads)
{
    int64_t common = threads, other = batch;
    while (other) {
        int64_t rest = common % other;
        common = other;
        other = rest;
    }
    int64_t tiles = threads / common;
    int64_t tile = (width + tiles - 1) / tiles;
    tile = (tile + LANES - 1) / LANES * LANES;
    if (tile < SMALLEST_TILE)
        tile = SMALLEST_TILE;
    return tile < LARGEST_TILE ? tile : LARGEST_TILE;
}

/* One tile of channels of one row after the other, over threads: `function(call, row, channel,
 * width)`. No tile is wider than `most`. */
#define FOR_ALL_TILES(call, most, function)                                                        \
    int64_t tile = tile_width(call->batch, call->width, call->threads);                            \
    tile = tile < most ? tile : most;                                                              \
    const int64_t tiles = (call->width + tile - 1) / tile;                                         \
    _Pragma("omp parallel for num_threads(call->threads) schedule(static)")                        \
    for (int64_t work = 0; work < call->batch * tiles; ++work) {                                   \
        const int64_t row = work / tiles, channel = work % tiles * tile;                           \
        const int64_t rest = call->width - channel;                                                \
        function(call, row, channel, rest < tile ? rest : tile);                                   \
        finish_streams();                                                                          \
    }

#endif
