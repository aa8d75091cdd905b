/* The RG-LRU from the logits of its gates to its states, and back, over [B, T, D]:
 *
 *   i = sigmoid(input_logit), r = sigmoid(recurrence_logit), a = exp(r rate)
 *   h_t = a h_{t-1} + sqrt(1 - a^2) i x_t;  where a document starts a = 0 and the root is one
 *
 * One pass over memory each way: 4 streams of B T D numbers forward, 7 backward. Forward keeps the
 * state at the beginning of every CHUNK steps; backward computes gates and states of a chunk again.
 * Logits are of one type, x and the states of one, each float32 or bfloat16; all arithmetic is
 * float32. Rows may be strided in B and T, channels lie side by side.
 */
#include "lanes.h"

#define CHUNK 8  /* steps; as in rg_lru_cpu.py */
#define BLOCK 64 /* channels of a chunk that backward works on at once, in the first cache */
#define FLUSH 256 /* steps: sums over T are sums of sums, a plain one would lose digits */

typedef struct {
    rows input_logit, recurrence_logit, x, states;
    const float *rate;    /* [D] */
    const float *initial; /* [B, D] or null */
    const uint8_t *start; /* [B, T] or null */
    float *chunk_states;  /* [B, ceil(T / CHUNK), D] */
    float *last;          /* [B, D] */
    int64_t batch, length, width;
    int32_t logit_type, x_type;
    int32_t stream; /* write past the caches */
    int32_t threads;
} forward_arguments;

typedef struct {
    rows input_logit, recurrence_logit, x, grad_states;
    rows grad_input_logit, grad_recurrence_logit, grad_x;
    const float *rate;
    const uint8_t *start;
    const float *chunk_states;
    const float *grad_last; /* [B, D] */
    float *grad_rate;       /* [B, D]: the sum over B is left to the caller */
    float *grad_initial;    /* [B, D] */
    int64_t batch, length, width;
    int32_t logit_type, x_type;
    int32_t stream; /* write past the caches */
    int32_t threads;
} backward_arguments;

typedef struct {
    lanes input, recurrence, decay, multiplier;
} gates;

INLINE gates gates_of(lanes input_logit, lanes recurrence_logit, lanes rate, int start)
{
    gates gate;
    gate.input = 1 / (1 + exp_lanes(-input_logit));
    gate.recurrence = 1 / (1 + exp_lanes(-recurrence_logit));
    if (start) {
        gate.decay = all(0);
        gate.multiplier = all(1);
        return gate;
    }
    lanes fraction, power = exponential(gate.recurrence * rate, &fraction);
    gate.decay = power * fraction + power;
    /* 1 - a^2 = (1 - a)(1 + a), where 1 - a keeps its digits near a = 1. */
    lanes complement = (1 - power) - power * fraction;
    gate.multiplier = square_root(complement * (1 + gate.decay));
    return gate;
}

INLINE void forward_step(const forward_arguments *call, lanes *state, lanes rate, const void *p,
                         const void *q, const void *x, void *output, int64_t index, int count,
                         int start, enum way way)
{
    gates gate = gates_of(load(p, index, count, call->logit_type),
                          load(q, index, count, call->logit_type), rate, start);
    lanes fresh = gate.multiplier * gate.input * load(x, index, count, call->x_type);
    *state = start ? fresh : gate.decay * *state + fresh;
    store(output, index, *state, count, call->x_type, way);
}

