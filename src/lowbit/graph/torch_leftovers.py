"""What torch's exporter leaves behind and no module asked for: chains of moves, biases of zeros."""

from collections.abc import Collection

import onnx_ir as ir

from lowbit.graph.fold import fold_constants, infer_shapes, quiet
from lowbit.graph.repeats import merge_repeats
from lowbit.graph.reshapes import simplify_reshapes


def tidy(program: ir.Model, own: Collection[str]) -> None:
    """Merge the chains of Reshape, Transpose, Slice and Cast that the exporter leaves. Exact: nothing is computed.

    own   names of the module's parameters
    """
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    outputs = [value.name for value in program.graph.outputs]
    with quiet():
        rewrite(
            program,
            [
                rules.materialize_reshape_shape_rule,
                rules.reshape_reshape_rule,
                rules.flatten_to_reshape_rule,
                rules.transpose_transpose_rule,
                rules.no_op_transpose_rule,
                rules.no_op_cast_rule,
                rules.no_op_expand_rule,
                rules.collapse_slice_rule,
                rules.dropout_inference_rule,
                rules.unsqueeze_unsqueeze_rule,
                rules.no_op_dynamic_scatter_nd_rule,
                rules.no_op_static_scatter_nd_rule,
            ],
        )
    simplify_reshapes(program)
    merge_repeats(program)
    fold_constants(program)
    _drop_biases_of_zeros(program, own)
    for value, name in zip(program.graph.outputs, outputs, strict=True):
        value.name = name
    infer_shapes(program)


def _drop_biases_of_zeros(program: ir.Model, own: Collection[str]) -> None:
    """The exporter gives every convolution a bias. The module's own stays when it is zero, too: it may be trained."""
    for node in program.graph:
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) == 3 else None
        held = None if bias is None or bias.name in own else ir.convenience.get_const_tensor(bias)
        if held is not None and not held.numpy().any():
            node.resize_inputs(2)
            if bias is not None and bias.is_initializer() and not bias.uses():
                del program.graph.initializers[str(bias.name)]
