/* section inside: window */
/* Taps first ... end - 1 of an axis lie inside the input, of the output at `out`; tap 0 lies at `from`. */
struct taps {
    int from, first, end;
};

static struct taps inside(const struct window *a, int axis, int out)
{
    const int step = a->dilations[axis];
    struct taps t;
    t.from = out * a->strides[axis] - a->pads[axis];
    t.first = 0;
    t.end = a->taps[axis];
    while (t.first < t.end && t.from + t.first * step < 0)
        t.first++;
    while (t.first < t.end && t.from + (t.end - 1) * step >= a->in[axis])
        t.end--;
    return t;
}

/* section at_once: window */
/* Of a line of outputs, how many are computed at once at w: `many` where all their taps are inside, or 1.
   The last of them reach back over what is done: *w moves. */
static int at_once(const struct window *a, int *w, int many)
{
    const int reach = a->in[2] + a->pads[2] - (a->taps[2] - 1) * a->dilations[2] - 1;
    const int end = reach / a->strides[2] < a->out[2] ? reach / a->strides[2] + 1 : a->out[2];
    const int begin = *w + many > end ? end - many : *w;
    if (*w >= end || begin * a->strides[2] < a->pads[2])
        return 1;
    *w = begin;
    return many;
}

/* section lanes: conv inside at_once */
#ifdef __GNUC__
#define APART __attribute__((noinline)) /* gcc vectorises it alone: inlined it took ten times as long */
#else
#define APART
#endif

#if defined(__SSE2__) || defined(__ARM_NEON)
static inline void widen(const int8_t *restrict x, int count, int zero, int32_t *restrict wide)
{
    int i;
    for (i = 0; i < count; i++)
        wide[i] = x[i] - zero;
}

/* acc[p][n] += x[p * step + i] * weight[i][n]. All numbers have 32 bits: then gcc and clang keep the accumulators in
   registers. From 8 bits gcc 12 multiplied a fifth as fast. */
APART static void multiply_wide_lanes(const int32_t *restrict x, int step, int length, const int32_t *restrict weight,
                                      int32_t (*restrict acc)[LANES])
{
    const int32_t *x4 = x + 4 * step;
    int i, n;
    for (i = 0; i < length; i++, weight += LANES)
        for (n = 0; n < LANES; n++) {
            acc[0][n] += x[i] * weight[n];
            acc[1][n] += x[i + step] * weight[n];
            acc[2][n] += x[i + 2 * step] * weight[n];
            acc[3][n] += x[i + 3 * step] * weight[n];
            acc[4][n] += x4[i] * weight[n];
            acc[5][n] += x4[i + step] * weight[n];
            acc[6][n] += x4[i + 2 * step] * weight[n];
            acc[7][n] += x4[i + 3 * step] * weight[n];
        }
}
#endif

/* acc[p][n] += (x[p][i] - zero) * weight[i][n]: LANES outputs of TOGETHER positions; count: of which are wanted. */
static void multiply_lanes(const int8_t *x, int step, int length, int zero, const int8_t *weight, int count,
                           int32_t (*acc)[LANES])
{
#if defined(__SSE2__) || defined(__ARM_NEON)
    int32_t values[REACH], weights[SHORT * LANES];
    (void)count;
    widen(x, (TOGETHER - 1) * step + length, zero, values);
    widen(weight, length * LANES, 0, weights);
    multiply_wide_lanes(values, step, length, weights, acc);
#else /* without vectors: as many accumulators as there are registers for */
    int i, p, n;
    for (p = 0; p < count; p++, x += step)
        for (n = 0; n < LANES; n += 4) {
            int32_t a0 = acc[p][n], a1 = acc[p][n + 1], a2 = acc[p][n + 2], a3 = acc[p][n + 3];
            const int8_t *row = weight + n;
            for (i = 0; i < length; i++, row += LANES) {
                const int value = x[i] - zero;
                a0 += value * row[0];
                a1 += value * row[1];
                a2 += value * row[2];
                a3 += value * row[3];
            }
            acc[p][n] = a0;
            acc[p][n + 1] = a1;
            acc[p][n + 2] = a2;
            acc[p][n + 3] = a3;
        }
#endif
}

