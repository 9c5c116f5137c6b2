"""Engines: compile and run an ONNX file, read back what runs; times of its operators. Knows no quantization."""
