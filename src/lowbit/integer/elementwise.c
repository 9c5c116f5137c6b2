/* section sum */
struct add {
    int count, period, zeros[2], shift, zero, low, high;
    int32_t multipliers[2];
};

/* section add: sum */
/* y = zero + (sum of (operand - its zero) * its multiplier, rounded half up) >> shift; b repeats along a. */
static void add@(const struct add *s, const X_t *a, const B_t *b, Y_t *y)
{
    const int32_t ma = s->multipliers[0], mb = s->multipliers[1];
    const int za = s->zeros[0], zb = s->zeros[1], shift = s->shift, zero = s->zero, low = s->low, high = s->high;
    const int64_t half = (int64_t)1 << (shift - 1);
    int first, i;
    for (first = 0; first < s->count; first += s->period, a += s->period, y += s->period)
        for (i = 0; i < s->period; i++) {
            int32_t code = (int32_t)(((int64_t)(a[i] - za) * ma + (int64_t)(b[i] - zb) * mb + half) >> shift) + zero;
            code = code < low ? low : code;
            y[i] = (Y_t)(code > high ? high : code);
        }
}

/* section add_twice: twice */
struct add_twice {
    int count, period, zeros[2], sign, exponents[3], zero, low, high;
    int32_t multipliers[3];
};

/* TFLite's sum: operands 20 bits up and rescaled, then their sum; b repeats along a. */
static void add_twice(const struct add_twice *s, const int8_t *a, const int8_t *b, int8_t *y)
{
    int first, i;
    for (first = 0; first < s->count; first += s->period, a += s->period, y += s->period)
        for (i = 0; i < s->period; i++) {
            const int32_t left = twice((a[i] - s->zeros[0]) * (1 << 20), s->multipliers[0], s->exponents[0]);
            const int32_t right = twice((b[i] - s->zeros[1]) * (1 << 20), s->multipliers[1], s->exponents[1]);
            const int32_t code = twice(left + s->sign * right, s->multipliers[2], s->exponents[2]);
            y[i] = (int8_t)clipped(code + s->zero, s->low, s->high);
        }
}

/* section multiply_twice: twice */
struct multiply_twice {
    int count, period, zeros[2], multiplier, exponent, zero, low, high;
};

/* y = zero + (a - its zero) * (b - its zero), rescaled; b repeats along a. */
static void multiply_twice(const struct multiply_twice *s, const int8_t *a, const int8_t *b, int8_t *y)
{
    int first, i;
    for (first = 0; first < s->count; first += s->period, a += s->period, y += s->period)
        for (i = 0; i < s->period; i++) {
            const int32_t code = twice((a[i] - s->zeros[0]) * (b[i] - s->zeros[1]), s->multiplier, s->exponent);
            y[i] = (int8_t)clipped(code + s->zero, s->low, s->high);
        }
}

/* section mean_twice: twice */
struct mean_twice {
    int places, channels, in_zero, multiplier, exponent, zero, low, high;
};

/* TFLite's mean of all places; the number of places is part of the multiplier. */
static void mean_twice(const struct mean_twice *s, const int8_t *x, int8_t *y)
{
    int n, i;
    for (n = 0; n < s->channels; n++) {
        int32_t total = -s->places * s->in_zero;
        for (i = 0; i < s->places; i++)
            total += x[i * s->channels + n];
        y[n] = (int8_t)clipped(twice(total, s->multiplier, s->exponent) + s->zero, s->low, s->high);
    }
}

/* section multiply */
struct multiply {
    int count, period, zeros[2], multiplier, shift, left, zero, low, high;
};

/* y = zero + rescale((a - its zero) * (b - its zero)); b repeats along a. */
static void multiply(const struct multiply *s, const int8_t *a, const int8_t *b, int8_t *y)
{
    const int za = s->zeros[0], zb = s->zeros[1], up = 1 << s->left, zero = s->zero, low = s->low, high = s->high;
    const int32_t multiplier = s->multiplier, shift = s->shift - 1;
    int first, i;
    for (first = 0; first < s->count; first += s->period, a += s->period, y += s->period)
        for (i = 0; i < s->period; i++) {
            const int32_t top = (int32_t)(((int64_t)((a[i] - za) * (b[i] - zb) * up) * multiplier) >> 31);
            int32_t code = (((top >> shift) + 1) >> 1) + zero;
            code = code < low ? low : code;
            y[i] = (int8_t)(code > high ? high : code);
        }
}

