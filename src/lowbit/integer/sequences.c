/* section line */
/* The straight line between the two of 513 entries that x, of 16 bits, lies between. */
static int32_t line@(const Y_t *table, int32_t x)
{
    const int32_t at = x + 32768, first = table[at >> 7];
    return first + (((table[(at >> 7) + 1] - first) * (at & 127) + 64) >> 7);
}

/* section interpolate: line */
static void interpolate@(const Y_t *table, const X_t *x, Y_t *y, int count)
{
    int i;
    for (i = 0; i < count; i++)
        y[i] = (Y_t)line@(table, x[i]);
}

/* section matrices */
struct product {
    int count, rows, columns, depth, zeros[2], multiplier, shift, left, zero, low, high;
};

/* section product: matrices scaled clip */
/* y[i][j] = zero + rescale(sum over k of (a[i][k] - its zero) * (b[j][k] - its zero)), `count` times. */
static void product@(const struct product *p, const X_t *a, const B_t *b, Y_t *y)
{
    const int za = p->zeros[0], zb = p->zeros[1], depth = p->depth;
    int n, i, j, k;
    for (n = 0; n < p->count; n++, b += p->columns * depth)
        for (i = 0; i < p->rows; i++, a += depth)
            for (j = 0; j < p->columns; j++) {
                const B_t *row = b + j * depth;
                ACC_t total = 0;
                for (k = 0; k < depth; k++)
                    total += (ACC_t)(a[k] - za) * (row[k] - zb);
                *y++ = (Y_t)clipped(scaled(total, p->multiplier, p->shift, p->left) + p->zero, p->low, p->high);
            }
}

/* section product_twice: matrices twice */
static void product_twice(const struct product *p, const int8_t *a, const int8_t *b, int8_t *y)
{
    int n, i, j, k;
    for (n = 0; n < p->count; n++, b += p->columns * p->depth)
        for (i = 0; i < p->rows; i++, a += p->depth)
            for (j = 0; j < p->columns; j++) {
                int32_t total = 0;
                for (k = 0; k < p->depth; k++)
                    total += (a[k] - p->zeros[0]) * (b[j * p->depth + k] - p->zeros[1]);
                total = twice(total, p->multiplier, p->left - p->shift);
                *y++ = (int8_t)clipped(total + p->zero, p->low, p->high);
            }
}

/* section powers: clip */
struct softmax {
    int rows, length, exponent[2], factor[2], zero, low, high;
};

/* 2^-u in steps of 2^-30, u in steps of 2^-16: a polynomial between two powers (I-BERT, arXiv 2101.01321). */
static int32_t power(int64_t u)
{
    const int32_t part = (int32_t)(u & 0xFFFF);
    int64_t y = HALVES_4;
    y = ((y * part) >> 16) + HALVES_3;
    y = ((y * part) >> 16) + HALVES_2;
    y = ((y * part) >> 16) + HALVES_1;
    y = ((y * part) >> 16) + HALVES_0;
    return (int32_t)(y >> (u >> 16 > 31 ? 31 : u >> 16));
}

/* section softmax: powers */
/* y = zero + 2^-u / sum of 2^-u, u from the largest x down; powers are computed twice so that none is stored. */
static void softmax@(const struct softmax *s, const X_t *x, Y_t *y)
{
    const int length = s->length;
    int row, i;
    for (row = 0; row < s->rows; row++, x += length, y += length) {
        int64_t total = 0, inverse;
        int most = x[0];
        for (i = 1; i < length; i++)
            most = x[i] > most ? x[i] : most;
        for (i = 0; i < length; i++)
            total += power(((int64_t)(most - x[i]) * s->exponent[0]) >> s->exponent[1]);
        inverse = ((int64_t)1 << 60) / total;
        for (i = 0; i < length; i++) {
            const int64_t p = (power(((int64_t)(most - x[i]) * s->exponent[0]) >> s->exponent[1]) * inverse) >> 30;
            const int64_t code = (p * s->factor[0] + ((int64_t)1 << (s->factor[1] - 1))) >> s->factor[1];
            y[i] = (Y_t)clipped((int32_t)code + s->zero, s->low, s->high);
        }
    }
}

/* section roots: clip */
struct normalize {
    int rows, length, shift, zero, low, high;
    int64_t epsilon;
    const int32_t *weight, *bias;
};

/* The whole part of the root, by Newton's method from above; 2^60 <= value < 2^62. */
static int64_t root(int64_t value)
{
    int64_t found = (int64_t)1 << 31, lower = (found + value / found) >> 1;
    while (lower < found) {
        found = lower;
        lower = (found + value / found) >> 1;
    }
    return found;
}

/* section normalize: roots */
/* y = zero + (x - mean) / sqrt(variance) * weight + bias; the sum of squares is exact. */
static void normalize@(const struct normalize *s, const X_t *x, Y_t *y)
{
    const int length = s->length;
    int row, i;
    for (row = 0; row < s->rows; row++, x += length, y += length) {
        int64_t total = 0, squares = 0, spread, inverse;
        int up = 0;
        for (i = 0; i < length; i++) {
            total += x[i];
            squares += x[i] * x[i];
        }
        spread = length * squares - total * total + s->epsilon;
        spread = spread < 1 ? 1 : spread;
        for (; spread < (int64_t)1 << 60; up++)
            spread *= 4;
        inverse = ((int64_t)1 << 60) / root(spread);
        for (i = 0; i < length; i++) {
            const int64_t v = ((length * (int64_t)x[i] - total) * inverse) >> (40 - up);
            const int64_t code = (((v * s->weight[i]) >> s->shift) + s->bias[i] + 128) >> 8;
            y[i] = (Y_t)clipped((int32_t)code + s->zero, s->low, s->high);
        }
    }
}

