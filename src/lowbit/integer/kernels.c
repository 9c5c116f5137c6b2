/* section window */
/* A window of positions over depth, height and width. in, out: depth, height, width, channels. */
struct window {
    int in[4], out[4], taps[3], strides[3], pads[3], dilations[3];
};

/* section conv: window */
/* What a convolution is made of; docs: y = zero + rescale(bias + sum of weight * x). */
struct conv {
    struct window at;
    const void *weight; /* int8_t; or uint8_t with two codes, 8 higher, in the low and the high bits */
    const int32_t *bias, *multiplier;
    const uint8_t *shift;
    int groups, row, in_zero, left, zero, low, high;
};

/* section rescale_once: conv */
/* Accumulators to codes: multiplier * 2^(left - 31 - shift), the product rounded once, half up. */
static inline void rescale@(int32_t *restrict acc, int count, const struct conv *c, int first, Y_t *restrict y)
{
    const int32_t *restrict multiplier = c->multiplier + first;
    const uint8_t *restrict shift = c->shift + first;
    const int up = 1 << c->left, zero = c->zero, low = c->low, high = c->high;
    int i;
    for (i = 0; i < count; i++)
        acc[i] = (int32_t)(((int64_t)(acc[i] * up) * multiplier[i]) >> 31);
    for (i = 0; i < count; i++) { /* codes of 8 bits in a loop of their own: this one is of 32 bits throughout */
        int32_t code = (((acc[i] >> (shift[i] - 1)) + 1) >> 1) + zero;
        code = code < low ? low : code;
        acc[i] = code > high ? high : code;
    }
    for (i = 0; i < count; i++)
        y[i] = (Y_t)acc[i];
}

/* section scaled */
/* The same of one accumulator of up to 47 bits, in two products. */
static int32_t scaled(int64_t acc, int32_t multiplier, int shift, int left)
{
    const int64_t up = acc * ((int64_t)1 << left);
    const int64_t top = ((up >> 16) * multiplier + (((up & 0xFFFF) * multiplier) >> 16)) >> 15;
    return (int32_t)(((top >> (shift - 1)) + 1) >> 1);
}

/* section clip */
static int32_t clipped(int32_t code, int low, int high)
{
    code = code < low ? low : code;
    return code > high ? high : code;
}

/* section rescale_onnxruntime: conv */
/* value / 2^drop, ties to even. */
static int64_t half_even(int64_t value, int drop)
{
    return (value + ((int64_t)1 << (drop - 1)) - 1 + ((value >> drop) & 1)) >> drop;
}

/* The nearest value of 24 bits, as a float32 has. */
static int64_t single(int64_t value)
{
    const int64_t size = value < 0 ? -value : value;
    int drop = 0;
    while (size >> drop >= (int64_t)1 << 24)
        drop++;
    return drop ? half_even(value, drop) * ((int64_t)1 << drop) : value;
}

/* Accumulators to codes as float32 multiplies and rounds. They are shifted up before; products have c->left bits behind
   the point. The codes differ from those rounded once, half up, only near ties: there they are computed again. */
static inline void rescale@(const int32_t *restrict acc, int count, const struct conv *c, int first, Y_t *restrict y)
{
    const int32_t *restrict multiplier = c->multiplier + first;
    const uint8_t *restrict shift = c->shift + first;
    const int bits = c->left, zero = c->zero, low = c->low, high = c->high;
    const int32_t half = (int32_t)1 << (bits - 1);
    const uint32_t step = (uint32_t)1 << (32 - bits);
    const uint32_t part = (uint32_t)1 << 17; /* of 2^32: codes are below 2^8, rounded twice to 24 bits: 2^-15 */
    uint32_t least = UINT32_MAX;
    int32_t top[BLOCK];
    int i;
    for (i = 0; i < count; i++)
        top[i] = (int32_t)(((int64_t)(acc[i] * (1 << shift[i])) * multiplier[i]) >> 31);
    for (i = 0; i < count; i++) { /* codes of 8 bits in a loop of their own: this one is of 32 bits throughout */
        const int32_t up = top[i] + half;
        const uint32_t above = (uint32_t)up * step + step + part;
        int32_t code = (up >> bits) + zero;
        least = above < least ? above : least;
        code = code < low ? low : code;
        top[i] = code > high ? high : code;
    }
    for (i = 0; i < count; i++)
        y[i] = (Y_t)top[i];
    for (i = 0; least <= step + 2 * part && i < count; i++) { /* a product of these is near a tie */
        int64_t code = half_even(single(single(acc[i]) * multiplier[i]), 31 + bits - shift[i]) + zero;
        code = code < low ? low : code;
        y[i] = (Y_t)(code > high ? high : code);
    }
}