/* section multiply_wide: multiply scaled clip */
static void multiply_wide@(const struct multiply *s, const X_t *a, const B_t *b, Y_t *y)
{
    int first, i;
    for (first = 0; first < s->count; first += s->period, a += s->period, y += s->period)
        for (i = 0; i < s->period; i++) {
            const int64_t product = (int64_t)(a[i] - s->zeros[0]) * (b[i] - s->zeros[1]);
            y[i] = (Y_t)clipped(scaled(product, s->multiplier, s->shift, s->left) + s->zero, s->low, s->high);
        }
}

/* section mean: window */
struct average {
    struct window at;
    int in_zero, counted, shift, zero, low, high;
    int32_t multiplier;
};

/* section average: mean */
/* y = zero + sum of (x - in_zero) * multiplier / (places * 2^shift), the quotient rounded once, half up. */
static void average@(const struct average *s, const X_t *x, Y_t *y)
{
    const struct window *a = &s->at;
    int d, h, w, i, j, k, n, m;
    for (d = 0; d < a->out[0]; d++)
        for (h = 0; h < a->out[1]; h++)
            for (w = 0; w < a->out[2]; w++) {
                int begin[3], end[3];
                int64_t places, divisor;
                begin[0] = d * a->strides[0] - a->pads[0];
                begin[1] = h * a->strides[1] - a->pads[1];
                begin[2] = w * a->strides[2] - a->pads[2];
                for (m = 0; m < 3; m++) {
                    end[m] = begin[m] + a->taps[m] > a->in[m] ? a->in[m] : begin[m] + a->taps[m];
                    begin[m] = begin[m] < 0 ? 0 : begin[m];
                }
                places = (int64_t)(end[0] - begin[0]) * (end[1] - begin[1]) * (end[2] - begin[2]);
                divisor = s->counted ? (int64_t)a->taps[0] * a->taps[1] * a->taps[2] : places;
                divisor *= (int64_t)1 << s->shift;
                for (n = 0; n < a->in[3]; n++) {
                    int32_t total = (int32_t)(-places * s->in_zero);
                    int64_t doubled, quotient;
                    for (i = begin[0]; i < end[0]; i++)
                        for (j = begin[1]; j < end[1]; j++)
                            for (k = begin[2]; k < end[2]; k++)
                                total += x[((i * a->in[1] + j) * a->in[2] + k) * a->in[3] + n];
                    doubled = 2 * (int64_t)total * s->multiplier + divisor;
                    quotient = doubled / (2 * divisor);
                    quotient -= doubled % (2 * divisor) < 0; /* C divides toward zero */
                    quotient += s->zero;
                    quotient = quotient < s->low ? s->low : quotient;
                    *y++ = (Y_t)(quotient > s->high ? s->high : quotient);
                }
            }
}

/* section largest: window */
/* y = the largest code of a window; places outside do not count. */
static void largest@(const struct window *a, const X_t *x, Y_t *y)
{
    int d, h, w, i, j, k, n;
    for (d = 0; d < a->out[0]; d++)
        for (h = 0; h < a->out[1]; h++)
            for (w = 0; w < a->out[2]; w++, y += a->out[3]) {
                for (n = 0; n < a->out[3]; n++)
                    y[n] = LOWEST;
                for (i = 0; i < a->taps[0]; i++)
                    for (j = 0; j < a->taps[1]; j++)
                        for (k = 0; k < a->taps[2]; k++) {
                            const int from_d = d * a->strides[0] - a->pads[0] + i * a->dilations[0];
                            const int from_h = h * a->strides[1] - a->pads[1] + j * a->dilations[1];
                            const int from_w = w * a->strides[2] - a->pads[2] + k * a->dilations[2];
                            const X_t *from = x + ((from_d * a->in[1] + from_h) * a->in[2] + from_w) * a->in[3];
                            if (from_d < 0 || from_d >= a->in[0] || from_h < 0 || from_h >= a->in[1] || from_w < 0 ||
                                from_w >= a->in[2])
                                continue;
                            for (n = 0; n < a->out[3]; n++)
                                y[n] = from[n] > y[n] ? from[n] : y[n];
                        }
            }
}

/* section look_up */
/* y = table[x + 128] */
static void look_up@(const Y_t *table, const X_t *x, Y_t *y, int count)
{
    int i;
    for (i = 0; i < count; i++)
        y[i] = table[x[i] + 128];
}

/* section copy */
/* Copies a block; loops from the outermost, each with its steps in the source and the target. */
static void copy@(int loops, const int *counts, const int *read, const int *write, const X_t *x, Y_t *y)
{
    int i;
    for (i = 0; i < counts[0]; i++, x += read[0], y += write[0]) {
        if (loops == 1)
            *y = *x;
        else
            copy@(loops - 1, counts + 1, read + 1, write + 1, x, y);
    }
}
