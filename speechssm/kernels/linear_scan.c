/* The linear recurrence h_t = gate_t * h_{t-1} + input_t over [B, T, D], and its adjoint.
 *
 * Sequential in T, sixteen channels at a time, OpenMP over rows and tiles of channels. One pass over
 * memory each way: 3 streams of B T D numbers forward, 5 backward. Gate, input and their gradients
 * are float32 or bfloat16; states are float32. Rows may be strided in B and T, channels lie side by
 * side. Where `reset` is set the state starts anew, as if the gate were zero.
 */
#include "lanes.h"

typedef struct {
    rows gate, input, states;
    const float *initial; /* [B, D] or null */
    const uint8_t *reset; /* [B, T] or null */
    int64_t batch, length, width;
    int32_t type;   /* of gate and input */
    int32_t stream; /* write past the caches */
    int32_t threads;
} forward_arguments;

typedef struct {
    rows gate, states, grad_states, grad_gate, grad_input;
    const float *initial;
    const uint8_t *reset;
    float *grad_initial; /* [B, D] */
    int64_t batch, length, width;
    int32_t type; /* of gate and of both gradients */
    int32_t stream;
    int32_t threads;
} backward_arguments;

INLINE void forward_step(lanes *state, const void *gate, const void *input, float *output,
                         int64_t index, int count, int fresh, enum type type, enum way way)
{
    lanes value = load(input, index, count, type);
    *state = fresh ? value : load(gate, index, count, type) * *state + value;
    store(output, index, *state, count, FLOAT32, way);
}

INLINE void forward_tile(const forward_arguments *call, int64_t row, int64_t channel, int64_t width,
                         enum type type, enum way way)
{
    lanes state[LARGEST_TILE / LANES] = {0};
    const int64_t whole = width / LANES * LANES;
    const uint8_t *reset = call->reset ? call->reset + row * call->length : 0;
    if (call->initial)
        memcpy(state, call->initial + row * call->width + channel, width * sizeof(float));
    const int64_t gate_ahead = ahead(call->gate, type), input_ahead = ahead(call->input, type);
    for (int64_t time = 0; time < call->length; ++time) {
        const void *gate = row_of(call->gate, row, time, channel, type);
        const void *input = row_of(call->input, row, time, channel, type);
        float *output = row_of(call->states, row, time, channel, FLOAT32);
        const int fresh = reset && reset[time];
        for (int64_t index = 0; index < whole; index += LANES) {
            prefetch(gate, index + gate_ahead, type);
            prefetch(input, index + input_ahead, type);
            forward_step(&state[index / LANES], gate, input, output, index, LANES, fresh, type, way);
        }
        if (whole < width)
            forward_step(&state[whole / LANES], gate, input, output, whole, width - whole, fresh,
                         type, CACHE);
    }
}

/* `carry` is the gradient of this state that comes from the later ones. */
INLINE void backward_step(lanes *carry, const void *gate, const float *previous, const float *grad,
                          void *grad_gate, void *grad_input, int64_t index, int count, int fresh,
                          enum type type, enum way way)
{
    lanes total = load(grad, index, count, FLOAT32) + *carry;
    store(grad_input, index, total, count, type, way);
    lanes before = {0};
    *carry = before;
    if (!fresh) {
        if (previous)
            before = load(previous, index, count, FLOAT32);
        *carry = load(gate, index, count, type) * total;
        before *= total;
    }
    store(grad_gate, index, before, count, type, way);
}

INLINE void backward_tile(const backward_arguments *call, int64_t row, int64_t channel,
                          int64_t width, enum type type, enum way way)
{
    lanes carry[LARGEST_TILE / LANES] = {0};
    const int64_t whole = width / LANES * LANES;
    const int64_t corner = row * call->width + channel;
    const uint8_t *reset = call->reset ? call->reset + row * call->length : 0;
    const int64_t gate_ahead = ahead(call->gate, type), states_ahead = ahead(call->states, FLOAT32);
    const int64_t grad_ahead = ahead(call->grad_states, FLOAT32);
    for (int64_t time = call->length - 1; time >= 0; --time) {
        const void *gate = row_of(call->gate, row, time, channel, type);
        const float *grad = row_of(call->grad_states, row, time, channel, FLOAT32);
        void *grad_gate = row_of(call->grad_gate, row, time, channel, type);
        void *grad_input = row_of(call->grad_input, row, time, channel, type);
        const float *previous = call->initial ? call->initial + corner : 0;
        if (time)
            previous = row_of(call->states, row, time - 1, channel, FLOAT32);
        const int fresh = reset && reset[time];
        for (int64_t index = 0; index < whole; index += LANES) {
            prefetch(gate, index - gate_ahead, type);
            prefetch(previous, index - states_ahead, FLOAT32);
            prefetch(grad, index - grad_ahead, FLOAT32);
            backward_step(&carry[index / LANES], gate, previous, grad, grad_gate, grad_input, index,
                          LANES, fresh, type, way);
        }
        if (whole < width)
            backward_step(&carry[whole / LANES], gate, previous, grad, grad_gate, grad_input, whole,
                          width - whole, fresh, type, CACHE);
    }
    memcpy(call->grad_initial + corner, carry, width * sizeof(float));
}

/* A tile with the code that its type and way of storing have. */
#define BY_TYPE(name, arguments, function)                                                         \
    static void name(const arguments *call, int64_t row, int64_t channel, int64_t width)           \
    {                                                                                              \
        if (call->type == FLOAT32 && call->stream)                                                 \
            function(call, row, channel, width, FLOAT32, STREAM);                                  \
        else if (call->type == FLOAT32)                                                            \
            function(call, row, channel, width, FLOAT32, CACHE);                                   \
        else if (call->stream)                                                                     \
            function(call, row, channel, width, BFLOAT16, STREAM);                                 \
        else                                                                                       \
            function(call, row, channel, width, BFLOAT16, CACHE);                                  \
    }

BY_TYPE(forward_by_type, forward_arguments, forward_tile)
BY_TYPE(backward_by_type, backward_arguments, backward_tile)

void linear_scan_forward(const forward_arguments *call)
{
    FOR_ALL_TILES(call, LARGEST_TILE, forward_by_type)
}

void linear_scan_backward(const backward_arguments *call)
{
    FOR_ALL_TILES(call, LARGEST_TILE, backward_by_type)
}
