#!/usr/bin/env bash
# Exchanges models with keras-hub and with transformers, in both directions, and prints the largest
# difference of logits for each: `tests/gold/run_all.sh [keras-hub|transformers]`, by default both.
# Each is installed into an environment of its own. Ends with an error if a difference is too large,
# or if one changed weight is not noticed. Needs `make install`, 5 GB of disk and 5 minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu
ours=.venv/bin/python

# Runs a command whose many log lines matter only if it fails.
quietly() {
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }
}

peers=("$@")
if [[ $# == 0 ]]; then peers=(keras-hub transformers); fi
tables=()
for peer in "${peers[@]}"; do
  name=${peer//-/_}
  theirs=$(tests/gold/environment.sh "$peer")
  quietly "$theirs" "tests/gold/${name}_side.py" write "$work/${name}_to_ours"
  quietly "$ours" -m tests.gold.our_side read "$peer" "$work/${name}_to_ours"
  quietly "$ours" -m tests.gold.our_side write "$peer" "$work/ours_to_$name"
  quietly "$theirs" "tests/gold/${name}_side.py" read "$work/ours_to_$name"
  tables+=("$work/${name}_to_ours" "$work/ours_to_$name")
done
"$ours" tests/gold/difference_table.py "${tables[@]}"
