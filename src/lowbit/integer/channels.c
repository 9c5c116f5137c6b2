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

/* section lanes: conv inside */
#ifdef __GNUC__
#define APART __attribute__((noinline)) /* gcc vectorises it alone: inlined it took ten times as long */
#else
#define APART
#endif

/* acc[p][n] += (x[p][i] - zero) * weight[i][n]: LANES outputs of TOGETHER positions; count: of which are wanted. */
APART static void multiply_lanes(const int8_t *x, int step, int length, int zero, const int8_t *weight, int count,
                                 int32_t (*acc)[LANES])
{
    int i, p, n;
#if defined(__SSE2__) || defined(__ARM_NEON)
    int32_t sums[TOGETHER][LANES];
    (void)count;
    for (p = 0; p < TOGETHER; p++)
        for (n = 0; n < LANES; n++)
            sums[p][n] = acc[p][n];
    for (i = 0; i < length; i++, weight += LANES)
        for (p = 0; p < TOGETHER; p++) {
            const int value = x[p * step + i] - zero;
            for (n = 0; n < LANES; n++)
                sums[p][n] += value * weight[n];
        }
    for (p = 0; p < TOGETHER; p++)
        for (n = 0; n < LANES; n++)
            acc[p][n] = sums[p][n];
#else /* without vectors: as many accumulators as there are registers for */
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

/* section depthwise: conv inside */
/* Sums of `count` channels from `first`, each of the input channel of its number. Beyond the last channel come those
   of the next position; where there are steps between, they are put beside each other first. */
static inline void block@(const struct conv *c, const int8_t *weights, const X_t *x, const struct taps *i,
                          const struct taps *j, const struct taps *k, int first, int count, Y_t *y)
{
    const struct window *a = &c->at;
    const int channels = a->in[3], zero = c->in_zero;
    const int apart = count > channels && a->strides[2] > 1;
    ACC_t acc[BLOCK];
    X_t near[BLOCK];
    int l, m, n, o, p, part;
    for (o = 0; o < count; o++)
        acc[o] = c->bias[first + o];
    for (l = i->first; l < i->end; l++)
        for (m = j->first; m < j->end; m++)
            for (n = k->first; n < k->end; n++) {
                const int row = (i->from + l * a->dilations[0]) * a->in[1] + j->from + m * a->dilations[1];
                const X_t *from = x + (row * a->in[2] + k->from + n * a->dilations[2]) * channels + first;
                const int8_t *weight = weights + ((l * a->taps[1] + m) * a->taps[2] + n) * c->row + first;
                for (p = 0; apart && p < count; p += channels, from += a->strides[2] * channels)
                    for (part = 0; part < channels; part += 8)
                        for (o = 0; o < 8; o++)
                            near[p + part + o] = from[part + o];
                from = apart ? near : from;
                for (o = 0; o < count; o++)
                    acc[o] += (PRODUCT_t)((from[o] - zero) * weight[o]);
            }
    rescale@(acc, count, c, first, y + first);
}

/* weight: taps, c->row: the channels, or BLOCK where they are repeated for as many neighbours as fill a block. */
static void depthwise@(const struct conv *c, const int8_t *weights, const X_t *x, Y_t *y)
{
    const struct window *a = &c->at;
    const int channels = a->in[3], together = c->row / channels;
    int d, h, w, first, count;
    for (d = 0; d < a->out[0]; d++)
        for (h = 0; h < a->out[1]; h++, y += a->out[2] * channels)
            for (w = 0; w < a->out[2]; w += count) {
                const struct taps i = inside(a, 0, d), j = inside(a, 1, h);
                struct taps k;
                count = together > 1 ? at_once(a, &w, together) : 1;
                k = inside(a, 2, w);
                for (first = 0; first + BLOCK <= count * channels; first += BLOCK)
                    block@(c, weights, x, &i, &j, &k, first, BLOCK, y + w * channels);
                if (first < channels)
                    block@(c, weights, x, &i, &j, &k, first, channels - first, y + w * channels);
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

