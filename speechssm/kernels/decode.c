/* One token for each of B rows through a whole language model, and the next one drawn from it: the
 * single-token step of Griffin and of the Transformer, without an allocation, a copy of the weights
 * or a call back.
 *
 * A row is computed by the same operations in the same order whatever rows stand beside it and
 * however many threads there are: every sum runs over its terms in one fixed order, and products are
 * fused into sums where it is written (`multiply_add`) and nowhere else. Weights are read once for
 * all rows. Threads work on ranges of output features and meet at barriers.
 *
 * Legend: B rows of a call, D width, R width of the recurrence, F width of the gated MLP, N heads,
 * H head width, S slots of the attention ring, V vocabulary.
 */
#include <sched.h>
#include <stdatomic.h>

#include "attend.h"
#include "dense.h"
#include "draw.h"

typedef struct {
    norm before;
    linear gate, up, down;
} gated_mlp;

typedef struct {
    linear gate, input, output;
    const float *filter, *filter_bias; /* [W, R], [R] */
    const float *input_gate, *input_gate_bias, *recurrence_gate, *recurrence_gate_bias;
    const float *rate;         /* [R]: log of the decay at an open gate */
    float *history, *hidden;   /* [rows, W - 1, R], [rows, R] */
    int64_t filter_width, block_width; /* of the gates' diagonal blocks, [R / block, block, block] */
} recurrent;

typedef struct {
    norm before;
    int64_t is_attention;
    recurrent recurrent;
    attention attention;
    gated_mlp mlp;
} layer;

typedef struct {
    const float *embedding; /* [V + 1, D] */
    linear output;          /* [V, D] */
    const layer *layers;
    norm last;
    float embedding_scale, soft_cap; /* no cap: 0 */
    int64_t num_layers, width, widest; /* the widest of D, R, F and N H */
} network;

typedef struct call {
    const int64_t *rows;   /* [B]: the rows of the state that go on, of `all_rows` */
    float *logits;         /* [all rows, V]: after what has been fed in; replaced */
    const float *uniforms; /* [all rows, most_steps], in [0, 1) */
    int64_t *drawn;        /* [all rows, most_steps] */
    const float *temperature, *top_p; /* [all rows] */
    const int64_t *top_k;  /* [all rows]; 0 for no limit */
    float *work;           /* `decode_work` floats */
    int64_t batch, steps, most_steps, threads;
} call;

/* Threads that wait turn round for a moment before they let others run. */
typedef struct {
    atomic_int waiting, turn;
    int threads;
} meeting;

static void meet(meeting *all)
{
    if (all->threads == 1)
        return;
    int turn = atomic_load_explicit(&all->turn, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&all->waiting, 1, memory_order_acq_rel) == all->threads - 1) {
        atomic_store_explicit(&all->waiting, 0, memory_order_relaxed);
        atomic_store_explicit(&all->turn, turn + 1, memory_order_release);
        return;
    }
    for (int tries = 0; atomic_load_explicit(&all->turn, memory_order_acquire) == turn; ++tries)
        if (tries > 4000)
            sched_yield();
}

INLINE lanes sigmoid(lanes x) { return 1.0f / (1.0f + exp_lanes(-x)); }

