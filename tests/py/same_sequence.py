#!/usr/bin/env python3
"""One client, two VMMs: the same steps with vmferry and with QEMU, and the same MIGRATION events in the same order.

Usage: same_sequence.py --vmferry PATH [--qemu PATH] [--accel auto|kvm|soft] [--only vmferry|qemu] [--case NAME]
Needs QEMU 10 or later. Prints a line per case and VMM with the statuses seen; the exit status is 0 only if all cases pass and
both VMMs gave the same sequences.

Each case drives source and target through nothing but QMP, notes the statuses of the MIGRATION events of each side, and says what
they have to be. The case does not know which VMM it drives. Where vmferry differs on purpose, DELIBERATE says so.
"""

import argparse
import asyncio
import logging
import re
import subprocess
import sys
import tempfile
import traceback

from qemu.qmp import ExecuteError

from vm import PATIENCE_S, Vm

# What vmferry does otherwise than the QEMU that is compared with, on purpose. A difference that is not here fails.
DELIBERATE = {
    "failing": "vmferry always passes through `failing` while it cleans up, as QEMU does from version 11 on; older ones go straight "
    "to `failed`, and show that before the cleanup is over",
}

MEM_MIB = 128
SLOW = 1 << 20
QEMU_MACHINE = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on"


class Pair:
    """A source with a running guest and a target that waits to be told where to listen."""

    def __init__(self, shows_failing, source, target, directory):
        self.shows_failing = shows_failing
        self.source = source
        self.target = target
        self.address = f"unix:{directory}/migration.sock"
        self.seen = {"source": [], "target": []}

    async def prepare(self, *capabilities, **parameters):
        """Both sides get the same capabilities, the source the parameters; then the target listens."""
        wanted = [{"capability": name, "state": True} for name in ("events", "multifd", *capabilities)]
        for vm in (self.source, self.target):
            await vm.execute("migrate-set-capabilities", capabilities=wanted)
            on = {c["capability"] for c in await vm.execute("query-migrate-capabilities") if c["state"]}
            assert {"events", "multifd", *capabilities} <= on, on
        for vm in (self.source, self.target):
            await vm.execute("migrate-set-parameters", multifd_channels=3)
        await self.source.execute("migrate-set-parameters", downtime_limit=500, **parameters)
        now = await self.source.execute("query-migrate-parameters")
        expected = {name.replace("_", "-"): value for name, value in parameters.items()}
        expected |= {"downtime-limit": 500, "multifd-channels": 3}
        assert expected.items() <= now.items(), now
        await self.target.execute("migrate-incoming", uri=self.address)

    async def migrate(self, uri=None):
        await self.source.execute("migrate", uri=uri or self.address)

    async def until(self, side, wanted):
        """Notes MIGRATION events of a side up to the status `wanted`."""
        vm, seen = getattr(self, side), self.seen[side]
        while wanted not in seen:
            name, data = await vm.event()
            if name == "MIGRATION":
                seen.append(data["status"])
            else:
                assert name in ("STOP", "RESUME", "MIGRATION_PASS"), (name, data)

    async def refused(self, command, **arguments):
        try:
            answer = await self.source.execute(command, **arguments)
        except ExecuteError as error:
            assert error.error.error.class_ == "GenericError", error
            return
        raise AssertionError(f"{command} was not refused: {answer}")

    async def assert_runs(self, side, runs):
        status = await getattr(self, side).until("query-status", lambda s: s["running"] == runs)
        return status["status"]

    def statuses(self):
        """Both sides, without what is different on purpose."""
        return {side: [s for s in seen if s not in DELIBERATE] for side, seen in self.seen.items()}


async def a_whole_migration(pair):
    await pair.prepare(max_bandwidth=1 << 30)
    await pair.migrate()
    await pair.refused("migrate", uri="unix:/nowhere")
    await pair.until("source", "completed")
    await pair.until("target", "completed")
    info = await pair.source.execute("query-migrate")
    assert info["status"] == "completed" and info["ram"]["transferred"] > 0, info
    assert info["ram"]["remaining"] == 0 and info["total-time"] >= info["downtime"], info
    assert await pair.assert_runs("target", True) == "running"
    assert await pair.assert_runs("source", False) == "postmigrate"
    return {
        "source": ["setup", "active", "device", "completed"],
        "target": ["setup", "active", "completed"],
    }


