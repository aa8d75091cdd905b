/* Multi-query attention of one token over a ring of keys and values, and its rotary encoding. The ring
 * is cut into pieces, which threads share and which are put together in one fixed order.
 */
#ifndef ATTEND_H
#define ATTEND_H

#include "dense.h"

typedef struct {
    linear query, key, value, output;
    const float *frequencies; /* [rotated / 2] or null */
    float *keys, *values;     /* [rows, S, H] */
    int64_t *position;        /* [rows] */
    int64_t heads, head_width, slots, rotated;
} attention;

/* Slots of the ring that one thread attends to at a time. */
#define PIECE 128

INLINE int64_t pieces_of(int64_t slots) { return (slots + PIECE - 1) / PIECE; }

/* Of a row whose token at `position` is in the ring already. */
INLINE int64_t filled_slots(const attention *block, int64_t state)
{
    const int64_t position = block->position[state];
    return position + 1 < block->slots ? position + 1 : block->slots;
}

/* Rotate a head by sines and cosines, [rotated / 2] each, one after the other. */
INLINE void rotate(float *head, const float *sines, int64_t half)
{
    const float *cosines = sines + half;
    for (int64_t index = 0; index < half; ++index) {
        float first = head[index], second = head[half + index];
        head[index] = first * cosines[index] - second * sines[index];
        head[half + index] = second * cosines[index] + first * sines[index];
    }
}

/* Rotate the query heads and the key of a row as its position wants it. */
static void rotate_row(const attention *block, float *query, float *key, int64_t position,
                       float *sines)
{
    const int64_t half = block->rotated / 2;
    for (int64_t index = 0; index < half; ++index) {
        const float angle = (float)position * block->frequencies[index];
        sines[index] = sinf(angle);
        sines[half + index] = cosf(angle);
    }
    rotate(key, sines, half);
    for (int64_t head = 0; head < block->heads; ++head)
        rotate(query + head * block->head_width, sines, half);
}

/* For `heads` heads and `vectors` vectors of `count` lanes (constants where this is called): the sum
 * of values over slots, each times its weight. */
INLINE void mix(const float *weights, int heads, const float *values, int64_t width, int vectors,
                int count, int64_t slots, float *y, int64_t y_stride)
{
    lanes sum[TILE][TILE] = {{{0}}};
    for (int64_t slot = 0; slot < slots; ++slot) {
        lanes value[TILE];
        for (int vector = 0; vector < vectors; ++vector)
            value[vector] = load(values + slot * width, vector * LANES, count, FLOAT32);
        for (int head = 0; head < heads; ++head)
            for (int vector = 0; vector < vectors; ++vector)
                sum[head][vector] = multiply_add(all(weights[head * PIECE + slot]), value[vector],
                                                 sum[head][vector]);
    }
    for (int head = 0; head < heads; ++head)
        for (int vector = 0; vector < vectors; ++vector)
            store(y + head * y_stride, vector * LANES, sum[head][vector], count, FLOAT32, CACHE);
}

INLINE void mix_heads(const float *weights, int heads, const float *values, int64_t width,
                      int64_t slots, float *y, int64_t y_stride)
{
    int64_t index = 0;
    for (; index + TILE * LANES <= width; index += TILE * LANES)
        mix(weights, heads, values + index, width, TILE, LANES, slots, y + index, y_stride);
    for (; index + LANES <= width; index += LANES)
        mix(weights, heads, values + index, width, 1, LANES, slots, y + index, y_stride);
    if (index < width)
        mix(weights, heads, values + index, width, 1, width - index, slots, y + index, y_stride);
}

/* All heads over the slots begin ... end - 1 of one row's ring: for each head its largest logit, the
 * sum of exp(logit - largest), and the values weighted so. Keys and values are read from memory once:
 * a piece of them stays in the cache for all heads. */
static void attend_piece(const attention *block, const float *query, const float *keys,
                         const float *values, int64_t begin, int64_t end, float *partial)
{
    const int64_t width = block->head_width, count = end - begin, size = width + 2;
    const float factor = 1.0f / sqrtf((float)width);
    const linear map = {keys + begin * width, NULL, count, width};
    values += begin * width;
    for (int64_t head = 0; head < block->heads; head += TILE, partial += TILE * size) {
        const int64_t heads = block->heads - head < TILE ? block->heads - head : TILE;
        float weights[TILE * PIECE];
        for (int64_t slot = 0; slot < count; slot += LANES) {
            const range part = {slot, slot + LANES < count ? slot + LANES : count};
            apply(&map, part, query + head * width, width, weights, PIECE, heads);
            /* The values of these slots are asked for while their keys are worked on. */
            for (int64_t index = slot * width; !head && index < part.end * width; index += LANES)
                prefetch(values, index, FLOAT32);
        }
        for (int64_t one = 0; one < heads; ++one) {
            float *mine = weights + one * PIECE, largest = -INFINITY;
            for (int64_t slot = 0; slot < count; ++slot) {
                mine[slot] *= factor;
                largest = mine[slot] > largest ? mine[slot] : largest;
            }
            lanes total = {0};
            for (int64_t slot = 0; slot < count; slot += LANES) {
                const int some = count - slot < LANES ? count - slot : LANES;
                store(mine, slot, exp_lanes(load(mine, slot, LANES, FLOAT32) - largest), LANES,
                      FLOAT32, CACHE);
                total += load(mine, slot, some, FLOAT32);
            }
            partial[one * size] = largest;
            partial[one * size + 1] = sum_of(total);
        }
        if (heads == TILE)
            mix_heads(weights, TILE, values, width, count, partial + 2, size);
        else
            for (int64_t one = 0; one < heads; ++one)
                mix_heads(weights + one * PIECE, 1, values, width, count, partial + one * size + 2,
                          size);
    }
}

/* What one head found in `used` pieces, `size` apart, as if it were one. */
static void merge(const float *partial, int64_t size, int64_t used, int64_t width, float *y)
{
    float largest = -INFINITY, total = 0.0f;
    for (int64_t piece = 0; piece < used; ++piece)
        largest = partial[piece * size] > largest ? partial[piece * size] : largest;
    memset(y, 0, width * sizeof(float));
    for (int64_t piece = 0; piece < used; ++piece) {
        const float *from = partial + piece * size;
        const float weight = expf(from[0] - largest);
        total += weight * from[1];
        for (int64_t index = 0; index < width; ++index)
            y[index] += weight * from[2 + index];
    }
    for (int64_t index = 0; index < width; ++index)
        y[index] /= total;
}

#endif
