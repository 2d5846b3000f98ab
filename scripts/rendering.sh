#!/bin/sh
# Make sure that MuJoCo can render without a display, with EGL or otherwise OSMesa. Usage: scripts/rendering.sh python
set -eu
python=$1
works() { "$python" -c "from blm.tasks.rendering import gl_backend; gl_backend()" >/dev/null 2>&1; }
works && exit 0
packages="libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "setup: headless rendering does not work yet; installing $packages"
  apt-get update -q && apt-get install -y -q --no-install-recommends $packages
  works && exit 0
fi
echo "setup: headless rendering (EGL or OSMesa) does not work. Run the following command, then make again:" >&2
echo "  sudo apt-get update && sudo apt-get install -y $packages" >&2
"$python" -c "from blm.tasks.rendering import gl_backend; gl_backend()" >&2 || true
exit 1