async def a_cancel_while_pages_move(pair):
    await pair.prepare(max_bandwidth=SLOW)
    await pair.migrate()
    await pair.until("source", "active")
    await pair.source.until("query-migrate", lambda i: i.get("ram", {}).get("transferred", 0) > 0)
    # Settings are refused while it runs.
    await pair.refused("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": False}])
    await pair.source.execute("migrate_cancel")
    await pair.until("source", "cancelled")
    assert (await pair.source.execute("query-migrate"))["status"] == "cancelled"
    assert await pair.assert_runs("source", True) == "running"
    # Nothing to cancel is no error.
    await pair.source.execute("migrate_cancel")
    # The target ends with its migration; what it still says is a matter of luck.
    assert await pair.target.ended() != 0
    return {"source": ["setup", "active", "cancelling", "cancelled"], "target": []}


async def a_pause_before_the_switchover(pair):
    await pair.prepare("pause-before-switchover", max_bandwidth=1 << 30)
    await pair.refused("migrate-continue", state="pre-switchover")
    await pair.migrate()
    await pair.until("source", "pre-switchover")
    assert (await pair.source.execute("query-migrate"))["status"] == "pre-switchover"
    await pair.assert_runs("source", False)
    await pair.refused("migrate-continue", state="device")
    await pair.source.execute("migrate-continue", state="pre-switchover")
    await pair.until("source", "completed")
    await pair.until("target", "completed")
    assert await pair.assert_runs("target", True) == "running"
    return {
        "source": ["setup", "active", "pre-switchover", "device", "completed"],
        "target": ["setup", "active", "completed"],
    }


async def a_cancel_before_the_switchover(pair):
    await pair.prepare("pause-before-switchover", max_bandwidth=1 << 30)
    await pair.migrate()
    await pair.until("source", "pre-switchover")
    await pair.source.execute("migrate_cancel")
    await pair.until("source", "cancelled")
    # It ran before, so it runs again.
    assert await pair.assert_runs("source", True) == "running"
    return {"source": ["setup", "active", "pre-switchover", "cancelling", "cancelled"], "target": []}


async def nobody_there_and_then_a_second_attempt(pair):
    await pair.prepare(max_bandwidth=1 << 30)
    await pair.migrate(uri="unix:/nowhere/migration.sock")
    await pair.until("source", "failed")
    # The one deliberate difference, and it has to be there.
    assert ("failing" in pair.seen["source"]) == pair.shows_failing, pair.seen
    info = await pair.source.until("query-migrate", lambda i: i["status"] == "failed")
    assert "/nowhere" in info["error-desc"] or "connect" in info["error-desc"], info
    assert await pair.assert_runs("source", True) == "running"
    await pair.migrate()
    await pair.until("source", "completed")
    await pair.until("target", "completed")
    assert await pair.assert_runs("target", True) == "running"
    return {
        "source": ["setup", "failed", "setup", "active", "device", "completed"],
        "target": ["setup", "active", "completed"],
    }


async def a_paused_guest_stays_paused(pair):
    await pair.prepare(max_bandwidth=1 << 30)
    await pair.source.execute("stop")
    await pair.migrate()
    await pair.until("source", "completed")
    await pair.until("target", "completed")
    assert await pair.assert_runs("target", False) == "paused"
    await pair.target.execute("cont")
    assert await pair.assert_runs("target", True) == "running"
    return {
        "source": ["setup", "active", "device", "completed"],
        "target": ["setup", "active", "completed"],
    }


CASES = [
    a_whole_migration,
    a_cancel_while_pages_move,
    a_pause_before_the_switchover,
    a_cancel_before_the_switchover,
    nobody_there_and_then_a_second_attempt,
    a_paused_guest_stays_paused,
]


