"""GPT-2 with a dense or a sparse feed-forward network, and what it costs."""
