"""A run: the loop and what surrounds it on every rank. `python -m sparse_gpt.train` is one rank."""

import os

# Else torch tells what a rank sees of another's end in pages of C++ frames, behind the line that
# says why it ended. It is read when torch is loaded, which no line before this does in a rank.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
