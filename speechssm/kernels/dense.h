/* Dense maps and norms of a few rows, for decoding: weights are read once for all rows, and every sum
 * runs over its terms in one fixed order, whatever rows stand beside and however the outputs are
 * shared between threads. Products are fused into sums where it is written (`multiply_add`) and, by
 * the compiler's flags, nowhere else.
 */
#ifndef DENSE_H
#define DENSE_H

#include <math.h>

#include "lanes.h"

/* Rows, and outputs or vectors of lanes, whose sums are in registers together. */
#define TILE 4
/* Numbers that the second cache has room for beside others: 512 KiB. */
#define CACHED 131072

typedef struct {
    const float *weight; /* [outputs, inputs] */
    const float *bias;   /* [outputs] or null */
    int64_t outputs, inputs;
} linear;

typedef struct {
    const float *scale; /* [D] */
    float epsilon;
} norm;

typedef struct {
    int64_t begin, end;
} range;

/* This thread's part of `count` things, in whole groups of `group`. */
INLINE range share(int64_t count, int64_t group, int64_t thread, int64_t threads)
{
    int64_t groups = (count + group - 1) / group;
    int64_t begin = groups * thread / threads * group, end = groups * (thread + 1) / threads * group;
    return (range){begin, end < count ? end : count};
}

INLINE float sum_of(lanes value)
{
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight half[2];
    four quarter[2];
    memcpy(half, &value, sizeof half);
    half[0] += half[1];
    memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

/* `outputs` rows of the weight against `rows` inputs; both are constants where this is called. Of the
 * weight's rows from `next` on, `ahead` are asked for meanwhile: memory would idle otherwise. */
INLINE void dot(const linear *map, int64_t first, int outputs, const float *x, int64_t x_stride,
                int rows, float *y, int64_t y_stride, int64_t next, int ahead)
{
    const int64_t inputs = map->inputs, whole = inputs / LANES * LANES;
    const float *weight = map->weight + first * inputs;
    lanes sum[TILE][TILE] = {{{0}}};
    for (int64_t index = 0; index < whole; index += LANES) {
        lanes w[TILE];
        for (int row = 0; row < ahead; ++row)
            prefetch(map->weight, (next + row) * inputs + index, FLOAT32);
        for (int output = 0; output < outputs; ++output)
            w[output] = load(weight + output * inputs, index, LANES, FLOAT32);
        for (int row = 0; row < rows; ++row) {
            lanes value = load(x + row * x_stride, index, LANES, FLOAT32);
            for (int output = 0; output < outputs; ++output)
                sum[output][row] = multiply_add(w[output], value, sum[output][row]);
        }
    }
    if (whole < inputs)
        for (int row = 0; row < rows; ++row) {
            lanes value = load(x + row * x_stride, whole, inputs - whole, FLOAT32);
            for (int output = 0; output < outputs; ++output) {
                lanes w = load(weight + output * inputs, whole, inputs - whole, FLOAT32);
                sum[output][row] = multiply_add(w, value, sum[output][row]);
            }
        }
    for (int row = 0; row < rows; ++row)
        for (int output = 0; output < outputs; ++output)
            y[row * y_stride + first + output] =
                sum_of(sum[output][row]) + (map->bias ? map->bias[first + output] : 0.0f);
}

/* All rows against `outputs` rows of the weight, which stay in the cache meanwhile. The next ones are
 * asked for by all tiles of rows together; a single row waits for memory anyhow. */
INLINE void dot_rows(const linear *map, int64_t first, int outputs, const float *x, int64_t x_stride,
                     float *y, int64_t y_stride, int64_t batch)
{
    const int ahead = batch < 2 * TILE ? TILE : batch < TILE * TILE ? TILE / 2 : 1;
    int64_t row = 0, next = first + TILE;
    for (; row + TILE <= batch; row += TILE, next += ahead)
        dot(map, first, outputs, x + row * x_stride, x_stride, TILE, y + row * y_stride, y_stride,
            next, ahead);
    for (; row < batch; ++row)
        dot(map, first, outputs, x + row * x_stride, x_stride, 1, y + row * y_stride, y_stride, 0, 0);
}

/* y = W x + b for the outputs in `part`. So many rows at a time that they stay in the second cache:
 * those of a large batch would come from memory for every few outputs. */
static void apply(const linear *map, range part, const float *x, int64_t x_stride, float *y,
                  int64_t y_stride, int64_t batch)
{
    const int64_t fitting = CACHED / map->inputs / TILE * TILE, most = fitting ? fitting : TILE;
    for (; batch > 0; batch -= most, x += most * x_stride, y += most * y_stride) {
        const int64_t rows = batch < most ? batch : most;
        int64_t output = part.begin;
        for (; output + TILE <= part.end; output += TILE)
            dot_rows(map, output, TILE, x, x_stride, y, y_stride, rows);
        for (; output < part.end; ++output)
            dot_rows(map, output, 1, x, x_stride, y, y_stride, rows);
    }
}

static void normalise(const norm *norm, const float *x, float *y, int64_t width, int64_t stride,
                      int64_t batch)
{
    for (int64_t row = 0; row < batch; ++row, x += stride, y += stride) {
        lanes squares = {0};
        for (int64_t index = 0; index < width; index += LANES) {
            int count = width - index < LANES ? width - index : LANES;
            lanes value = load(x, index, count, FLOAT32);
            squares += value * value;
        }
        float factor = 1.0f / sqrtf(sum_of(squares) / width + norm->epsilon);
        for (int64_t index = 0; index < width; ++index)
            y[index] = x[index] * factor * (1.0f + norm->scale[index]);
    }
}

#endif
