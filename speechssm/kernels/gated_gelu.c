/* gelu(gate) * up, number by number, and its gradients; the tanh form of GELU:
 *
 *   gelu(x) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
 *
 * One pass over memory each way: 3 streams forward, 5 backward. Arithmetic is float32, numbers are
 * all float32 or all bfloat16, one after the other.
 */
#include "lanes.h"

typedef struct {
    const void *gate, *up, *grad; /* grad: backward only */
    void *product;                /* forward only */
    void *grad_gate, *grad_up;    /* backward only */
    int64_t count;
    int32_t type, stream, threads;
} arguments;

/* sigmoid(2 z); `slope` becomes the derivative of 2 z by x. */
INLINE lanes squashed(lanes x, lanes *slope)
{
    const float scale = 1.5957691216f, cube = 0.044715f; /* 2 sqrt(2 / pi) */
    const lanes square = x * x;
    *slope = scale * (1.0f + 3.0f * cube * square);
    return 1.0f / (1.0f + exp_lanes(-scale * x * (1.0f + cube * square)));
}

INLINE void forward_step(const arguments *call, int64_t index, int count, enum way way)
{
    const lanes x = load(call->gate, index, count, call->type);
    const lanes up = load(call->up, index, count, call->type);
    lanes slope;
    store(call->product, index, x * squashed(x, &slope) * up, count, call->type, way);
}

INLINE void backward_step(const arguments *call, int64_t index, int count, enum way way)
{
    const lanes x = load(call->gate, index, count, call->type);
    const lanes up = load(call->up, index, count, call->type);
    const lanes grad = load(call->grad, index, count, call->type);
    lanes slope;
    const lanes open = squashed(x, &slope);
    const lanes derivative = open + x * open * (1.0f - open) * slope;
    store(call->grad_gate, index, grad * up * derivative, count, call->type, way);
    store(call->grad_up, index, grad * x * open, count, call->type, way);
}

/* Every thread takes one stretch of whole vectors, the last one what remains as well. */
#define FOR_ALL(call, step)                                                                        \
    const int64_t vectors = call->count / LANES, rest = call->count % LANES;                       \
    _Pragma("omp parallel num_threads(call->threads)")                                             \
    {                                                                                              \
        _Pragma("omp for schedule(static)")                                                        \
        for (int64_t vector = 0; vector < vectors; ++vector)                                       \
            step(call, vector * LANES, LANES, call->stream);                                       \
        finish_streams();                                                                          \
    }                                                                                              \
    if (rest)                                                                                      \
        step(call, vectors * LANES, rest, CACHE);

void gated_gelu_forward(const arguments *call)
{
    FOR_ALL(call, forward_step)
}

void gated_gelu_backward(const arguments *call)
{
    FOR_ALL(call, backward_step)
}
