"""The token files of other tools: Megatron-LM's, llm.c's, nanoGPT's."""
