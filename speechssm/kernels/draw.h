/* A unit drawn from a row of logits, with temperature, top-k and top-p. In linear time: the limits
 * are found by partitioning, nothing is sorted.
 */
#ifndef DRAW_H
#define DRAW_H

#include <math.h>

#include "lanes.h"

/* The smallest value that is kept where values are taken from the largest down until their weights
 * (one each, or the values themselves) reach `target`. Moves `values` about. */
static float threshold(float *values, int64_t count, int by_value, double target)
{
    for (;;) {
        const float a = values[0], b = values[count / 2], c = values[count - 1];
        const float pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
        double above = 0.0, equal = 0.0;
        int64_t larger = 0, same = 0; /* [larger ones | equal ones | smaller ones] */
        for (int64_t index = 0; index < count; ++index) {
            const float value = values[index];
            if (value < pivot)
                continue;
            const float smaller = values[larger + same];
            values[larger + same] = value;
            values[index] = smaller;
            if (value == pivot) {
                ++same;
                equal += by_value ? value : 1.0;
                continue;
            }
            values[larger + same] = values[larger];
            values[larger++] = value;
            above += by_value ? value : 1.0;
        }
        if (above >= target && larger) {
            count = larger;
        } else if (above + equal >= target || larger + same == count) {
            return pivot;
        } else {
            target -= above + equal;
            values += larger + same;
            count -= larger + same;
        }
    }
}

/* A unit by inverting the cumulative distribution; -1 where a logit is not finite. */
static int64_t sample(const float *logits, int64_t vocabulary, float temperature, int64_t top_k,
                      float top_p, float uniform, float *weights, float *scratch)
{
    int64_t likeliest = 0;
    for (int64_t unit = 0; unit < vocabulary; ++unit) {
        if (!isfinite(logits[unit]))
            return -1;
        if (logits[unit] > logits[likeliest])
            likeliest = unit;
    }
    if (temperature <= 0.0f)
        return likeliest;
    for (int64_t unit = 0; unit < vocabulary; unit += LANES) {
        int count = vocabulary - unit < LANES ? vocabulary - unit : LANES;
        lanes value = (load(logits, unit, count, FLOAT32) - logits[likeliest]) / temperature;
        /* Below its smallest result `exp_lanes` is no exponential: such units have no weight. */
        value = choose(value < -87.0f, all(0.0f), exp_lanes(value));
        store(weights, unit, value, count, FLOAT32, CACHE);
    }
    float least = 0.0f;
    if (top_k > 0 && top_k < vocabulary) {
        memcpy(scratch, weights, vocabulary * sizeof(float));
        least = threshold(scratch, vocabulary, 0, (double)top_k);
    }
    double total = 0.0;
    int64_t kept = 0;
    for (int64_t unit = 0; unit < vocabulary; ++unit) {
        if (weights[unit] < least)
            continue;
        total += weights[unit];
        scratch[kept++] = weights[unit];
    }
    if (top_p < 1.0f) {
        least = threshold(scratch, kept, 1, top_p * total);
        total = 0.0;
        for (int64_t unit = 0; unit < vocabulary; ++unit)
            total += weights[unit] >= least ? weights[unit] : 0.0;
    }
    double sum = 0.0;
    int64_t last = likeliest;
    for (int64_t unit = 0; unit < vocabulary; ++unit) {
        if (weights[unit] < least || weights[unit] == 0.0f)
            continue;
        sum += weights[unit];
        last = unit;
        if (sum > uniform * total)
            break;
    }
    return last;
}

#endif
