"""Run the supervisor on a real arm: timing, threads, signals and shutdown.

The main thread only waits and decides. Observations, commands and requests to the policy have
separate threads, so that none of them can keep the loop from holding or stopping the arm.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from blm.runtime.arm import Arm, Reading
from blm.runtime.call_thread import CallThread
from blm.runtime.limits import Safety, StoppedError
from blm.runtime.link import PolicyLink, close_policy
from blm.runtime.log import RunLog
from blm.runtime.states import RunReport, State, StepInputs, StopReason
from blm.runtime.supervisor import Supervisor
from blm.runtime.watchdog import EStop, Watchdog
from blm.types import BlmError, FloatArray, Policy

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSE_S = 1.0
"""Timeout for each thread at the end of a run [s].

A thread that hangs longer is abandoned and logged.
"""
DISCONNECT_S = 10.0
"""Timeout of the robot's `disconnect` [s]."""
FINISH_S = 5.0
"""Timeout of a stop, added to twice the braking time [s].

The run then ends although the arm is not at rest.
"""
SENDING = 0.2
"""Share of a control period. When a call of send_action takes longer, the command counts as sent
this much before its end: it is unknown when within the call the arm received it, and the next one
must not be early."""
OnStop = Callable[[str, str], None]
"""Receives the kind and the reason of a stop."""


class Driver:
    """Drives one arm from one policy. `run` may be called again after it has ended."""

    def __init__(
        self,
        arm: Arm,
        make_policy: Callable[[], Policy],
        instruction: str,
        *,
        safety: Safety | None = None,
        log: RunLog | None = None,
        estop: EStop | None = None,
        on_stop: OnStop | None = None,
    ) -> None:
        """Connect to the policy and check it against the robot; nothing moves.

        `make_policy` connects, also after a loss. `estop` returns True when the arm must stop; it
        is polled every control period in a separate thread. `on_stop(kind, reason)` is called at
        the end of a run. Raises BlmError, mostly ContractError, if policy and robot do not match.
        """
        self.make_policy, self.instruction = make_policy, instruction
        self.safety, self.log = safety or Safety(), log or RunLog()
        self.estop, self.on_stop, self.report = estop, on_stop, RunReport()
        self._notified, self._notify_lock = False, threading.Lock()
        require_torque(arm, self.safety)
        self._policy: Policy | None = make_policy()
        try:
            arm.limits.check_contract(self._policy.contract, accept_wider=self.safety.accept_wider_limits)
            self.arm = arm.fitted(self._policy.contract)
        except BaseException:
            close_policy(self._policy)
            raise

    def run(self, seconds: float, *, seed: int = 0) -> RunReport:
        """Follow the policy for `seconds`, not counting holds.

        Signals are handled in the main thread only. Raises StoppedError if the run ends for another
        reason. In every case the arm keeps holding its last command and is disconnected.
        """
        policy, self._policy = self._policy or self.make_policy(), None
        self._notified = False
        try:
            supervisor = Supervisor(
                self.arm.limits,
                policy.contract,
                self.instruction,
                safety=self.safety,
                log=self.log,
                seconds=seconds,
                seed=seed,
            )
            policy.reset()
        except BaseException:
            close_policy(policy)
            raise
        self.report, reader = supervisor.report, CallThread("blm-reader")
        try:
            reader.submit(self.arm.robot.connect).result()
            run = _Run(self, supervisor, policy, reader)
        except BaseException:
            close_policy(policy)
            self._disconnect(reader)
            raise
        with handled_signals(run.request_stop):
            try:
                run.drive()
            finally:
                run.close()
                self._disconnect(reader)
        if self.report.kind != "finished":
            raise StoppedError(self.report.kind, self.report.reason) from run.error
        return self.report

    def notify_stop(self, kind: str, reason: str) -> None:
        """Call the user's `on_stop`, once per run, without failing or delaying its end."""
        with self._notify_lock:
            if self.on_stop is None or self._notified:
                return
            self._notified = True
        self._bounded("on_stop", partial(self.on_stop, kind, reason), CLOSE_S, CallThread("blm-on-stop"))

    def _disconnect(self, reader: CallThread) -> None:
        """Call `on_stop`, then disconnect in the thread of the robot, unless it hangs."""
        if self.report.kind:
            self.notify_stop(self.report.kind, self.report.reason)
        worker = reader if reader.wait_idle(CLOSE_S) else CallThread("blm-disconnect")
        self._bounded("disconnect", self.arm.robot.disconnect, DISCONNECT_S, worker)
        if not reader.close(CLOSE_S):
            self.log.write("thread left behind", time.monotonic(), thread="reader")

    def _bounded(self, what: str, call: Callable[[], Any], timeout_s: float, worker: CallThread) -> None:
        """Run the user's code with a timeout; failures are logged and do not end the run."""
        try:
            worker.submit(call).result(timeout_s)
        except Exception as error:
            self.log.write(f"{what} failed", time.monotonic(), error=repr(error))
        finally:
            worker.close(0.1)


