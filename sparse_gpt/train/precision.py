"""What `precision` means to torch."""

import torch

# The weights' dtype at each precision, between the updates of their fp32 masters.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
