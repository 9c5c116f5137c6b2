"""A network in integers only: the program as data, its reference, and what it is exported to."""
