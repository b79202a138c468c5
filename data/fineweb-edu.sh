#!/usr/bin/env bash
# FineWeb-Edu's sample of 10 billion tokens, web pages chosen as educational, streamed from the Hugging Face
# hub: 9.7 million documents, 10 billion GPT-2 tokens, 20 GB of shards (data/README.md says where these
# numbers come from). The data set has `sample-100BT` and `sample-350BT` too.
#
#     data/fineweb-edu.sh [OUT] [OPTION...]        OUT: shards/fineweb-edu
#
# Options go to `sparse-gpt prepare` after those below; of one given twice the last counts.
# Many machines can each do a part and write the one folder: the tasks of a Slurm array, what has RANK and
# WORLD_SIZE set, or by hand:
#
#     sbatch --array=1-7 --cpus-per-task=16 data/fineweb-edu.sh
#     data/fineweb-edu.sh shards/fineweb-edu --part 2/7    # the second of seven
set -euo pipefail
out=shards/fineweb-edu
if [[ ${1:--} != -* ]]; then out=$1; shift; fi

# --held-out  share of the documents kept for validation: about 9,700 documents, 10 million tokens
# --workers   processes that tokenize: one a core. The hub's 14 files are 14 units of work.
sparse-gpt prepare hf:HuggingFaceFW/fineweb-edu:sample-10BT --held-out 0.001 --workers "$(nproc)" \
  --out "$out" "$@"
