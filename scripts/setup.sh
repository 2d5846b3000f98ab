#!/bin/sh
# Create .venv and install the package in it. Usage: scripts/setup.sh demo|dev [python]
#   demo  what `make demo` runs on: the runtime dependencies
#   dev   what `make test` needs on top: every extra and the tools
# `uv` installs; PIP=1 in the environment chooses plain pip. constraints.txt pins every package.
set -eu
what=${1:-}
python=${2:-python3}
begin=$(date +%s)
say() { echo "setup [$(($(date +%s) - begin)) s] $*"; }

case $what in
  demo) package=. phases=2 ;;
  dev) package='.[dev]' phases=3 ;;
  *) echo "setup: unknown set '$what'; choose demo or dev" >&2 && exit 2 ;;
esac
"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Try: make PYTHON=python3.11 demo")
PY

say "1/$phases environment .venv"
# An interrupted run may have left it without pip; `venv` then completes it and keeps what is installed.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
if [ -n "${PIP:-}" ]; then
  install() { .venv/bin/python -m pip install -q --disable-pip-version-check "$@"; }
  installer="pip (a few minutes the first time)"
else
  uv=$(command -v uv || echo .venv/bin/uv)
  [ -x "$uv" ] || .venv/bin/python -m pip install -q --disable-pip-version-check uv
  # uv ignores pip's settings. Hand on where pip was told to look for packages, for instance for a CPU build of
  # torch, and let the best version win among several indexes, as pip does.
  setting() { .venv/bin/python -m pip config get "$1" 2>/dev/null || true; }
  links=${PIP_FIND_LINKS:-$(setting global.find-links)}
  index=${PIP_INDEX_URL:-$(setting global.index-url)}
  more=${PIP_EXTRA_INDEX_URL:-$(setting global.extra-index-url)}
  [ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo $links | tr ' ' ',')}"
  [ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
  [ -z "$more" ] || export UV_INDEX="${UV_INDEX:-$(echo $more)}" UV_INDEX_STRATEGY=unsafe-best-match
  # Compiled as pip does it: otherwise the first import of each module pays, and shows warnings of other people's code.
  install() { "$uv" pip install -q --compile-bytecode --python .venv/bin/python "$@"; }
  installer="uv ($uv)"
fi

say "2/$phases packages, with $installer"
install -c constraints.txt -e "$package"
if [ "$what" = dev ]; then
  say "3/$phases packages that come without their dependencies: scripts/no-deps.txt"
  install --no-deps -r scripts/no-deps.txt
fi
say "ready"
