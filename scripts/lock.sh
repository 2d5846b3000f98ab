#!/bin/sh
# Pin every package that the demo, the tests and the documentation may install, including transitive ones, in
# constraints.txt. Usage: scripts/lock.sh [PACKAGE ..] upgrades these packages and keeps all other versions.
# The file applies to Python 3.11 and newer on every platform. It lists constraints, not requirements: a CPU build
# of torch (2.13.0+cpu) satisfies `torch==2.13.0` and then needs none of the CUDA packages in the list.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
upgrades=
for package in "$@"; do upgrades="$upgrades --upgrade-package $package"; done
lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
grep -v '^#' constraints.txt >"$lock"
"$uv" pip compile -q --universal --python-version 3.11 pyproject.toml --extra dev --extra openvino $upgrades \
  --no-header --no-annotate -o "$lock"
{
  echo "# The versions with which the tests last passed, for every package that may be installed (transitive ones too)."
  echo "# Written by scripts/lock.sh; pyproject.toml lists the version ranges that are allowed."
  cat "$lock"
} >constraints.txt
