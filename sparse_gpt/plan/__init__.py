"""What a run will cost and what runs have cost: memory, FLOPs, days, side by side."""
