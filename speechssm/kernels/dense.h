/* Dense maps and norms of a few rows, for decoding: weights are read once for all rows, and every sum
 * runs over its terms in one fixed order, whatever rows stand beside and however the outputs are
 * shared between threads.
 */
#ifndef DENSE_H
#define DENSE_H

#include <math.h>

#include "lanes.h"

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

/* `outputs` rows of the weight against `rows` inputs; both are constants where this is called. */
INLINE void dot(const linear *map, int64_t first, int outputs, const float *x, int64_t x_stride,
                int rows, float *y, int64_t y_stride)
{
    const int64_t inputs = map->inputs, whole = inputs / LANES * LANES;
    const float *weight = map->weight + first * inputs;
    lanes sum[4][4] = {{{0}}};
    for (int64_t index = 0; index < whole; index += LANES) {
        lanes w[4];
        for (int output = 0; output < outputs; ++output)
            w[output] = load(weight + output * inputs, index, LANES, FLOAT32);
        for (int row = 0; row < rows; ++row) {
            lanes value = load(x + row * x_stride, index, LANES, FLOAT32);
            for (int output = 0; output < outputs; ++output)
                sum[output][row] += w[output] * value;
        }
    }
    if (whole < inputs)
        for (int row = 0; row < rows; ++row) {
            lanes value = load(x + row * x_stride, whole, inputs - whole, FLOAT32);
            for (int output = 0; output < outputs; ++output)
                sum[output][row] +=
                    value * load(weight + output * inputs, whole, inputs - whole, FLOAT32);
        }
    for (int row = 0; row < rows; ++row)
        for (int output = 0; output < outputs; ++output)
            y[row * y_stride + first + output] =
                sum_of(sum[output][row]) + (map->bias ? map->bias[first + output] : 0.0f);
}

/* y = W x + b for the outputs in `part`. */
static void apply(const linear *map, range part, const float *x, int64_t x_stride, float *y,
                  int64_t y_stride, int64_t batch)
{
    int64_t output = part.begin;
    for (; output + 4 <= part.end; output += 4) {
        int64_t row = 0;
        for (; row + 4 <= batch; row += 4)
            dot(map, output, 4, x + row * x_stride, x_stride, 4, y + row * y_stride, y_stride);
        for (; row < batch; ++row)
            dot(map, output, 4, x + row * x_stride, x_stride, 1, y + row * y_stride, y_stride);
    }
    for (; output < part.end; ++output)
        for (int64_t row = 0; row < batch; ++row)
            dot(map, output, 1, x + row * x_stride, x_stride, 1, y + row * y_stride, y_stride);
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