static void forward_tile(const forward_arguments *call, int64_t row, int64_t channel, int64_t width)
{
    lanes state[LARGEST_TILE / LANES] = {0}, rate[LARGEST_TILE / LANES] = {0};
    const int64_t whole = width / LANES * LANES, corner = row * call->width + channel;
    const int64_t chunks = (call->length + CHUNK - 1) / CHUNK;
    const uint8_t *start = call->start ? call->start + row * call->length : 0;
    memcpy(rate, call->rate + channel, width * sizeof(float));
    if (call->initial)
        memcpy(state, call->initial + corner, width * sizeof(float));
    const int64_t p_ahead = ahead(call->input_logit, call->logit_type);
    const int64_t q_ahead = ahead(call->recurrence_logit, call->logit_type);
    const int64_t x_ahead = ahead(call->x, call->x_type);
    for (int64_t time = 0; time < call->length; ++time) {
        if (time % CHUNK == 0)
            memcpy(call->chunk_states + (row * chunks + time / CHUNK) * call->width + channel, state,
                   width * sizeof(float));
        const void *p = row_of(call->input_logit, row, time, channel, call->logit_type);
        const void *q = row_of(call->recurrence_logit, row, time, channel, call->logit_type);
        const void *x = row_of(call->x, row, time, channel, call->x_type);
        void *output = row_of(call->states, row, time, channel, call->x_type);
        const int begin = start && start[time];
        for (int64_t index = 0; index < whole; index += LANES) {
            prefetch(p, index + p_ahead, call->logit_type);
            prefetch(q, index + q_ahead, call->logit_type);
            prefetch(x, index + x_ahead, call->x_type);
            forward_step(call, &state[index / LANES], rate[index / LANES], p, q, x, output, index,
                         LANES, begin, call->stream);
        }
        if (whole < width)
            forward_step(call, &state[whole / LANES], rate[whole / LANES], p, q, x, output, whole,
                         width - whole, begin, CACHE);
    }
    memcpy(call->last + corner, state, width * sizeof(float));
}

/* What backward needs to know again of each step of a block. */
typedef struct {
    gates gate;
    lanes before, fresh; /* the state before the step; i x */
} step_of_block;

/* Gates and states of a step again, from the state before it. */
INLINE void again(const backward_arguments *call, step_of_block *kept, lanes *state, lanes rate,
                  const void *p, const void *q, const void *x, int64_t index, int count, int start)
{
    kept->gate = gates_of(load(p, index, count, call->logit_type),
                          load(q, index, count, call->logit_type), rate, start);
    kept->before = *state;
    kept->fresh = load(x, index, count, call->x_type) * kept->gate.input;
    const lanes added = kept->gate.multiplier * kept->fresh;
    *state = start ? added : kept->gate.decay * *state + added;
}

/* `carry` is the gradient of this state that comes from the later ones. */
INLINE void backward_step(const backward_arguments *call, const step_of_block *kept, lanes *carry,
                          lanes *grad_rate, lanes rate, const void *grad, void *grad_p,
                          void *grad_q, void *grad_x, int64_t index, int count, int start,
                          enum way way)
{
    const gates gate = kept->gate;
    const lanes total = load(grad, index, count, call->x_type) + *carry;
    const lanes through = total * gate.multiplier;
    lanes logarithm = {0}; /* gradient of log a */
    *carry = logarithm;
    if (!start) {
        /* d multiplier / d log a = -a^2 / multiplier, where 1 / (2 multiplier) is at most 1000: near
         * a = 1 the true derivative has no bound. */
        const lanes root = choose(gate.multiplier < 5e-4f, all(5e-4f), gate.multiplier);
        *carry = total * gate.decay;
        logarithm = *carry * (kept->before - kept->fresh * (gate.decay / root)) * gate.recurrence;
    }
    *grad_rate += logarithm;
    store(grad_x, index, through * gate.input, count, call->x_type, way);
    store(grad_p, index, through * kept->fresh * (1 - gate.input), count, call->logit_type, way);
    store(grad_q, index, logarithm * (1 - gate.recurrence) * rate, count, call->logit_type, way);
}

