"""From the network to files that engines run, and the proof that they compute the same. Above network and engines."""
