"""lowbit: quantize a trained network to few bits, and prove on the deployed file that it still does its job."""

__version__ = "0.1.0"
