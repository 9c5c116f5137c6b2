"""Are the numbers in a node's attributes ones that an operator can mean? Asked before native code divides by them.

onnx's shape inference and onnxruntime take a number of heads of 0 or an axis of 2³¹ at its word: the one is a division
by zero, the other a read far outside an array, and either ends the process.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

LARGEST_RANK = 64
LARGEST_EXTENT = (1 << 31) - 1

# Attribute: smallest and largest number that makes sense, for each element where it is a list.
_COUNT = (1, LARGEST_EXTENT)
_AXIS = (-LARGEST_RANK, LARGEST_RANK)
_EXTENT = (-LARGEST_EXTENT, LARGEST_EXTENT)
BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("kernel_shape", "strides", "dilations", "group", "offset_group", "blocksize", "size"), _COUNT),
    **dict.fromkeys(("num_heads", "q_num_heads", "kv_num_heads", "num_groups", "hidden_size", "num_outputs"), _COUNT),
    **dict.fromkeys(("pooled_shape", "output_height", "output_width", "sample_size", "chunk_size"), _COUNT),
    **dict.fromkeys(("axis", "axes", "batch_axis", "time_axis", "scan_input_axes", "scan_output_axes"), _AXIS),
    **dict.fromkeys(("perm", "batch_dims", "num_scan_inputs"), (0, LARGEST_RANK)),
    **dict.fromkeys(("pads", "paddings", "output_shape"), _EXTENT),
    **dict.fromkeys(("output_padding", "block_size", "rotary_embedding_dim", "sampling_ratio"), (0, LARGEST_EXTENT)),
    **dict.fromkeys(("min_gram_length", "max_gram_length"), (1, 1000)),
    **dict.fromkeys(("left_window_size", "right_window_size"), (-1, LARGEST_EXTENT)),
    "max_skip_count": (0, 1000),
    "split": (0, 1 << 62),
    "p": (0, 1000),
}


def impossible_attribute(node: onnx.NodeProto) -> str | None:
    """In words, an attribute of an ONNX operator whose number is out of all bounds; None where there is none.

    Only of operators of the default domain: others may use the same names for something else.
    """
    for attribute in node.attribute:
        bounds = BOUNDS.get(attribute.name)
        numbers = _numbers(attribute)
        if bounds is not None:
            wrong = next((number for number in numbers if not bounds[0] <= number <= bounds[1]), None)
            if wrong is not None:
                return f"attribute '{attribute.name}' is {wrong}; it lies between {bounds[0]} and {bounds[1]}"
        if attribute.name == "num_outputs" and node.op_type == "Split" and attribute.i != len(node.output):
            return f"attribute 'num_outputs' is {attribute.i}, but {len(node.output)} outputs are named"
    return None


def _numbers(attribute: onnx.AttributeProto) -> Iterable[int]:
    if attribute.type == onnx.AttributeProto.INT:
        return (attribute.i,)
    return attribute.ints if attribute.type == onnx.AttributeProto.INTS else ()
