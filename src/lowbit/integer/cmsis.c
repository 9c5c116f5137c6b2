/* section cmsis */
/* A convolution by CMSIS-NN. buffer: bytes of the arena that it may use. */
struct cmsis {
    const int8_t *weight;
    const int32_t *bias, *multiplier, *shift;
    int32_t buffer;
    cmsis_nn_dims in, taps, out;
    int32_t in_zero, zero, low, high;
    cmsis_nn_tile stride, pad, dilation;
};

/* section cmsis_convolve: cmsis */
static int cmsis_convolve(const struct cmsis *s, const int8_t *x, int8_t *y, void *buffer)
{
    const cmsis_nn_conv_params how = {
        -s->in_zero, s->zero, s->stride, s->pad, s->dilation, { s->low, s->high },
    };
    const cmsis_nn_per_channel_quant_params scales = { (int32_t *)s->multiplier, (int32_t *)s->shift };
    const cmsis_nn_dims biases = { 1, 1, 1, s->out.c };
    cmsis_nn_context room;
    room.buf = buffer;
    room.size = s->buffer;
    if (arm_convolve_wrapper_s8_get_buffer_size(&how, &s->in, &s->taps, &s->out) > s->buffer)
        return 3;
    return arm_convolve_wrapper_s8(&room, &how, &scales, &s->in, x, &s->taps, s->weight, &biases, s->bias, &s->out,
                                   y) == ARM_CMSIS_NN_SUCCESS ? 0 : 3;
}

/* section cmsis_depthwise: cmsis */
/* The form that needs no buffer takes over where the fast one needs more than there is. */
static int cmsis_depthwise(const struct cmsis *s, const int8_t *x, int8_t *y, void *buffer)
{
    const cmsis_nn_dw_conv_params how = {
        -s->in_zero, s->zero, 1, s->stride, s->pad, s->dilation, { s->low, s->high },
    };
    const cmsis_nn_per_channel_quant_params scales = { (int32_t *)s->multiplier, (int32_t *)s->shift };
    const cmsis_nn_dims biases = { 1, 1, 1, s->out.c };
    const int fits = arm_depthwise_conv_wrapper_s8_get_buffer_size(&how, &s->in, &s->taps, &s->out) <= s->buffer;
    cmsis_nn_context room;
    room.buf = buffer;
    room.size = s->buffer;
    return (fits ? arm_depthwise_conv_wrapper_s8 : arm_depthwise_conv_s8)(
               &room, &how, &scales, &s->in, x, &s->taps, s->weight, &biases, s->bias, &s->out,
               y) == ARM_CMSIS_NN_SUCCESS ? 0 : 3;
}