class Vmferry:
    """How VMs of vmferry are made."""

    name = "vmferry"
    shows_failing = True

    def __init__(self, options):
        self.program = options.vmferry
        self.accel = options.accel

    def vm(self, directory, role, *more):
        command = [self.program, "run", "--mem", f"{MEM_MIB}M", "--accel", self.accel]
        vm = Vm(self.program, directory, role)
        vm.command = [*command, "--qmp", vm.path, *more]
        return vm

    def source(self, directory):
        return self.vm(directory, "source", "--working-set", "4M", "--fill", "16M", "--dirty-rate", "1000")

    def target(self, directory):
        return self.vm(directory, "target", "--incoming", "defer")


class Qemu:
    """How VMs of QEMU are made: the same guest, emulated, so that it runs on every host."""

    name = "qemu"

    def __init__(self, options):
        self.program = options.qemu
        self.shows_failing = (qemu_version(self.program) or [0]) >= [11]
        self.directory = tempfile.TemporaryDirectory(prefix="vmferry-py-image-")
        self.image = f"{self.directory.name}/workload.elf"
        image = ["workload-image", "--mem", f"{MEM_MIB}M", "--working-set", "4M", "--fill", "16M", "--dirty-rate", "1000"]
        image += ["--tsc-khz", "2000000", "-o", self.image]
        subprocess.run([options.vmferry, *image], check=True, stdout=subprocess.DEVNULL)

    def vm(self, directory, role, *more):
        vm = Vm(self.program, directory, role)
        vm.command = [self.program, "-M", QEMU_MACHINE, "-accel", "tcg", "-cpu", "qemu64", "-m", str(MEM_MIB), "-nodefaults"]
        vm.command += ["-no-reboot", "-display", "none", "-kernel", self.image]
        vm.command += ["-qmp", f"unix:{vm.path},server=on,wait=off", *more]
        return vm

    def source(self, directory):
        return self.vm(directory, "source")

    def target(self, directory):
        return self.vm(directory, "target", "-incoming", "defer")


def qemu_version(program):
    """As a list of numbers; None where there is none."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"version (\d+)\.(\d+)", said)
    return [int(number) for number in found.groups()] if found else None


async def run(case, kind, directory):
    """The statuses that both sides have gone through."""
    async with kind.target(directory) as target, kind.source(directory) as source:
        await source.until("query-status", lambda s: s["running"])
        source.events.clear()
        pair = Pair(kind.shows_failing, source, target, directory)
        expected = await case(pair)
        seen = pair.statuses()
        if not expected["target"]:
            seen["target"] = []
        assert seen == expected, f"{kind.name}: {seen}, expected {expected}"
        return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmferry", required=True, metavar="PATH", help="the program to test")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH", help="the program to compare with")
    parser.add_argument("--accel", default="auto", choices=("auto", "kvm", "soft"), help="for vmferry")
    parser.add_argument("--only", choices=("vmferry", "qemu"), help="one VMM only; compares nothing")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this one; may be repeated")
    options = parser.parse_args()
    version = qemu_version(options.qemu)
    if options.only != "vmferry" and (version is None or version < [10, 0]):
        print(f"SKIPPED: QEMU 10 or later is needed, here is {version or 'none'}; .ci/packages installs it")
        return 0
    # The library warns about lost connections, which some cases cause on purpose.
    logging.disable(logging.CRITICAL)
    kinds = [kind(options) for kind in (Qemu, Vmferry) if options.only in (None, kind.name)]
    failures = 0
    for case in CASES:
        if options.case and case.__name__ not in options.case:
            continue
        found = []
        for kind in kinds:
            with tempfile.TemporaryDirectory(prefix="vmferry-py-") as directory:
                try:
                    found.append(asyncio.run(asyncio.wait_for(run(case, kind, directory), 5 * PATIENCE_S)))
                    print(f"ok    {case.__name__} {kind.name} {found[-1]}", flush=True)
                except Exception:
                    failures += 1
                    print(f"FAIL  {case.__name__} {kind.name}", flush=True)
                    traceback.print_exc()
        if len(found) == 2 and found[0] != found[1]:
            failures += 1
            print(f"FAIL  {case.__name__}: {kinds[0].name} {found[0]}, {kinds[1].name} {found[1]}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
