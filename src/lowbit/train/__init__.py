"""Training: loops that resume bit for bit, distillation. Above network."""
