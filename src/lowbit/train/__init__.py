"""Training: loops that resume bit for bit, distillation. It knows torch modules, no network of ours."""