/* section rescale_wide: conv scaled clip */
static inline void rescale@(int64_t *acc, int count, const struct conv *c, int first, Y_t *y)
{
    int i;
    for (i = 0; i < count; i++) {
        const int32_t code = scaled(acc[i], c->multiplier[first + i], c->shift[first + i], c->left) + c->zero;
        y[i] = (Y_t)clipped(code, c->low, c->high);
    }
}

/* section twice: clip */
/* value * multiplier * 2^(exponent - 31) as TFLite rounds: at bit 31, to nearest; then the shift, half away from 0. */
static int32_t twice(int32_t value, int32_t multiplier, int exponent)
{
    const int up = exponent > 0 ? exponent : 0, down = exponent > 0 ? 0 : -exponent;
    const int64_t product = (int64_t)(value * (1 << up)) * multiplier;
    const int64_t total = product + (product >= 0 ? 1 << 30 : 1 - (1 << 30));
    const int32_t top = (int32_t)(total / ((int64_t)1 << 31));
    const int32_t mask = (int32_t)(((int64_t)1 << down) - 1);
    return (top >> down) + ((top & mask) > (mask >> 1) + (top < 0));
}

/* section rescale_twice: conv twice */
static inline void rescale@(int32_t *acc, int count, const struct conv *c, int first, int8_t *y)
{
    int i;
    for (i = 0; i < count; i++) {
        const int32_t code = twice(acc[i], c->multiplier[first + i], c->left - c->shift[first + i]);
        y[i] = (int8_t)clipped(code + c->zero, c->low, c->high);
    }
}

/* section multiply_rows: conv */
/* acc[o] = bias[o] + sum of window[i] * weight[o][i]; four outputs at a time read the window once. */
static void multiply_rows@(const struct conv *c, const W_t *window, int first, int rows, ACC_t *acc)
{
    const int size = c->row;
    const int8_t *weight = (const int8_t *)c->weight + first * size;
    const int32_t *bias = c->bias + first;
    int o = 0, i;
    for (; o + 4 <= rows; o += 4, weight += 4 * size) {
        const int8_t *w0 = weight, *w1 = w0 + size, *w2 = w1 + size, *w3 = w2 + size;
        ACC_t a0 = bias[o], a1 = bias[o + 1], a2 = bias[o + 2], a3 = bias[o + 3];
        for (i = 0; i < size; i++) {
            a0 += window[i] * w0[i];
            a1 += window[i] * w1[i];
            a2 += window[i] * w2[i];
            a3 += window[i] * w3[i];
        }
        acc[o] = a0;
        acc[o + 1] = a1;
        acc[o + 2] = a2;
        acc[o + 3] = a3;
    }
    for (; o < rows; o++, weight += size) {
        ACC_t a = bias[o];
        for (i = 0; i < size; i++)
            a += window[i] * weight[i];
        acc[o] = a;
    }
}

