"""Start a LeRobot policy in a process of LeRobot's environment, wait until it is ready, and stop it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import blm
from blm.serving.lerobot.client import EpisodePolicy
from blm.serving.lerobot.features import FeatureMap
from blm.serving.lerobot.server import KEY_VARIABLE
from blm.types import BlmError, Policy, PolicyContract

START_TIMEOUT_S = 900.0
"""Time that a policy may take to load [s]; large ones are read from slow disks."""
REPLY_TIMEOUT_S = 300.0
"""Time that one decision may take [s]: a large policy on a CPU."""
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
TAIL = 2000
"""Characters of the process's output that an error repeats."""
_START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("blm", sys.argv[1], submodule_search_locations=[sys.argv[2]])
sys.modules["blm"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["blm"])
from blm.serving.lerobot.server import main
main(sys.argv[3:])
"""
"""Program of the process. It finds this package, and no other package of our environment."""


class LeRobotProcess:
    """A LeRobot policy in a process of its own, while the `with` block lasts.

    All clients share the process and its weights. An error inside the block that follows from the
    end of the process becomes a BlmError with the end of the process's output.
    """

    def __init__(
        self,
        folder: Path,
        features: FeatureMap,
        *,
        python: Path,
        device: str = "cpu",
        start_timeout_s: float = START_TIMEOUT_S,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        """`python` is that of LeRobot's environment. Raises BlmError if it does not exist."""
        if not python.is_file():
            raise BlmError(
                f"no Python of LeRobot at '{python}': run 'sh scripts/lerobot.sh', or name another "
                "environment of LeRobot 0.4 with --lerobot-python"
            )
        self._folder, self._features, self._python, self._device = folder, features, python, device
        self._start_timeout_s, self._reply_timeout_s = start_timeout_s, reply_timeout_s
        self._key = secrets.token_hex(16)
        self._uri = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the process. Raises BlmError, with its output, if it ends or does not become ready."""
        with ExitStack() as stack:
            self._work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blm-lerobot-")))
            (self._work / "features.json").write_text(json.dumps(self._features.to_json()))
            log = stack.enter_context((self._work / "log").open("wb"))
            ready = self._work / "ready"
            self._process = subprocess.Popen(
                self._command(ready),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, KEY_VARIABLE: self._key, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for us; we end the process by closing its input
            )
            stack.callback(self._stop)
            self._uri = self._wait_until_ready(ready)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if isinstance(error, Exception) and self._has_ended():
                raise BlmError(f"{error}\n{self._ending()}") from error

    def _command(self, ready: Path) -> list[str]:
        package = Path(blm.__file__).parent
        program = [str(self._python.absolute()), "-c", _START, str(package / "__init__.py"), str(package)]
        options = [
            f"--features={self._work / 'features.json'}",
            f"--ready={ready}",
            f"--device={self._device}",
        ]
        return [*program, str(self._folder.resolve()), *options]

    def _has_ended(self) -> bool:
        """Return whether the process ended by itself; clients may notice it a moment before."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        return self._process.poll() is not None

    @property
    def contract(self) -> PolicyContract:
        """The contract of the policy."""
        policy = EpisodePolicy(self._uri, api_key=self._key, timeout_s=self._reply_timeout_s)
        policy.close()
        return policy.contract

    @property
    def make_policy(self) -> Callable[[], Policy]:
        """A picklable function that connects to the process, from any process of this machine."""
        return partial(EpisodePolicy, self._uri, api_key=self._key, timeout_s=self._reply_timeout_s)

    def _wait_until_ready(self, ready: Path) -> str:
        """Return the address of the server."""
        deadline = time.monotonic() + self._start_timeout_s
        while not ready.exists():
            if self._process.poll() is not None:
                raise BlmError(f"cannot load the LeRobot policy '{self._folder}': {self._ending()}")
            if time.monotonic() > deadline:
                raise BlmError(
                    f"the LeRobot policy '{self._folder}' was not ready after {self._start_timeout_s:g} s; "
                    f"{self._output()}"
                )
            time.sleep(POLL_S)
        return ready.read_text().strip()

    def _ending(self) -> str:
        return f"LeRobot's process ended with exit status {self._process.returncode}; {self._output()}"

    def _output(self) -> str:
        text = (self._work / "log").read_bytes().decode(errors="replace").strip()
        return f"the end of its output:\n{text[-TAIL:]}" if text else "it printed nothing"

    def _stop(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_TIMEOUT_S)
                return
