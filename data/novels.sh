#!/usr/bin/env bash
# The two novels in data/novels, a document a chapter, a tenth of them held out: what scripts/quickstart
# and configs/tiny-*.yaml train on. Takes seconds and no network.
#
#     data/novels.sh [OUT] [OPTION...]        OUT: shards/novels
#
# Options go to `sparse-gpt prepare` after those below; of one given twice the last counts.
set -euo pipefail
novels=$(dirname "${BASH_SOURCE[0]}")/novels
out=shards/novels
if [[ ${1:--} != -* ]]; then out=$1; shift; fi

# --separator  begins a new document; \n is a line end
# --held-out   share of the documents kept for validation; chosen by their content, so always the same
sparse-gpt prepare "$novels"/*.txt --separator '\nChapter ' --held-out 0.1 --out "$out" "$@"
