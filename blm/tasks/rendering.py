"""Offscreen rendering of a MuJoCo model. No environment variable is needed before `import mujoco`.

MUJOCO_GL (egl, osmesa, glfw, cgl) is respected if it is set. Otherwise it is set to the backend
chosen here, because MuJoCo's own loader reads it.
"""

from __future__ import annotations

import atexit
import ctypes.util
import importlib
import os
import sys
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from blm.types import BlmError, ImageArray, lookup

_BACKENDS = {name: f"mujoco.{name}" for name in ("egl", "osmesa", "glfw", "cgl")}
_FIX = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6, with MUJOCO_GL=osmesa)"
_MAX_GEOMS = 300
_FLAGS = mujoco.mjtRndFlag
_open: weakref.WeakSet[Renderer] = weakref.WeakSet()


def gl_backend() -> str:
    """Return the OpenGL backend for rendering. Raises BlmError if the machine has none."""
    if chosen := os.environ.get("MUJOCO_GL", "").lower():
        lookup("MUJOCO_GL", chosen, _BACKENDS)
        return chosen
    if sys.platform in ("darwin", "win32"):
        return "cgl" if sys.platform == "darwin" else "glfw"
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            return backend
    raise BlmError(f"there is no OpenGL library for offscreen rendering. Install one: {_FIX}")


def _new_context(size: int) -> Any:
    backend = os.environ["MUJOCO_GL"] = gl_backend()
    # Mesa's software renderer renders our small images a quarter faster without its own threads.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        context = importlib.import_module(_BACKENDS[backend]).GLContext(size, size)
        context.make_current()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise BlmError(f"OpenGL through '{backend}' failed: {error}. Install it: {_FIX}") from error
    if not _open:
        atexit.register(_close_all)  # runs before the backend closes its display
    return context


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()


class Renderer:
    """Renders square images of one model, up to `size` px per side.

    It also renders other models with the same textures, if `show` names them. Holds an OpenGL
    context until `close`.
    """

    _gl: Any = None

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        self._model, self._gl = model, _new_context(size)
        self._uploaded: dict[int, Hashable] = {}
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        self._scene.flags[_FLAGS.mjRND_SHADOW] = self._scene.flags[_FLAGS.mjRND_REFLECTION] = 0
        self._camera, self._options = mujoco.MjvCamera(), mujoco.MjvOption()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        _open.add(self)

    def show(self, model: mujoco.MjModel, textures: Mapping[int, Hashable], *, shadows: bool = False) -> None:
        """Render `model` from now on, whose textures have these contents (number -> any key)."""
        self._model = model
        self._scene.flags[_FLAGS.mjRND_SHADOW] = int(shadows)
        self._gl.make_current()
        for number, content in textures.items():
            if self._uploaded.get(number) != content:
                mujoco.mjr_uploadTexture(model, self._context, number)
                self._uploaded[number] = content

    def rgb(self, data: mujoco.MjData, camera: str, size: int) -> ImageArray:
        """Return uint8 [size, size, 3]."""
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, every, self._scene)
        image = np.empty((size, size, 3), dtype=np.uint8)
        view = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(view, self._scene, self._context)
        mujoco.mjr_readPixels(image, None, view, self._context)
        return np.ascontiguousarray(image[::-1])

    def geoms(self, data: mujoco.MjData, camera: str, size: int) -> NDArray[np.int64]:
        """Return the segmentation int64 [size, size]: the geom id of each pixel, -1 for none."""
        flags = self._scene.flags
        flags[_FLAGS.mjRND_SEGMENT] = flags[_FLAGS.mjRND_IDCOLOR] = 1
        codes = self.rgb(data, camera, size) @ np.array([1, 256, 65536])
        flags[_FLAGS.mjRND_SEGMENT] = flags[_FLAGS.mjRND_IDCOLOR] = 0
        table = np.full(_MAX_GEOMS + 1, -1)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                table[geom.segid + 1] = geom.objid
        return table[codes]

    def close(self) -> None:
        """Free the image buffers and the OpenGL context; safe to call twice."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None

    def __del__(self) -> None:
        self.close()  # makes its own context current first; freeing in another one would corrupt its images