/* `width` channels of the chunk that begins at `from`, all of its steps. */
INLINE void backward_block(const backward_arguments *call, int64_t row, int64_t from, int64_t steps,
                           int64_t channel, int64_t width, const lanes *rate, lanes *carry,
                           lanes *grad_rate)
{
    step_of_block kept[CHUNK][BLOCK / LANES];
    lanes state[BLOCK / LANES] = {0};
    const int64_t whole = width / LANES * LANES;
    const uint8_t *starts = call->start ? call->start + row * call->length : 0;
    const int64_t chunks = (call->length + CHUNK - 1) / CHUNK;
    memcpy(state, call->chunk_states + (row * chunks + from / CHUNK) * call->width + channel,
           width * sizeof(float));
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t time = from + step;
        const void *p = row_of(call->input_logit, row, time, channel, call->logit_type);
        const void *q = row_of(call->recurrence_logit, row, time, channel, call->logit_type);
        const void *x = row_of(call->x, row, time, channel, call->x_type);
        const int start = starts && starts[time];
        for (int64_t index = 0; index < whole; index += LANES) {
            const int64_t vector = index / LANES;
            prefetch(p, index - CHUNK * call->input_logit.time_stride, call->logit_type);
            prefetch(q, index - CHUNK * call->recurrence_logit.time_stride, call->logit_type);
            prefetch(x, index - CHUNK * call->x.time_stride, call->x_type);
            again(call, &kept[step][vector], &state[vector], rate[vector], p, q, x, index, LANES,
                  start);
        }
        if (whole < width)
            again(call, &kept[step][whole / LANES], &state[whole / LANES], rate[whole / LANES], p, q,
                  x, whole, width - whole, start);
    }
    for (int64_t step = steps - 1; step >= 0; --step) {
        const int64_t time = from + step;
        const void *grad = row_of(call->grad_states, row, time, channel, call->x_type);
        void *grad_p = row_of(call->grad_input_logit, row, time, channel, call->logit_type);
        void *grad_q = row_of(call->grad_recurrence_logit, row, time, channel, call->logit_type);
        void *grad_x = row_of(call->grad_x, row, time, channel, call->x_type);
        const int start = starts && starts[time];
        for (int64_t index = 0; index < whole; index += LANES) {
            const int64_t vector = index / LANES;
            prefetch(grad, index - CHUNK * call->grad_states.time_stride, call->x_type);
            backward_step(call, &kept[step][vector], &carry[vector], &grad_rate[vector],
                          rate[vector], grad, grad_p, grad_q, grad_x, index, LANES, start,
                          call->stream);
        }
        if (whole < width)
            backward_step(call, &kept[step][whole / LANES], &carry[whole / LANES],
                          &grad_rate[whole / LANES], rate[whole / LANES], grad, grad_p, grad_q, grad_x,
                          whole, width - whole, start, CACHE);
    }
}

static void backward_tile(const backward_arguments *call, int64_t row, int64_t channel,
                          int64_t width)
{
    lanes carry[LARGEST_TILE / LANES] = {0}, rate[LARGEST_TILE / LANES] = {0};
    lanes grad_rate[LARGEST_TILE / LANES] = {0}, sums[LARGEST_TILE / LANES] = {0};
    const int64_t corner = row * call->width + channel;
    memcpy(rate, call->rate + channel, width * sizeof(float));
    memcpy(carry, call->grad_last + corner, width * sizeof(float));
    for (int64_t from = (call->length - 1) / CHUNK * CHUNK; from >= 0; from -= CHUNK) {
        const int64_t steps = call->length - from < CHUNK ? call->length - from : CHUNK;
        for (int64_t index = 0; index < width; index += BLOCK)
            backward_block(call, row, from, steps, channel + index,
                           width - index < BLOCK ? width - index : BLOCK, &rate[index / LANES],
                           &carry[index / LANES], &sums[index / LANES]);
        if (from % FLUSH == 0) {
            for (int64_t vector = 0; vector * LANES < width; ++vector)
                grad_rate[vector] += sums[vector];
            memset(sums, 0, sizeof sums);
        }
    }
    memcpy(call->grad_initial + corner, carry, width * sizeof(float));
    memcpy(call->grad_rate + corner, grad_rate, width * sizeof(float));
}

void rg_lru_forward(const forward_arguments *call)
{
    FOR_ALL_TILES(call, LARGEST_TILE, forward_tile)
}

void rg_lru_backward(const backward_arguments *call)
{
    FOR_ALL_TILES(call, LARGEST_TILE, backward_tile)
}
