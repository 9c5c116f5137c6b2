"""Pages, text and JSON from results, one kind of result a file. Imports no numerics, network or flow."""
