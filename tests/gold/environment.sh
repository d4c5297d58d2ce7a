#!/usr/bin/env bash
# Makes the environment of another implementation unless it is there, and prints the path of its
# python: `tests/gold/environment.sh keras-hub` or `... transformers`. 3 and 1.5 GB of disk.
set -euo pipefail
cd "$(dirname "$0")"

requirements=requirements-$1.txt
environment=.venv-$1
if [[ ! -e $environment/.installed || $requirements -nt $environment/.installed ]]; then
  echo "Installing $1 into tests/gold/$environment" >&2
  "${PYTHON:-python3.11}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
    --requirement "$requirements" >&2
  touch "$environment/.installed"
fi
echo "$PWD/$environment/bin/python"