static inline void put@(const Y_t *restrict from, int count, Y_t *restrict to)
{
    int n;
    if (count >= LANES)
        for (n = 0; n < LANES; n++)
            to[n] = from[n];
    else
        for (n = 0; n < count; n++)
            to[n] = from[n];
}

/* A convolution of short rows; weight: blocks of LANES outputs, in each the inputs of a window, outputs. Biases,
   multipliers and shifts of these outputs stand there for BLOCK / LANES positions. */
static void lanes@(const struct conv *c, const int8_t *x, Y_t *y)
{
    const struct window *a = &c->at;
    const int channels = a->in[3], outputs = a->out[3];
    int32_t acc[TOGETHER][LANES];
    Y_t codes[BLOCK];
    int d, h, w, first, m, n, p, count;
    for (d = 0; d < a->out[0]; d++)
        for (h = 0; h < a->out[1]; h++, y += a->out[2] * outputs)
            for (w = 0; w < a->out[2]; w += count) {
                const struct taps i = inside(a, 0, d), j = inside(a, 1, h);
                const int8_t *weights = c->weight;
                struct taps k;
                count = at_once(a, &w, TOGETHER);
                k = inside(a, 2, w);
                for (first = 0; first < outputs; first += LANES, weights += c->row * LANES) {
                    for (p = 0; p < TOGETHER; p++)
                        for (n = 0; n < LANES; n++)
                            acc[p][n] = c->bias[first * (BLOCK / LANES) + n];
                    for (m = i.first; m < i.end; m++)
                        for (n = j.first; n < j.end; n++) {
                            const int row = (i.from + m * a->dilations[0]) * a->in[1] + j.from + n * a->dilations[1];
                            const int tap = (m * a->taps[1] + n) * a->taps[2] + k.first;
                            multiply_lanes(x + (row * a->in[2] + k.from + k.first) * channels,
                                           count > 1 ? a->strides[2] * channels : 0, (k.end - k.first) * channels,
                                           c->in_zero, weights + tap * channels * LANES, count, acc);
                        }
                    for (p = 0; p < count; p++) {
                        const Y_t *from = codes + p % (BLOCK / LANES) * LANES;
                        if (from == codes)
                            rescale@(acc[p], BLOCK, c, first * (BLOCK / LANES), codes);
                        put@(from, outputs - first, y + (w + p) * outputs + first);
                    }
                }
            }
}

/* section depthwise: conv at_once */
#if defined(__GNUC__) && !defined(__OPTIMIZE_SIZE__)
#define UNROLLED inline __attribute__((always_inline)) /* else clang keeps it apart: six times as long */
#else
#define UNROLLED inline
#endif

/* acc[o] += sum of from[t][at + o] * weight[t][o]. Numbers of lanes and taps are literal, so that compilers unroll. */
static UNROLLED void add_taps@(const X_t *const *from, int at, const int8_t *weight, int row, int lanes, int taps,
                             ACC_t *restrict acc)
{
    int o, t;
    for (o = 0; o < lanes; o++) {
        ACC_t sum = acc[o];
        for (t = 0; t < taps; t++)
            sum += (PRODUCT_t)(from[t][at + o] * weight[t * row + o]);
        acc[o] = sum;
    }
}

static UNROLLED void add_lanes@(const X_t *const *from, const int8_t *weight, int row, int count, int taps, ACC_t *acc)
{
    int o = 0;
    for (; o + BLOCK <= count; o += BLOCK)
        add_taps@(from, o, weight + o, row, BLOCK, taps, acc + o);
    for (; o + 16 <= count; o += 16)
        add_taps@(from, o, weight + o, row, 16, taps, acc + o);
    for (; o + 8 <= count; o += 8)
        add_taps@(from, o, weight + o, row, 8, taps, acc + o);
    if (o < count)
        add_taps@(from, o, weight + o, row, count - o, taps, acc + o);
}

/* What a tap multiplies: line[w * step] for the column w of the input. Outside is one line of in_zero, with step 0. */
struct tap@ {
    const X_t *line;
    int step, column;
};

