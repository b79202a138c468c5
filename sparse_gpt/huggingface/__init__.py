"""The sparse FFN in the GPT-2s of Hugging Face transformers (extra `hf`): drop in, fit, save,
load; and a whole GPT of ours as one of them.

Importing this room, which needs transformers 5, tells its Auto classes of the model type
`sparse_gpt2`. Without that they refuse a saved model, and so do transformers' own GPT-2 classes.
"""

from sparse_gpt.huggingface.fit import FitError, balance, fit_to_dense
from sparse_gpt.huggingface.replace import replace_ffn

__all__ = ["FitError", "balance", "fit_to_dense", "replace_ffn"]
