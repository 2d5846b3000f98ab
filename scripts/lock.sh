#!/bin/sh
# Pin every package that the demo, the tests and the documentation may install, transitive ones too, in
# constraints.txt. Usage: scripts/lock.sh [PACKAGE ..]: the packages to upgrade; all other versions stay.
# The file holds for Python 3.11 and newer on every platform. It lists constraints, not requirements: a CPU build
# of torch (2.13.0+cpu) satisfies `torch==2.13.0` and then needs none of the CUDA packages in the list.
set -eu
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
upgrades=
for package in "$@"; do upgrades="$upgrades --upgrade-package $package"; done
lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
grep -v '^#' constraints.txt >"$lock"
"$uv" pip compile -q --universal --python-version 3.11 pyproject.toml --extra dev $upgrades \
  --no-header --no-annotate -o "$lock"
{
  echo "# The versions that the tests last passed with: every package that may be installed, transitive ones too."
  echo "# Written by scripts/lock.sh; pyproject.toml says which other versions may do."
  cat "$lock"
} >constraints.txt