class _Run:
    """The threads and steps of one run."""

    def __init__(self, driver: Driver, supervisor: Supervisor, policy: Policy, reader: CallThread) -> None:
        self.arm, self.safety, self.log = driver.arm, driver.safety, driver.log
        self.supervisor, self.period = supervisor, driver.arm.limits.period
        self.error: BaseException | None = None
        self._reader, self._sender = reader, CallThread("blm-sender")
        self._bus = threading.Lock()
        self._link = PolicyLink(policy, driver.make_policy)
        self._watchdog = Watchdog(
            period_s=min(self.period, 0.05),
            stall_s=self.safety.stall_s,
            estop=driver.estop,
            on_stall=partial(
                driver.notify_stop, "stalled", "the loop has stalled; no more commands are sent"
            ),
        )
        self._reading: Future[Reading] | None = None
        self._sending: Future[float] | None = None
        self._asked_to_stop: StopReason | None = None
        self._read_s, self._next = 0.0, time.monotonic()

    def request_stop(self, kind: str, reason: str) -> None:
        """Stop at the next step; safe in a signal handler."""
        self._asked_to_stop = self._asked_to_stop or (kind, reason)

    def drive(self) -> None:
        """Run steps until the supervisor has stopped."""
        finish_s = FINISH_S + 2 * self.arm.limits.stopping_s
        stopped_at: float | None = None
        while self.supervisor.state is not State.STOPPED:
            try:
                self._one_step()
            except Exception as error:
                self.error = error
                self.supervisor.stop("internal", f"the loop failed: {error!r}")
                time.sleep(self.period)
            wanted = self.supervisor.stopping
            stopped_at = stopped_at or (time.monotonic() if wanted else None)
            if stopped_at is not None and time.monotonic() - stopped_at > finish_s:
                self.supervisor.abandon("stopped", "the arm did not come to rest")
        self._settle_sending(self.safety.send_stop_s)

    def close(self) -> None:
        """End all threads except the reader's; one that hangs is abandoned and logged."""
        ended = {
            "sender": self._sender.close(CLOSE_S),
            "policy": self._link.close(2 * CLOSE_S),
            "watchdog": self._watchdog.close(CLOSE_S),
        }
        for name, well in ended.items():
            if not well:
                self.log.write("thread left behind", time.monotonic(), thread=name)

    def _one_step(self) -> None:
        """Read just before a command is due, so that the decision uses the newest observation."""
        sleep_until(self._next - min(1.2 * self._read_s + 0.002, 0.8 * self.period))
        if self._reading is None:
            self._reading = self._reader.submit(partial(self._read, time.monotonic()))
        sleep_until(self._next)
        self._watchdog.beat()
        stop = self._asked_to_stop or self._watchdog.stop
        if self._stalled():
            return
        reading, error = self._take_reading()
        can_ask = self._link.can_ask
        self._settle_sending(0.0)
        decision = self.supervisor.step(
            StepInputs(
                now=time.monotonic(),
                reading=reading,
                read_error=error,
                events=self._link.poll(),
                stop=stop,
                can_send=self._sending is None,
                can_ask=can_ask,
            )
        )
        if self._stalled():  # the loop stalled within the step, so its command is outdated
            return
        if decision.command is not None:
            self._sending = self._sender.submit(partial(self._send, decision.command))
            self._settle_sending(self.period / 2)
        if decision.request is not None:
            self._link.ask(decision.request)
        now, due = time.monotonic(), self.supervisor.due
        self._next = due if due > now else now + self.period

    def _stalled(self) -> bool:
        """Whether the watchdog found the loop stalled; then no more commands are sent."""
        if self._watchdog.stalled.is_set():
            self.supervisor.abandon(*(self._watchdog.stop or ("stalled", "the loop did not run")))
        return self._watchdog.stalled.is_set()

    def _read(self, begun: float) -> Reading:
        with self._bus:
            reading = self.arm.read(begun)
        self._read_s = time.monotonic() - begun
        return reading

    def _take_reading(self) -> tuple[Reading | None, str | None]:
        if self._reading is None or not self._reading.done():
            return None, None
        reading, self._reading = self._reading, None
        if (error := reading.exception()) is not None:
            return None, f"{type(error).__name__}: {str(error)[:300]}"
        return reading.result(), None

    def _send(self, command: FloatArray) -> float:
        """Send when the bus is free, or at a timeout; return the time of sending [s]."""
        free = self._bus.acquire(timeout=self.safety.observation_hold_s)
        begun = time.monotonic()
        try:
            self.arm.send(command)
        finally:
            if free:
                self._bus.release()
        return max(begun, time.monotonic() - SENDING * self.period)

    def _settle_sending(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the command that is being sent, and report its result."""
        if self._sending is None:
            return
        try:
            error = self._sending.exception(timeout_s)
        except TimeoutError:
            return
        done, self._sending = self._sending, None
        if error is None:
            self.supervisor.delivered(done.result())
        else:
            self.supervisor.delivered(time.monotonic(), f"{type(error).__name__}: {str(error)[:300]}")


def sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.monotonic()))


@contextmanager
def handled_signals(request_stop: Callable[[str, str], None]) -> Iterator[None]:
    """Let SIGTERM and SIGINT stop the arm, then restore the previous handlers. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        request_stop("signal", f"{signal.Signals(number).name} received")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def require_torque(arm: Arm, safety: Safety) -> None:
    """Raise BlmError for a LeRobot arm that is configured to go limp when it disconnects."""
    config = getattr(arm.robot, "config", None)
    if getattr(config, "disable_torque_on_disconnect", False) is True and not safety.accept_torque_off:
        raise BlmError(
            "this robot goes limp when it is disconnected: set disable_torque_on_disconnect=False in its "
            "config, or Safety(accept_torque_off=True) if it may fall"
        )
