#!/usr/bin/env bash
# A folder of your own, read with all folders in it: .txt, .text and .md (a document a file), .jsonl, .ndjson,
# .json, .csv and .tsv, each also .gz, .zst, .bz2 or .xz, and .parquet. Files of other kinds are left alone.
#
#     data/own-folder.sh FOLDER [OUT] [OPTION...]        OUT: shards/ and the folder's name
#
# Options go to `sparse-gpt prepare` after those below; of one given twice the last counts. E.g.
#
#     --held-out 0.1                 more of few documents than the one there is at least
#     --text-field content           key or column of the text, if it is not `text`
#     --separator '\n\n\n'           text files hold many documents, with this between them
#     --where language=en            only rows with this value; not for text files
#     --min-chars 200 --dedup        leave out short documents, and those whose text came before
#     --part 2/8                     the second of eight machines that share OUT; in a Slurm array, or with
#                                    RANK and WORLD_SIZE set, this is so by itself
set -euo pipefail
if [[ ${1:--} == -* ]]; then echo "usage: $0 FOLDER [OUT] [OPTION...]" >&2; exit 2; fi
folder=$1; shift
out=shards/$(basename "$folder")
if [[ ${1:--} != -* ]]; then out=$1; shift; fi

# --held-out  share of the documents kept for validation; chosen by their content, so always the same
# --workers   processes that tokenize: one a core
sparse-gpt prepare "$folder" --held-out 0.01 --workers "$(nproc)" --out "$out" "$@"