/* The taps of the outputs at (d, h), for the channels from `first`; column: of the output at w = 0. */
static void taps_of@(const struct window *a, const X_t *x, int d, int h, int first, const X_t *outside,
                     struct tap@ *tap)
{
    int i, j, k;
    for (i = 0; i < a->taps[0]; i++)
        for (j = 0; j < a->taps[1]; j++) {
            const int from_d = d * a->strides[0] - a->pads[0] + i * a->dilations[0];
            const int from_h = h * a->strides[1] - a->pads[1] + j * a->dilations[1];
            const int off = from_d < 0 || from_d >= a->in[0] || from_h < 0 || from_h >= a->in[1];
            for (k = 0; k < a->taps[2]; k++, tap++) {
                tap->line = off ? outside : x + (from_d * a->in[1] + from_h) * a->in[2] * a->in[3] + first;
                tap->step = off ? 0 : a->in[3];
                tap->column = k * a->dilations[2] - a->pads[2];
            }
        }
}

/* acc += the products of one position, or of as many as lie beside each other; count: of codes. */
static inline void add_position@(const struct conv *c, const struct tap@ *tap, int w, const X_t *outside,
                                 const int8_t *weight, int count, ACC_t *acc)
{
    const struct window *a = &c->at;
    const int taps = a->taps[0] * a->taps[1] * a->taps[2], column = w * a->strides[2], size = a->in[2];
    const int inner = column + tap[0].column >= 0 && column + tap[taps - 1].column < size;
    const X_t *from[MOST_TAPS];
    int t;
    for (t = 0; t < taps; t++) {
        const int at = column + tap[t].column;
        from[t] = inner || (at >= 0 && at < size) ? tap[t].line + at * tap[t].step : outside;
    }
    for (t = 0; t + 9 <= taps; t += 9)
        add_lanes@(from + t, weight + t * c->row, c->row, count, 9, acc);
    for (; t < taps; t++)
        add_lanes@(from + t, weight + t * c->row, c->row, count, 1, acc);
}

/* weight: taps, c->row: the channels, repeated for as many neighbours as fit in a block. */
static void depthwise@(const struct conv *c, const int8_t *weights, const X_t *x, Y_t *y)
{
    const struct window *a = &c->at;
    const int channels = a->in[3], together = c->row / channels, size = channels < BLOCK ? channels : BLOCK;
    struct tap@ tap[MOST_TAPS];
    X_t outside[BLOCK];
    ACC_t acc[BLOCK];
    int d, h, w, first, count, o;
    for (o = 0; o < BLOCK; o++)
        outside[o] = (X_t)c->in_zero;
    for (d = 0; d < a->out[0]; d++)
        for (h = 0; h < a->out[1]; h++, y += a->out[2] * channels)
            for (first = 0; first < channels; first += size) {
                /* the last block reaches back over what is done */
                const int begin = first + size > channels ? channels - size : first;
                taps_of@(a, x, d, h, begin, outside, tap);
                for (w = 0; w < a->out[2]; w += count) {
                    Y_t *to;
                    int total, wide, p;
                    count = together > 1 ? at_once(a, &w, together) : 1;
                    to = y + w * channels + begin; /* at_once moves w */
                    total = count * size;
                    wide = a->strides[2] == 1 ? total : size;
                    for (o = 0; o < total; o++)
                        acc[o] = c->bias[begin + o];
                    for (p = 0; p < total; p += wide)
                        add_position@(c, tap, w + p / size, outside, weights + begin, wide, acc + p);
                    if (total == BLOCK)
                        rescale@(acc, BLOCK, c, begin, to);
                    else
                        rescale@(acc, total, c, begin, to);
                }
            }
}

/* section depthwise_packed: depthwise */
/* The same with two weights a byte, which lie beside each other. */
static void depthwise_packed@(const struct conv *c, const int8_t *x, int8_t *y, int8_t *weights)
{
    const uint8_t *weight = (const uint8_t *)c->weight;
    const int count = c->row * c->at.taps[0] * c->at.taps[1] * c->at.taps[2];
    int i;
    for (i = 0; i < count; i++)
        weights[i] = (int8_t)((i % 2 ? weight[i / 2] >> 4 : weight[i / 2] & 15) - 8);
    depthwise@(c, weights, x, y);
}

