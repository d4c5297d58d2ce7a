#!/usr/bin/env bash
# Loads the presets and LoRA files that our writers write with keras-hub itself, in an environment of
# its own (about 3 GB with TensorFlow), and prints the differences.
set -euo pipefail
cd "$(dirname "$0")/../.."
gold_venv=tests/gold/.venv-keras-hub
written=$(mktemp -d)
trap 'rm -rf "$written"' EXIT
if [ ! -x "$gold_venv/bin/python" ]; then
  python3.11 -m venv "$gold_venv"
  "$gold_venv/bin/pip" install --quiet keras-hub==0.32.0 keras==3.15.1 jax==0.10.2 sentencepiece==0.2.3
fi
.venv/bin/python -m tests.gold.write_for_keras_hub "$written"
"$gold_venv/bin/python" tests/gold/keras_hub_reads_ours.py "$written"
