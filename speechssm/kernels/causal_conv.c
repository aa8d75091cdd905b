/* Causal depthwise convolution over [B, T, D] within documents, and its gradients:
 *
 *   y_t = bias + sum_s filter_s x_{t-s}, over those s < taps between which no document starts
 *
 * One pass over memory each way: 2 streams of B T D numbers forward, 3 backward. Arithmetic, filter
 * and bias are float32; x, its gradient and the rows before it are of one type, y and its gradient
 * of one, each float32 or bfloat16. Rows may be strided in B and T, channels lie side by side.
 */
#include "lanes.h"

#define MOST_TAPS 16
#define TILE 1024
#define FLUSH 256 /* steps: sums over T are sums of sums, a plain one would lose digits */

typedef struct {
    rows x, y;            /* backward: y is the gradient of y */
    rows grad_x;          /* backward only */
    const float *filter;  /* [taps, D]; the last row is the weight of x_t, as in RecurrentGemma */
    const float *bias;    /* [D]; forward only */
    const void *before;   /* [B, taps - 1, D] of the type of x, oldest first; or null */
    const uint8_t *start; /* [B, T] or null */
    void *grad_before;    /* null where `before` is */
    float *grad_filter;   /* [B, taps, D]: the sum over B is left to the caller */
    float *grad_bias;     /* [B, D] */
    int64_t batch, length, width;
    int32_t taps, x_type, y_type;
    int32_t stream; /* write past the caches */
    int32_t threads;
} arguments;

/* Address of a row of `before` (or of its gradient) for a time of -1 ... 1 - taps. */
INLINE void *earlier(const arguments *call, const void *before, int64_t row, int64_t time,
                     int64_t channel)
{
    const int64_t index = (row + 1) * (call->taps - 1) + time;
    return (void *)at(before, index * call->width + channel, call->x_type);
}

INLINE void *x_at(const arguments *call, int64_t row, int64_t time, int64_t channel)
{
    return time < 0 ? earlier(call, call->before, row, time, channel)
                    : row_of(call->x, row, time, channel, call->x_type);
}

INLINE void forward_step(const arguments *call, const void *const *x, int64_t used, void *y,
                         int64_t channel, int64_t index, int count, enum way way)
{
    lanes sum = load(call->bias, channel + index, count, FLOAT32);
    for (int64_t shift = 0; shift < used; ++shift) {
        const float *filter = call->filter + (call->taps - 1 - shift) * call->width + channel;
        sum += load(filter, index, count, FLOAT32) * load(x[shift], index, count, call->x_type);
    }
    store(y, index, sum, count, call->y_type, way);
}

static void forward_tile(const arguments *call, int64_t row, int64_t channel, int64_t width)
{
    const int64_t whole = width / LANES * LANES, x_ahead = ahead(call->x, call->x_type);
    const int64_t first = call->before ? 1 - call->taps : 0;
    const uint8_t *start = call->start ? call->start + row * call->length : 0;
    for (int64_t time = 0; time < call->length; ++time) {
        const void *x[MOST_TAPS];
        int64_t used = 0;
        for (int64_t from = time; used < call->taps && from >= first; --from) {
            x[used++] = x_at(call, row, from, channel);
            if (start && from >= 0 && start[from])
                break;
        }
        void *y = row_of(call->y, row, time, channel, call->y_type);
        for (int64_t index = 0; index < whole; index += LANES) {
            prefetch(x[0], index + x_ahead, call->x_type);
            forward_step(call, x, used, y, channel, index, LANES, call->stream);
        }
        if (whole < width)
            forward_step(call, x, used, y, channel, whole, width - whole, CACHE);
    }
}

/* The gradients that reached one row of x: shifts[n] is how far before grad[n] that row lies. */
typedef struct {
    const void *grad[MOST_TAPS];
    int64_t shift[MOST_TAPS], used;
} reached;

INLINE void backward_step(const arguments *call, const reached *from, const void *x, void *grad_x,
                          lanes *sums, int64_t channel, int64_t index, int count, enum way way)
{
    const lanes value = load(x, index, count, call->x_type);
    lanes total = {0};
    for (int64_t n = 0; n < from->used; ++n) {
        const int64_t tap = call->taps - 1 - from->shift[n];
        const lanes grad = load(from->grad[n], index, count, call->y_type);
        total += grad * load(call->filter, tap * call->width + channel + index, count, FLOAT32);
        sums[tap * (TILE / LANES)] += grad * value;
        if (from->shift[n] == 0)
            sums[call->taps * (TILE / LANES)] += grad;
    }
    store(grad_x, index, total, count, call->x_type, way);
}

/* Add the sums to what there is in memory, and begin them anew. */
static void flush(const arguments *call, int64_t row, int64_t channel, int64_t width, lanes *sums)
{
    for (int64_t tap = 0; tap <= call->taps; ++tap) {
        float *target = tap < call->taps
                            ? call->grad_filter + (row * call->taps + tap) * call->width + channel
                            : call->grad_bias + row * call->width + channel;
        const float *source = (const float *)(sums + tap * (TILE / LANES));
        for (int64_t index = 0; index < width; ++index)
            target[index] += source[index];
    }
    memset(sums, 0, (call->taps + 1) * (TILE / LANES) * sizeof(lanes));
}

static void backward_tile(const arguments *call, int64_t row, int64_t channel, int64_t width)
{
    lanes sums[(MOST_TAPS + 1) * (TILE / LANES)] = {0};
    const int64_t whole = width / LANES * LANES;
    const int64_t x_ahead = ahead(call->x, call->x_type), y_ahead = ahead(call->y, call->y_type);
    const uint8_t *start = call->start ? call->start + row * call->length : 0;
    for (int64_t time = call->before ? 1 - call->taps : 0; time < call->length; ++time) {
        reached from = {.used = 0};
        for (int64_t shift = 0; shift < call->taps && time + shift < call->length; ++shift) {
            if (time + shift < 0)
                continue;
            if (shift && start && start[time + shift])
                break;
            from.grad[from.used] = row_of(call->y, row, time + shift, channel, call->y_type);
            from.shift[from.used++] = shift;
        }
        const void *x = x_at(call, row, time, channel);
        const void *last = from.used ? from.grad[from.used - 1] : x;
        const enum way way = time < 0 ? CACHE : call->stream;
        void *grad_x = time < 0 ? earlier(call, call->grad_before, row, time, channel)
                                : row_of(call->grad_x, row, time, channel, call->x_type);
        for (int64_t index = 0; index < whole; index += LANES) {
            prefetch(x, index + x_ahead, call->x_type);
            prefetch(last, index + y_ahead, call->y_type);
            backward_step(call, &from, x, grad_x, sums + index / LANES, channel, index, LANES, way);
        }
        if (whole < width)
            backward_step(call, &from, x, grad_x, sums + whole / LANES, channel, whole,
                          width - whole, CACHE);
        if (time % FLUSH == 0)
            flush(call, row, channel, width, sums);
    }
    flush(call, row, channel, width, sums);
}

void causal_conv_forward(const arguments *call)
{
    FOR_ALL_TILES(call, TILE, forward_tile)
}

void causal_conv_backward(const arguments *call)
{
    FOR_ALL_TILES(call, TILE, backward_tile)
}
