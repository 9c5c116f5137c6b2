"""Training: samples, loss, steps that resume bit for bit. It knows torch modules and no network of ours."""
