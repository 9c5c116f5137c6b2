"""The stories, one a file: quantize, compress, compare, evaluate. Above all but the command line."""
