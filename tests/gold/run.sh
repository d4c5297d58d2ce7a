#!/usr/bin/env bash
# Compares our Gemma 3 270M with Hugging Face transformers: `tests/gold/run.sh [--store]`.
# Prints the largest differences; with --store the new answers replace the stored ones.
# Needs `make install`, 3 GB of disk and about 6 minutes. See README.md beside this file.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=${GOLD_DIR:-/tmp/gemma-gold}
goldens=tests/goldens/gemma3_270m
ours=.venv/bin/python
theirs=$(tests/gold/environment.sh transformers)
export GEMMA_TEST_CACHE_DIR=${GEMMA_TEST_CACHE_DIR:-$work/cache}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 JAX_PLATFORMS=cpu

"$ours" -m tests.gold.export_weights "$work/model"
"$theirs" tests/gold/transformers_answers.py \
  "$work/model" "$goldens/cases.json" "$work/long_cases.json"
"$ours" -m tests.gold.differences "$work/long_cases.json"
if [[ ${1-} == --store ]]; then
  cp "$work/long_cases.json" "$goldens/long_cases.json"
fi
