/* The part of CMSIS-NN's interface that `--kernels cmsis-nn` calls, with its documented meaning in plain C.

   Written for the tests from the library's documentation, so that the calls can be compiled and run without it: types
   and prototypes as CMSIS-NN 4 to 8 declare them; the arithmetic is that of arm_nn_requantize, with one rounding or two. */
#ifndef ARM_NNFUNCTIONS_H
#define ARM_NNFUNCTIONS_H

#include <stdint.h>
#include <string.h>

typedef enum { ARM_CMSIS_NN_SUCCESS = 0, ARM_CMSIS_NN_ARG_ERROR = -1 } arm_cmsis_nn_status;
typedef struct { int32_t w, h; } cmsis_nn_tile;
typedef struct { void *buf; int32_t size; } cmsis_nn_context;
typedef struct { int32_t n, h, w, c; } cmsis_nn_dims;
typedef struct { int32_t *multiplier, *shift; } cmsis_nn_per_channel_quant_params;
typedef struct { int32_t min, max; } cmsis_nn_activation;
typedef struct {
    int32_t input_offset, output_offset;
    cmsis_nn_tile stride, padding, dilation;
    cmsis_nn_activation activation;
} cmsis_nn_conv_params;
typedef struct {
    int32_t input_offset, output_offset, ch_mult;
    cmsis_nn_tile stride, padding, dilation;
    cmsis_nn_activation activation;
} cmsis_nn_dw_conv_params;

static int32_t requantized(int32_t value, int32_t multiplier, int32_t shift)
{
#ifdef CMSIS_NN_USE_SINGLE_ROUNDING
    return ((int32_t)(((int64_t)value * multiplier) >> (30 - shift)) + 1) >> 1;
#else
    const int32_t up = shift > 0 ? shift : 0, down = shift > 0 ? 0 : -shift;
    const int64_t product = (int64_t)(value * (1 << up)) * multiplier;
    const int32_t high = (int32_t)((product + (1 << 30)) >> 31), mask = (int32_t)(((int64_t)1 << down) - 1);
    return (high >> down) + ((high & mask) > (mask >> 1) + (high < 0));
#endif
}

/* depthwise: one filter a channel, the channels last in the filter; else (outputs, height, width, inputs). */
static arm_cmsis_nn_status convolved(
    int depthwise, const cmsis_nn_conv_params *how, const cmsis_nn_per_channel_quant_params *scales,
    const cmsis_nn_dims *in, const int8_t *x, const cmsis_nn_dims *taps, const int8_t *w, const int32_t *bias,
    const cmsis_nn_dims *out, int8_t *y)
{
    int h, v, o, i, j, c;
    for (h = 0; h < out->h; h++)
        for (v = 0; v < out->w; v++)
            for (o = 0; o < out->c; o++) {
                int32_t sum = bias[o];
                for (i = 0; i < taps->h; i++)
                    for (j = 0; j < taps->w; j++) {
                        const int row = h * how->stride.h - how->padding.h + i * how->dilation.h;
                        const int column = v * how->stride.w - how->padding.w + j * how->dilation.w;
                        if (row < 0 || row >= in->h || column < 0 || column >= in->w)
                            continue;
                        for (c = depthwise ? o : 0; c < (depthwise ? o + 1 : in->c); c++) {
                            const int place = i * taps->w + j;
                            const int weight = depthwise ? place * out->c + o
                                                         : (o * taps->h * taps->w + place) * in->c + c;
                            sum += (x[(row * in->w + column) * in->c + c] + how->input_offset) * w[weight];
                        }
                    }
                sum = requantized(sum, scales->multiplier[o], scales->shift[o]) + how->output_offset;
                sum = sum < how->activation.min ? how->activation.min : sum;
                *y++ = (int8_t)(sum > how->activation.max ? how->activation.max : sum);
            }
    return ARM_CMSIS_NN_SUCCESS;
}

static inline int32_t arm_convolve_wrapper_s8_get_buffer_size(
    const cmsis_nn_conv_params *how, const cmsis_nn_dims *in, const cmsis_nn_dims *taps, const cmsis_nn_dims *out)
{
    (void)how, (void)out;
    return 4 * ((in->c * taps->w * taps->h + 15) / 16 * 16); /* what MVE asks for, the most of all */
}

static inline arm_cmsis_nn_status arm_convolve_wrapper_s8(
    const cmsis_nn_context *context, const cmsis_nn_conv_params *how, const cmsis_nn_per_channel_quant_params *scales,
    const cmsis_nn_dims *in, const int8_t *x, const cmsis_nn_dims *taps, const int8_t *weight,
    const cmsis_nn_dims *biases, const int32_t *bias, const cmsis_nn_dims *out, int8_t *y)
{
    if (!context->buf || biases->c != out->c || taps->c != in->c)
        return ARM_CMSIS_NN_ARG_ERROR;
    memset(context->buf, 7, (size_t)context->size); /* it may write wherever it was given room */
    return convolved(0, how, scales, in, x, taps, weight, bias, out, y);
}

static inline int32_t arm_depthwise_conv_wrapper_s8_get_buffer_size(
    const cmsis_nn_dw_conv_params *how, const cmsis_nn_dims *in, const cmsis_nn_dims *taps, const cmsis_nn_dims *out)
{
    (void)how, (void)out;
    return 2 * in->c * taps->w * taps->h;
}

static inline arm_cmsis_nn_status arm_depthwise_conv_s8(
    const cmsis_nn_context *context, const cmsis_nn_dw_conv_params *how,
    const cmsis_nn_per_channel_quant_params *scales, const cmsis_nn_dims *in, const int8_t *x,
    const cmsis_nn_dims *taps, const int8_t *weight, const cmsis_nn_dims *biases, const int32_t *bias,
    const cmsis_nn_dims *out, int8_t *y)
{
    const cmsis_nn_conv_params plain = {
        how->input_offset, how->output_offset, how->stride, how->padding, how->dilation, how->activation,
    };
    if (how->ch_mult != 1 || taps->n != 1 || taps->c != out->c || biases->c != out->c)
        return ARM_CMSIS_NN_ARG_ERROR;
    memset(context->buf, 7, (size_t)context->size);
    return convolved(1, &plain, scales, in, x, taps, weight, bias, out, y);
}

#define arm_depthwise_conv_wrapper_s8 arm_depthwise_conv_s8
#endif