/* section multiply_packed: conv */
/* The same with two weights a byte: the first half of a row in the low bits, the second half in the high bits. */
static void multiply_packed@(const struct conv *c, const uint8_t *window, int first, int rows, int32_t *acc)
{
    const int half = c->row / 2;
    const uint8_t *weight = (const uint8_t *)c->weight + first * half, *behind = window + half;
    int o, i;
    for (o = 0; o < rows; o++, weight += half) {
        int32_t a = c->bias[first + o];
        for (i = 0; i < half; i++) {
            const int8_t low = (int8_t)((weight[i] & 15) - 8), high = (int8_t)((weight[i] >> 4) - 8);
            a += window[i] * low;
            a += behind[i] * high;
        }
        acc[o] = a;
    }
}

/* section convolve: conv */
/* Copies `count` codes; of 8 bits as 0 ... 255: machines multiply unsigned with signed bytes. */
static W_t *lift@(const X_t *restrict x, int count, W_t *restrict window)
{
    int i;
    for (i = 0; i < count; i++)
        window[i] = (W_t)(x[i] + LIFT);
    return window + count;
}

static W_t *fill@(int code, int count, W_t *window)
{
    int i;
    for (i = 0; i < count; i++)
        window[i] = (W_t)(code + LIFT);
    return window + count;
}

/* What the output at (d, h, w) is multiplied with, for the channels first ... first + count - 1. */
static void gather@(const struct conv *c, const X_t *x, int d, int h, int w, int first, int count, W_t *window)
{
    const struct window *a = &c->at;
    const int whole = count == a->in[3] && a->dilations[2] == 1;
    int i, j, k;
    for (i = 0; i < a->taps[0]; i++) {
        const int from_d = d * a->strides[0] - a->pads[0] + i * a->dilations[0];
        for (j = 0; j < a->taps[1]; j++) {
            const int from_h = h * a->strides[1] - a->pads[1] + j * a->dilations[1];
            const int from_w = w * a->strides[2] - a->pads[2];
            const X_t *row = x + (from_d * a->in[1] + from_h) * a->in[2] * a->in[3];
            if (from_d < 0 || from_d >= a->in[0] || from_h < 0 || from_h >= a->in[1]) {
                window = fill@(c->in_zero, a->taps[2] * count, window);
            } else if (whole) { /* taps beside each other lie beside each other */
                const int begin = from_w < 0 ? 0 : from_w;
                const int end = from_w + a->taps[2] > a->in[2] ? a->in[2] : from_w + a->taps[2];
                window = fill@(c->in_zero, (begin - from_w) * count, window);
                window = lift@(row + begin * count, (end - begin) * count, window);
                window = fill@(c->in_zero, (from_w + a->taps[2] - end) * count, window);
            } else {
                for (k = 0; k < a->taps[2]; k++) {
                    const int at = from_w + k * a->dilations[2];
                    if (at < 0 || at >= a->in[2])
                        window = fill@(c->in_zero, count, window);
                    else
                        window = lift@(row + at * a->in[3] + first, count, window);
                }
            }
        }
    }
}

typedef void products@(const struct conv *c, const W_t *window, int first, int rows, ACC_t *acc);

static void convolve@(const struct conv *c, products@ *multiply, const X_t *x, Y_t *y, W_t *window)
{
    const struct window *a = &c->at;
    const int inputs = a->in[3] / c->groups, outputs = a->out[3] / c->groups;
    ACC_t acc[BLOCK];
    int d, h, w, g, o;
    for (d = 0; d < a->out[0]; d++)
        for (h = 0; h < a->out[1]; h++)
            for (w = 0; w < a->out[2]; w++)
                for (g = 0; g < c->groups; g++) {
                    gather@(c, x, d, h, w, g * inputs, inputs, window);
                    for (o = 0; o < outputs; o += BLOCK) {
                        const int first = g * outputs + o, rows = outputs - o < BLOCK ? outputs - o : BLOCK;
                        multiply(c, window, first, rows, acc);
                        rescale@(acc, rows, c, first, y);
                        y += rows;
                    }
                }
}
