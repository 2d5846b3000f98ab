#!/bin/sh
# Create .venv and install the package with its pinned torch. Usage: scripts/setup.sh [python]
set -eu
python=${1:-python3}
"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11 setup")
PY
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "setup: installing packages into .venv (a few minutes the first time)"
.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
# The real OpenPI client pins numpy<2 but runs with numpy 2; the serving tests drive our server with it.
.venv/bin/python -m pip install -q --no-deps openpi-client