/* section gates: scaled clip */
/* One product of a recurrent layer: t = rescale(bias + weight * x), a row for each gate of each hidden value. */
struct gates {
    const int8_t *weight;
    const int32_t *bias, *multiplier;
    const uint8_t *shift;
    int rows, inputs, left;
};

/* next: what a step makes of its gates and of h. cells: as many as h has values in an LSTM, else 0. */
struct recurrent {
    int steps, hidden, reverse, cells;
    struct gates given, own;
    void (*next)(
        const struct recurrent *s, const int32_t *t, int32_t *own, const int16_t *h, int16_t *row, int16_t *cell);
};

/* tanh from -8 to 8 in steps of 2^-15. */
static const int16_t tanh_table[513] = {
TANH_ENTRIES
};

/* t is cut to 16 bits, in steps of 2^-12. */
static int32_t tanh_of(int32_t t)
{
    return line_16_16(tanh_table, clipped(t, -32768, 32767));
}

/* section sigmoid: gates */
/* Of twice the argument. */
static int32_t sigmoid_of(int32_t t)
{
    return (tanh_of(t) + 32769) >> 1;
}

/* section gate: gates */
static void gate@(const struct gates *g, const X_t *x, int32_t *t)
{
    const int8_t *weight = g->weight;
    int o, i;
    for (o = 0; o < g->rows; o++, weight += g->inputs) {
        int32_t total = g->bias[o];
        for (i = 0; i < g->inputs; i++)
            total += weight[i] * x[i];
        t[o] = scaled(total, g->multiplier[o], g->shift[o], g->left);
    }
}

/* section recurrent: gate */
/* Rows of y: h after each step, then c. Both are 0 before the first where none is given; t holds all gates twice. */
static void recurrent@(
    const struct recurrent *s, const X_t *x, const int16_t *h, const int16_t *c, int16_t *y, int32_t *t)
{
    const int n = s->hidden;
    int32_t *const own = t + s->given.rows;
    int16_t *const cell = y + s->steps * n;
    int step, i;
    for (i = 0; i < s->cells; i++)
        cell[i] = (int16_t)(c ? c[i] : 0);
    for (step = 0; step < s->steps; step++) {
        const int at = s->reverse ? s->steps - 1 - step : step;
        int16_t *const row = y + at * n;
        gate@(&s->given, x + at * s->given.inputs, t);
        for (i = 0; i < n && !h; i++)
            row[i] = 0;
        h = h ? h : row;
        gate_16(&s->own, h, own);
        s->next(s, t, own, h, row, cell);
        h = row;
    }
}

/* section lstm: sigmoid */
static void lstm(
    const struct recurrent *s, const int32_t *t, int32_t *own, const int16_t *h, int16_t *row, int16_t *cell)
{
    const int n = s->hidden;
    int i;
    (void)h;
    for (i = 0; i < n; i++) {
        const int32_t write = sigmoid_of(t[i] + own[i]), out = sigmoid_of(t[n + i] + own[n + i]);
        const int32_t keep = sigmoid_of(t[2 * n + i] + own[2 * n + i]), fresh = tanh_of(t[3 * n + i] + own[3 * n + i]);
        cell[i] = (int16_t)clipped((keep * cell[i] + ((write * fresh) >> 4) + 16384) >> 15, -32768, 32767);
        row[i] = (int16_t)((out * tanh_of(2 * cell[i]) + 16384) >> 15);
    }
}

/* section update: sigmoid */
/* A GRU's new h: as much of the old one as its gate keeps. */
static int16_t update(int32_t t, int32_t h, int32_t fresh)
{
    const int32_t keep = sigmoid_of(t);
    return (int16_t)((keep * h + (32768 - keep) * fresh + 16384) >> 15);
}

/* section gru: update */
static void gru(
    const struct recurrent *s, const int32_t *t, int32_t *own, const int16_t *h, int16_t *row, int16_t *cell)
{
    const int n = s->hidden;
    int i;
    (void)cell;
    for (i = 0; i < n; i++) {
        const int32_t reset = sigmoid_of(t[n + i] + own[n + i]);
        const int32_t fresh = tanh_of(t[2 * n + i] + (int32_t)(((int64_t)reset * own[2 * n + i] + 16384) >> 15));
        row[i] = update(t[i] + own[i], h[i], fresh);
    }
}

/* section gru_before: update */
/* The reset multiplies h, not its product, whose rows wait for it; where h lies in row it is 0. */
static void gru_before(
    const struct recurrent *s, const int32_t *t, int32_t *own, const int16_t *h, int16_t *row, int16_t *cell)
{
    const int n = s->hidden;
    struct gates last = s->own;
    int i;
    (void)cell;
    last.rows = n;
    last.weight += 2 * n * n;
    last.bias += 2 * n;
    last.multiplier += 2 * n;
    last.shift += 2 * n;
    for (i = 0; i < n; i++)
        row[i] = (int16_t)((sigmoid_of(t[n + i] + own[n + i]) * h[i] + 16384) >> 15);
    gate_16(&last, row, own + 2 * n);
    for (i = 0; i < n; i++)
        row[i] = update(t[i] + own[i], h[i], tanh_of(t[2 * n + i] + own[2 * n + i]));
}

/* section rnn: gates */
static void rnn(
    const struct recurrent *s, const int32_t *t, int32_t *own, const int16_t *h, int16_t *row, int16_t *cell)
{
    const int n = s->hidden;
    int i;
    (void)h;
    (void)cell;
    for (i = 0; i < n; i++)
        row[i] = (int16_t)tanh_of(t[i] + own[i]);
}
