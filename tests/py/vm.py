"""A vmferry process under test, driven with qemu.qmp, the client library of QEMU's own tools."""

import asyncio
import contextlib
import os
import subprocess

from qemu.qmp import EventListener, QMPClient, QMPError

# Far longer than anything here takes; a test that needs it hangs.
PATIENCE_S = 60


class Vm:
    """One `vmferry run` and a QMP connection to it. Use it with `async with`; it is gone at the end in any case."""

    def __init__(self, program, directory, role, *options):
        self.role = role
        self.path = os.path.join(directory, role + ".qmp")
        self.log = os.path.join(directory, role + ".log")
        self.command = [program, "run", "--qmp", self.path, "--name", role, *options]
        self.process = None
        self.qmp = QMPClient(role)
        self.events = EventListener()

    async def __aenter__(self):
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            await self._connect()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _connect(self):
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.role} did not start: {self.said()}")
            # The client says something on its logger about every failed attempt.
            if os.path.exists(self.path):
                with contextlib.suppress(QMPError):
                    self.qmp.register_listener(self.events)
                    await self.qmp.connect(self.path)
                    return
                self.qmp = QMPClient(self.role)
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"{self.role} does not answer: {self.said()}")
            await asyncio.sleep(0.01)

    async def __aexit__(self, *_):
        with contextlib.suppress(Exception):
            await self.qmp.disconnect()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def said(self):
        """What the process wrote."""
        with open(self.log, errors="replace") as log:
            return log.read()

    async def execute(self, command, **arguments):
        """Executes a command; underscores in argument names stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await asyncio.wait_for(self.qmp.execute(command, named or None), PATIENCE_S)

    async def event(self):
        """The next event, as (name, data)."""
        event = await asyncio.wait_for(self.events.get(), PATIENCE_S)
        stamp = event["timestamp"]
        assert 0 <= stamp["microseconds"] < 1_000_000 and stamp["seconds"] > 1_600_000_000
        return event["event"], event.get("data", {})

    async def until(self, command, wanted):
        """Asks `command` until `wanted` likes the answer, and returns that."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not wanted(answer := await self.execute(command)):
            assert asyncio.get_running_loop().time() < deadline, f"{self.role} {command}: {answer}"
            await asyncio.sleep(0.02)
        return answer

    async def ended(self):
        """Waits for the process to end by itself; returns its exit status."""
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), PATIENCE_S)