/* The tanh form: x (1 + tanh z) / 2 = x sigmoid(2 z). */
INLINE lanes gelu(lanes x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

/* Buffers of a call. x, a, b, c: [B, stride]; logits [B, V]; partial: what `attend_piece` leaves, of
 * each row and piece. Each thread has a `normed` [B, stride] and room for sampling [2, V]. */
typedef struct {
    float *x, *a, *b, *c, *logits, *partial, *normed, *weights;
} buffers;

/* Of a row in most buffers: whole lanes, so that nothing but weights and states needs care at ends. */
INLINE int64_t stride_of(const network *net) { return (net->widest + LANES - 1) / LANES * LANES; }

/* Floats of all rows' pieces of the largest attention. */
static int64_t partial_size(const network *net)
{
    int64_t largest = 0;
    for (int64_t index = 0; index < net->num_layers; ++index) {
        const attention *block = &net->layers[index].attention;
        if (!net->layers[index].is_attention)
            continue;
        int64_t size = pieces_of(block->slots) * block->heads * (block->head_width + 2);
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* How many floats `work` must hold for so many rows and threads. */
int64_t decode_work(const network *net, int64_t batch, int64_t threads)
{
    const int64_t vocabulary = net->output.outputs;
    return batch * ((4 + threads) * stride_of(net) + vocabulary + partial_size(net)) +
           threads * 2 * vocabulary;
}

static buffers cut(const network *net, const call *call, int64_t thread)
{
    const int64_t size = call->batch * stride_of(net), vocabulary = net->output.outputs;
    buffers at = {.x = call->work};
    at.a = at.x + size;
    at.b = at.a + size;
    at.c = at.b + size;
    at.logits = at.c + size;
    at.partial = at.logits + call->batch * vocabulary;
    at.normed = at.partial + call->batch * partial_size(net) + thread * (size + 2 * vocabulary);
    at.weights = at.normed + size;
    return at;
}

/* The RG-LRU for `count` channels that lie in the diagonal block that begins at `first`, and for
 * `rows` rows (constants where this is called). x is its input, and `gate` the other branch, which the
 * new state multiplies. */
INLINE void gated_step(const recurrent *block, int64_t first, int64_t index, int count,
                       const int64_t *states, int rows, const float *x, float *gate, int64_t stride)
{
    const int64_t width = block->block_width, corner = first * width + index - first;
    lanes input[TILE], decay[TILE];
    for (int row = 0; row < rows; ++row) {
        input[row] = load(block->input_gate_bias, index, count, FLOAT32);
        decay[row] = load(block->recurrence_gate_bias, index, count, FLOAT32);
    }
    for (int64_t inner = 0; inner < width; ++inner) {
        const lanes to_input = load(block->input_gate, corner + inner * width, count, FLOAT32);
        const lanes to_decay = load(block->recurrence_gate, corner + inner * width, count, FLOAT32);
        for (int row = 0; row < rows; ++row) {
            const lanes value = all(x[row * stride + first + inner]);
            input[row] = multiply_add(value, to_input, input[row]);
            decay[row] = multiply_add(value, to_decay, decay[row]);
        }
    }
    const lanes rate = load(block->rate, index, count, FLOAT32);
    for (int row = 0; row < rows; ++row, x += stride, gate += stride) {
        float *hidden = block->hidden + states[row] * block->input.outputs;
        const lanes log_gate = sigmoid(decay[row]) * rate;
        lanes fraction, power = exponential(2.0f * log_gate, &fraction);
        const lanes below_one = -(power * fraction + (power - 1.0f)); /* 1 - a^2 */
        const lanes state =
            exp_lanes(log_gate) * load(hidden, index, count, FLOAT32) +
            square_root(below_one) * sigmoid(input[row]) * load(x, index, count, FLOAT32);
        store(hidden, index, state, count, FLOAT32, CACHE);
        store(gate, index, state * load(gate, index, count, FLOAT32), count, FLOAT32, CACHE);
    }
}

/* The same for all rows of a call. */
INLINE void gated_rows(const recurrent *block, int64_t first, int64_t index, int count,
                       const call *call, const float *x, float *gate, int64_t stride)
{
    int64_t row = 0;
    for (; row + TILE <= call->batch; row += TILE)
        gated_step(block, first, index, count, call->rows + row, TILE, x + row * stride,
                   gate + row * stride, stride);
    for (; row < call->batch; ++row)
        gated_step(block, first, index, count, call->rows + row, 1, x + row * stride,
                   gate + row * stride, stride);
}

/* One row's causal convolution of `count` channels; its history moves on. */
INLINE void filter(const recurrent *block, int64_t index, int count, float *past, const float *x,
                   float *y)
{
    const int64_t width = block->input.outputs, history = block->filter_width - 1;
    const lanes value = load(x, index, count, FLOAT32);
    lanes sum = multiply_add(load(block->filter + history * width, index, count, FLOAT32), value,
                             load(block->filter_bias, index, count, FLOAT32));
    for (int64_t shift = 0; shift < history; ++shift) {
        const lanes older = load(past + shift * width, index, count, FLOAT32);
        sum = multiply_add(load(block->filter + shift * width, index, count, FLOAT32), older, sum);
        if (shift)
            store(past + (shift - 1) * width, index, older, count, FLOAT32, CACHE);
    }
    if (history)
        store(past + (history - 1) * width, index, value, count, FLOAT32, CACHE);
    store(y, index, sum, count, FLOAT32, CACHE);
}

static void recurrent_block(const recurrent *block, const buffers *at, const call *call,
                            int64_t widest, int64_t thread, meeting *all)
{
    const int64_t batch = call->batch, width = block->input.outputs, history = block->filter_width - 1;
    const range part = share(width, LANES, thread, call->threads);
    apply(&block->gate, part, at->normed, widest, at->a, widest, batch);
    apply(&block->input, part, at->normed, widest, at->b, widest, batch);
    for (int64_t row = 0; row < batch; ++row) {
        float *past = block->history + call->rows[row] * history * width;
        const float *x = at->b + row * widest;
        float *gate = at->a + row * widest, *y = at->c + row * widest;
        for (int64_t index = part.begin; index < part.end; index += LANES) {
            filter(block, index, part.end - index < LANES ? part.end - index : LANES, past, x, y);
            store(gate, index, gelu(load(gate, index, LANES, FLOAT32)), LANES, FLOAT32, CACHE);
        }
    }
    meet(all);
    for (int64_t index = part.begin; index < part.end;) {
        /* As many lanes as lie in one diagonal block; its weights stay in the cache for all rows. */
        const int64_t first = index / block->block_width * block->block_width;
        const int64_t rest = first + block->block_width - index, left = part.end - index;
        const int64_t count = rest < left ? rest : left;
        if (count >= LANES)
            gated_rows(block, first, index, LANES, call, at->c, at->a, widest);
        else
            gated_rows(block, first, index, count, call, at->c, at->a, widest);
        index += count < LANES ? count : LANES;
    }
    meet(all);
    range outputs = share(block->output.outputs, TILE, thread, call->threads);
    apply(&block->output, outputs, at->a, widest, at->c, widest, batch);
}

static void attention_block(const attention *block, const buffers *at, const call *call,
                            int64_t widest, int64_t thread, meeting *all)
{
    const int64_t batch = call->batch, width = block->head_width, slots = block->slots;
    const int64_t threads = call->threads, heads = block->heads;
    apply(&block->query, share(heads * width, TILE, thread, threads), at->normed, widest, at->a, widest,
          batch);
    range part = share(width, TILE, thread, threads);
    apply(&block->key, part, at->normed, widest, at->b, widest, batch);
    apply(&block->value, part, at->normed, widest, at->c, widest, batch);
    meet(all);
    for (int64_t row = thread; row < batch; row += threads) {
        const int64_t state = call->rows[row], position = block->position[state];
        /* `normed` is read no more: room for the sines. */
        if (block->rotated)
            rotate_row(block, at->a + row * widest, at->b + row * widest, position, at->normed);
        const int64_t slot = (state * slots + position % slots) * width;
        memcpy(block->keys + slot, at->b + row * widest, width * sizeof(float));
        memcpy(block->values + slot, at->c + row * widest, width * sizeof(float));
    }
    meet(all);
    const int64_t pieces = pieces_of(slots), size = heads * (width + 2);
    int64_t count = 0, work = 0;
    for (int64_t row = 0; row < batch; ++row)
        count += pieces_of(filled_slots(block, call->rows[row]));
    const range mine = share(count, 1, thread, threads);
    for (int64_t row = 0; row < batch && work < mine.end; ++row) {
        const int64_t state = call->rows[row], filled = filled_slots(block, state);
        for (int64_t piece = 0; piece < pieces_of(filled); ++piece, ++work) {
            if (work < mine.begin || work >= mine.end)
                continue;
            int64_t begin = piece * PIECE, end = begin + PIECE < filled ? begin + PIECE : filled;
            attend_piece(block, at->a + row * widest, block->keys + state * slots * width,
                         block->values + state * slots * width, begin, end,
                         at->partial + (row * pieces + piece) * size);
        }
    }
    meet(all);
    for (int64_t index = thread; index < batch * heads; index += threads) {
        const int64_t row = index / heads, head = index % heads;
        const int64_t used = pieces_of(filled_slots(block, call->rows[row]));
        merge(at->partial + row * pieces * size + head * (width + 2), size, used, width,
              at->b + row * widest + head * width);
    }
    meet(all);
    apply(&block->output, share(block->output.outputs, TILE, thread, threads), at->b, widest, at->c,
          widest, batch);
}

/* x += y for the outputs of this thread. */
INLINE void add(float *x, const float *y, range part, int64_t stride, int64_t batch)
{
    for (int64_t row = 0; row < batch; ++row)
        for (int64_t index = part.begin; index < part.end; ++index)
            x[row * stride + index] += y[row * stride + index];
}

static void mlp_block(const gated_mlp *mlp, const buffers *at, const call *call, int64_t widest,
                      int64_t thread, meeting *all)
{
    const int64_t batch = call->batch;
    range part = share(mlp->gate.outputs, LANES, thread, call->threads);
    apply(&mlp->gate, part, at->normed, widest, at->a, widest, batch);
    apply(&mlp->up, part, at->normed, widest, at->b, widest, batch);
    for (int64_t row = 0; row < batch; ++row)
        for (int64_t index = part.begin; index < part.end; index += LANES) {
            float *gate = at->a + row * widest, *up = at->b + row * widest;
            lanes value = gelu(load(gate, index, LANES, FLOAT32)) * load(up, index, LANES, FLOAT32);
            store(gate, index, value, LANES, FLOAT32, CACHE);
        }
    meet(all);
    apply(&mlp->down, share(mlp->down.outputs, TILE, thread, call->threads), at->a, widest, at->c,
          widest, batch);
}

/* What is drawn at `step` goes through the network; x of all rows is ready after it. */
static void feed(const network *net, const call *call, const buffers *at, int64_t step,
                 int64_t thread, meeting *all)
{
    const int64_t widest = stride_of(net), width = net->width, batch = call->batch;
    const range part = share(width, TILE, thread, call->threads);
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t unit = call->drawn[call->rows[row] * call->most_steps + step];
        for (int64_t index = part.begin; index < part.end; ++index)
            at->x[row * widest + index] = net->embedding[unit * width + index] * net->embedding_scale;
    }
    meet(all);
    for (int64_t index = 0; index < net->num_layers; ++index) {
        const layer *layer = &net->layers[index];
        normalise(&layer->before, at->x, at->normed, width, widest, batch);
        if (layer->is_attention)
            attention_block(&layer->attention, at, call, widest, thread, all);
        else
            recurrent_block(&layer->recurrent, at, call, widest, thread, all);
        add(at->x, at->c, part, widest, batch);
        meet(all);
        normalise(&layer->mlp.before, at->x, at->normed, width, widest, batch);
        mlp_block(&layer->mlp, at, call, widest, thread, all);
        add(at->x, at->c, part, widest, batch);
        meet(all);
    }
}

static void write_logits(const network *net, const call *call, const buffers *at, int64_t thread)
{
    const int64_t vocabulary = net->output.outputs;
    const range part = share(vocabulary, TILE, thread, call->threads);
    normalise(&net->last, at->x, at->normed, net->width, stride_of(net), call->batch);
    apply(&net->output, part, at->normed, stride_of(net), at->logits, vocabulary, call->batch);
    for (int64_t row = 0; row < call->batch; ++row) {
        const float *from = at->logits + row * vocabulary;
        float *to = call->logits + call->rows[row] * vocabulary;
        for (int64_t unit = part.begin; unit < part.end; unit += LANES) {
            const int count = part.end - unit < LANES ? part.end - unit : LANES;
            lanes value = load(from, unit, count, FLOAT32);
            if (net->soft_cap > 0.0f) { /* cap tanh(x / cap), with tanh z = e / (e + 2), e = expm1(2 z) */
                lanes fraction, power = exponential(value * (2.0f / net->soft_cap), &fraction);
                const lanes excess = power * fraction + (power - 1.0f);
                value = net->soft_cap * excess / (excess + 2.0f);
            }
            store(to, unit, value, count, FLOAT32, CACHE);
        }
    }
}

#ifdef _OPENMP
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#endif

/* Draws `steps` units for each row of the call and feeds each in. Returns how many steps were done:
 * fewer where a row's logits are not finite. */
int64_t decode(const network *net, const call *call)
{
    const int64_t vocabulary = net->output.outputs;
    meeting all = {0};
    atomic_llong done = call->steps;
#pragma omp parallel num_threads(call->threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        const int64_t thread = 0, threads = 1;
#endif
        struct call mine = *call; /* there may be fewer threads than were asked for */
        mine.threads = threads;
#pragma omp single
        all.threads = threads;
        const buffers at = cut(net, &mine, thread);
        for (int64_t step = 0; step < mine.steps; ++step) {
            for (int64_t work = thread; work < mine.batch; work += threads) {
                const int64_t row = mine.rows[work], place = row * mine.most_steps + step;
                mine.drawn[place] =
                    sample(mine.logits + row * vocabulary, vocabulary, mine.temperature[row],
                           mine.top_k[row], mine.top_p[row], mine.uniforms[place], at.weights,
                           at.weights + vocabulary);
                if (mine.drawn[place] < 0)
                    atomic_store(&done, step);
            }
            meet(&all);
            if (atomic_load(&done) == step)
                break;
            feed(net, &mine, &at, step, thread, &all);
            write_logits(net, &mine, &at, thread);
            meet(&all);
            /* Nobody reads a position before the next meeting. */
            for (int64_t index = thread; index < net->num_layers; index += threads)
                for (int64_t row = 0; net->layers[index].is_attention && row < mine.batch; ++row)
                    ++net->layers[index].attention.position[mine.rows[row]];
        }
    }
    return done;
}
