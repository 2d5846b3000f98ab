#!/bin/sh
# Create .venv-lerobot, in which the official LeRobot package reads our datasets, trains its policies on them, and
# runs them on our suite (docs/lerobot.md).
# Usage: scripts/lerobot.sh [python]. It takes about 1.8 GB and a few minutes.
#
# lerobot 0.4.4, the newest version for Python 3.11, requires torch < 2.11 and packages that neither datasets nor
# policies need. It is therefore installed without its dependencies; the packages that it imports are listed here:
# the first line for datasets, the second for training and policies, the third for our suite and our protocol.
set -eu
python=${1:-python3}
venv=.venv-lerobot
[ -x $venv/bin/python ] || "$python" -m venv $venv
echo "lerobot: installing packages into $venv (a few minutes the first time)"
$venv/bin/python -m pip install -q torch==2.13.0
$venv/bin/python -m pip install -q --no-deps lerobot==0.4.4 torchvision==0.28.0 torchcodec==0.13.0
# pip warns here that some of lerobot's dependencies are missing; this is expected.
$venv/bin/python -m pip install -q 'datasets>=4,<5' 'huggingface-hub<0.36' 'av>=15,<16' 'packaging<26' \
  'deepdiff<9' draccus==0.10.0 accelerate jsonlines einops termcolor imageio pandas \
  'transformers>=4.57.1,<5' 'diffusers<0.36' 'gymnasium>=1.1.1,<2' num2words pyserial 'imageio[ffmpeg]' \
  mujoco==3.17.0 msgpack websockets rich
# LeRobot's commands find this package in the repository.
site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
pwd >"$site/blm.pth"
# torchvision may have been built for another torch, in which case its compiled operators do not load. Declaring
# the two operators that its import looks up is enough, because datasets and policies use none of them. The .pth
# file makes every program of this environment do so, LeRobot's own commands too, just before torchvision is imported.
cat >"$site/torchvision_operators.py" <<'PY'
"""Declare the operators that torchvision looks up, just before it is imported."""

import sys


class BeforeTorchvision:
    """Finds nothing: it only notices that torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()


def declare():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    torch.library.torchvision_operators = library  # it must not be freed
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            library.define(schema)


sys.meta_path.insert(0, BeforeTorchvision())
PY
echo "import torchvision_operators" >"$site/torchvision_operators.pth"
# torchcodec reads videos with the system's FFmpeg libraries.
if ! $venv/bin/python -c 'import torch, torchcodec.decoders' >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "lerobot: installing ffmpeg"
    apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends ffmpeg >/dev/null
  else
    echo "lerobot: torchcodec needs FFmpeg. Run the following command, then this script again:" >&2
    echo "  sudo apt-get update && sudo apt-get install -y ffmpeg" >&2
    exit 1
  fi
fi
$venv/bin/python -c '
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import importlib.metadata as m
print("lerobot:", ", ".join(f"{n} {m.version(n)}" for n in ("lerobot", "torch", "torchcodec")), "ready")'
