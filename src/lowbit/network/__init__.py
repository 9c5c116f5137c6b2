"""The network: the program as a torch module with quantizers, and where they go. Knows no engine and no file."""
