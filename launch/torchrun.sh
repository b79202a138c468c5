#!/usr/bin/env bash
# Trains with torchrun on this machine, a rank a GPU, or one rank on the CPU:
#
#     launch/torchrun.sh configs/124m.yaml optimizer.lr=8e-4
#     RANKS=2 launch/torchrun.sh configs/tiny-sparse.yaml       # so many ranks, on CPUs too
#
# Run it again to go on from the newest checkpoint. SIGTERM to torchrun has the ranks save one; by default
# torchrun kills them 30 s later (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), and whatever the ranks end with, 75 or 2,
# torchrun ends with 1. `sparse-gpt train` gives them the time they need, and passes their exit code on.
set -euo pipefail

# --standalone      the ranks meet on this machine, at a port that is free
# --nproc-per-node  ranks
# -m                the module that is a rank; in a checkout the file launch/train.py is the same
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec torchrun --standalone --nproc-per-node "$ranks" -m sparse_gpt.train --config "$@"

# On several machines take this instead. Start it where they meet, and within ten minutes on the others.
#
# --nnodes          machines
# --rdzv-endpoint   where they meet: one of them, and a port there that the others reach
# --rdzv-id         any word; the same on all machines
#
# exec torchrun --nnodes 2 --nproc-per-node "$ranks" --rdzv-backend c10d \
#   --rdzv-endpoint node1:29400 --rdzv-id sparse-gpt -m sparse_gpt.train --config "$@"
