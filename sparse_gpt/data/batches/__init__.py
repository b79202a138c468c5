"""Tokens become batches; which sample is where is computed. `batches` and `prefetch` load torch."""
