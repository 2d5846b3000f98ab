#!/bin/sh
# Create .venv and install the package in it. Usage: scripts/setup.sh demo|dev [python]
#   demo  the runtime dependencies, for `make demo`
#   dev   in addition all extras and the development tools, for `make test`
# The script installs with uv, or with plain pip if PIP=1 is set. constraints.txt pins every package.
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
# An interrupted run may have left the environment without pip; `venv` then repairs it and keeps its packages.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
if [ -n "${PIP:-}" ]; then
  install() { .venv/bin/python -m pip install -q --disable-pip-version-check "$@"; }
  installer="pip (a few minutes the first time)"
else
  uv=$(command -v uv || echo .venv/bin/uv)
  [ -x "$uv" ] || .venv/bin/python -m pip install -q --disable-pip-version-check uv
  # uv ignores pip's configuration. Pass pip's package sources on to uv (for example for a CPU build of torch), and
  # choose the best version among several indexes, as pip does.
  setting() { .venv/bin/python -m pip config get "$1" 2>/dev/null || true; }
  links=${PIP_FIND_LINKS:-$(setting global.find-links)}
  index=${PIP_INDEX_URL:-$(setting global.index-url)}
  more=${PIP_EXTRA_INDEX_URL:-$(setting global.extra-index-url)}
  [ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo $links | tr ' ' ',')}"
  [ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
  [ -z "$more" ] || export UV_INDEX="${UV_INDEX:-$(echo $more)}" UV_INDEX_STRATEGY=unsafe-best-match
  # Compile to bytecode as pip does; otherwise the first import of each module is slow and shows third-party warnings.
  install() { "$uv" pip install -q --compile-bytecode --python .venv/bin/python "$@"; }
  installer="uv ($uv)"
fi

say "2/$phases packages, with $installer"
install -c constraints.txt -e "$package"
if [ "$what" = dev ]; then
  say "3/$phases packages installed without their dependencies (scripts/no-deps.txt)"
  install --no-deps -r scripts/no-deps.txt
fi
say "ready"
