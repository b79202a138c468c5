#!/usr/bin/env bash
# OpenWebText, an open copy of what GPT-2 was trained on, streamed from the Hugging Face hub: 8.0 million
# documents, 9.0 billion GPT-2 tokens, 18 GB of shards (data/README.md says where these numbers come from).
#
#     data/openwebtext.sh [OUT] [OPTION...]        OUT: shards/openwebtext
#
# Options go to `sparse-gpt prepare` after those below; of one given twice the last counts.
# Many machines can each do a part and write the one folder: the tasks of a Slurm array, what has RANK and
# WORLD_SIZE set, or by hand:
#
#     sbatch --array=1-8 --cpus-per-task=16 data/openwebtext.sh
#     data/openwebtext.sh shards/openwebtext --part 2/8    # the second of eight
set -euo pipefail
out=shards/openwebtext
if [[ ${1:--} != -* ]]; then out=$1; shift; fi

# --held-out  share of the documents kept for validation: about 4,000 documents, as nanoGPT
# --workers   processes that tokenize: one a core. The hub's 80 files are 80 units of work.
sparse-gpt prepare hf:Skylion007/openwebtext --held-out 0.0005 --workers "$(nproc)" --out "$out" "$@"
