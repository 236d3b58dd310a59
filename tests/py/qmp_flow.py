#!/usr/bin/env python3
"""Drives migrations with qemu.qmp: greeting, settings, events in order, the whole way, cancelling, refusals.

Usage: qmp_flow.py --vmferry PATH [--accel auto|kvm|soft] [--via tcp|unix]
Prints one line per case; the exit status is 0 only if all of them pass.
"""

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import traceback

from qemu.qmp import ExecuteError

from vm import Vm

MEM = "64M"
ENDS = ("completed", "failed", "cancelled")


class Case:
    """What a case gets: how to start processes, and where."""

    def __init__(self, options, directory):
        self.options = options
        self.directory = directory

    def _vm(self, role, *options):
        common = ("--mem", MEM, "--accel", self.options.accel)
        return Vm(self.options.vmferry, self.directory, role, *common, *options)

    def source(self, *options):
        """A VM with a running guest of 16 MiB that makes several passes per second."""
        workload = ("--working-set", "4M", "--fill", "12M", "--dirty-rate", "10000")
        return self._vm("source", *workload, *options)

    def target(self, role="target", incoming=None):
        """A VM that waits."""
        return self._vm(role, "--incoming", incoming or self.address(role))

    def address(self, role):
        """Where `role` is to listen."""
        return "tcp:127.0.0.1:0" if self.options.via == "tcp" else f"unix:{self.directory}/{role}.sock"


async def address_of(target):
    """Where a target says that it listens, as a URI."""
    info = await target.execute("query-migrate")
    where = info["socket-address"][0]
    return f"tcp:{where['host']}:{where['port']}" if where["type"] == "inet" else f"unix:{where['path']}"


async def refused(vm, part, command, **arguments):
    """The VM refuses, and its reason names `part`."""
    try:
        answer = await vm.execute(command, **arguments)
    except ExecuteError as error:
        answer = error.error.error
        assert part in answer.desc, f"{command}: {answer.desc!r} does not name {part!r}"
        return answer.class_
    raise AssertionError(f"{command} was not refused: {answer}")


async def events_on(vm):
    """Turns migration events on."""
    await vm.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])


async def running(source):
    """Waits until the guest runs, and forgets the event that said so."""
    await source.until("query-status", lambda s: s["running"])
    source.events.clear()


async def warm(source):
    """Waits until the guest has filled its memory and checks what it writes."""
    await running(source)
    await source.until("x-query-workload", lambda w: w["passes"] >= 2 and w["filled-pages"] == w["fill-pages"])


async def statuses_until(vm, last):
    """All events until the migration status `last`; names, with the status for MIGRATION."""
    seen = []
    while not seen or seen[-1] != last:
        name, data = await vm.event()
        seen.append(data["status"] if name == "MIGRATION" else name)
    return seen


async def greeting_and_queries(case):
    async with case.source() as vm:
        greeting = vm.qmp.greeting.QMP
        assert greeting.version["package"].startswith("vmferry "), greeting.version
        assert isinstance(greeting.version["qemu"]["major"], int)
        assert list(greeting.capabilities) == ["oob"]
        version = await vm.execute("query-version")
        assert version == greeting.version
        commands = {command["name"] for command in await vm.execute("query-commands")}
        assert {"migrate", "migrate_cancel", "query-migrate", "x-ram-hash"} <= commands
        status = await vm.until("query-status", lambda s: s["running"])
        assert status == {"running": True, "status": "running"}, status
        assert await vm.execute("query-name") == {"name": "source"}
        assert await refused(vm, "nonsense", "nonsense") == "CommandNotFound"
        assert await refused(vm, "over already", "qmp_capabilities") == "CommandNotFound"


async def stop_and_cont(case):
    async with case.source() as vm:
        await warm(vm)
        await refused(vm, "stopped", "x-ram-hash")
        await vm.execute("stop")
        assert (await vm.event())[0] == "STOP"
        assert await vm.execute("query-status") == {"running": False, "status": "paused"}
        first = await vm.execute("x-ram-hash")
        assert first == await vm.execute("x-ram-hash"), "memory changed while stopped"
        await vm.execute("stop")
        await vm.execute("cont")
        assert (await vm.event())[0] == "RESUME"
        before = (await vm.execute("x-query-workload"))["passes"]
        workload = await vm.until("x-query-workload", lambda w: w["passes"] > before + 1)
        assert workload["errors"] == 0, workload


async def settings_are_all_or_nothing(case):
    async with case.source() as vm:
        before = await vm.execute("query-migrate-parameters")
        assert before["multifd-channels"] == 2 and before["downtime-limit"] == 300
        set_parameters = "migrate-set-parameters"
        await refused(vm, "multifd-channels", set_parameters, downtime_limit=5, multifd_channels=0)
        await refused(vm, "not supported", set_parameters, downtime_limit=5, tls_creds="x")
        await refused(vm, "no migration parameter", set_parameters, downtime_limit=5, nonsense=1)
        assert await vm.execute("query-migrate-parameters") == before
        await vm.execute(set_parameters, multifd_channels=4, max_bandwidth=1 << 30)
        after = await vm.execute("query-migrate-parameters")
        assert after == before | {"multifd-channels": 4, "max-bandwidth": 1 << 30}

        wanted = [{"capability": "events", "state": True}, {"capability": "postcopy-ram", "state": True}]
        await refused(vm, "postcopy-ram", "migrate-set-capabilities", capabilities=wanted)
        capabilities = await vm.execute("query-migrate-capabilities")
        on = sorted(c["capability"] for c in capabilities if c["state"])
        assert on == ["multifd", "return-path"], on
        await refused(vm, "uri", "migrate")
        await refused(vm, "port", "migrate", uri="tcp:localhost")


async def migrate_with_events(case):
    async with case.target() as target, case.source() as source:
        await warm(source)
        await events_on(source)
        await events_on(target)
        # Slow enough to ask for another one on the way.
        await source.execute("migrate-set-parameters", multifd_channels=3, max_bandwidth=1 << 20, **{"x-verify": True})
        assert (await target.execute("query-status"))["status"] == "inmigrate"
        await source.execute("migrate", uri=await address_of(target))
        await refused(source, "under way", "migrate", uri="unix:/nowhere")
        await source.execute("migrate-set-parameters", max_bandwidth=0)

        seen = await statuses_until(source, "completed")
        passes = [name for name in seen if name == "MIGRATION_PASS"]
        rest = [name for name in seen if name != "MIGRATION_PASS"]
        assert rest in (
            ["setup", "active", "STOP", "device", "completed"],
            ["setup", "active", "device", "STOP", "completed"],
        ), seen
        assert passes and seen.index("MIGRATION_PASS") >= 1, seen
        there = await statuses_until(target, "completed")
        assert [s for s in there if s != "RESUME"][-2:] == ["active", "completed"], there
        if "RESUME" not in there:
            assert (await target.event())[0] == "RESUME"

        info = await source.execute("query-migrate")
        assert info["status"] == "completed" and info["x-connections"] == 3, info
        assert info["ram"]["remaining"] == 0 and info["ram"]["transferred"] >= 16 << 20, info
        blackout = dict(info["x-blackout"])
        assert blackout.pop("total-us") == sum(blackout.values()), info
        check = info["x-verification"]
        assert check["ram-hash-source"] == check["ram-hash-target"] and check["vcpus-equal"], check

        arrived = await target.execute("x-query-workload")
        later = await target.until("x-query-workload", lambda w: w["passes"] > arrived["passes"] + 2)
        assert later["errors"] == 0, later
        assert (await target.execute("query-status")) == {"running": True, "status": "running"}
        assert (await source.execute("query-status")) == {"running": False, "status": "postmigrate"}
        await refused(source, "", "cont")
        await refused(source, "handed over", "migrate", uri="unix:/nowhere")
        assert (await source.execute("query-status"))["running"] is False


async def deferred_incoming(case):
    async with case.target(incoming="defer") as target, case.source() as source:
        await warm(source)
        await refused(source, "", "migrate-incoming", uri=case.address("other"))
        await target.execute("migrate-incoming", uri=case.address("target"))
        await source.execute("migrate", uri=await address_of(target))
        info = await source.until("query-migrate", lambda i: i["status"] in ENDS)
        assert info["status"] == "completed", info
        status = await target.until("query-status", lambda s: s["running"])
        assert status["status"] == "running"


async def cancel_then_migrate(case):
    async with case.source() as source:
        await warm(source)
        await events_on(source)
        await source.execute("migrate_cancel")
        async with case.target("first") as target:
            # Slow enough to be caught in the act.
            await source.execute("migrate-set-parameters", max_bandwidth=1 << 20)
            await source.execute("migrate", uri=await address_of(target))
            await statuses_until(source, "active")
            await source.execute("migrate_cancel")
            seen = await statuses_until(source, "cancelled")
            assert "cancelling" in seen and "completed" not in seen, seen
            # As with QEMU, a target that lost its migration is of no use any more and ends.
            assert await target.ended() != 0, target.said()
        assert await source.execute("query-status") == {"running": True, "status": "running"}
        async with case.target("second") as target:
            await source.execute("migrate-set-parameters", max_bandwidth=0)
            await source.execute("migrate", uri=await address_of(target))
            await statuses_until(source, "completed")
            arrived = await target.execute("x-query-workload")
            later = await target.until("x-query-workload", lambda w: w["passes"] > arrived["passes"] + 2)
            assert later["errors"] == 0, later


async def failure_is_told(case):
    async with case.source() as source:
        await warm(source)
        await events_on(source)
        await source.execute("migrate", uri=f"unix:{case.directory}/nobody.sock")
        seen = await statuses_until(source, "failed")
        assert "failing" in seen, seen
        info = await source.execute("query-migrate")
        assert info["status"] == "failed" and "nobody.sock" in info["error-desc"], info
        assert (await source.execute("query-status"))["running"] is True


async def several_clients_and_quit(case):
    async with case.source() as vm:
        await running(vm)
        others = []
        for _ in range(5):
            other = Vm("", case.directory, "source")
            other.process = vm.process
            other.qmp.register_listener(other.events)
            await other.qmp.connect(vm.path)
            others.append(other)
        await others[0].execute("stop")
        for client in [vm, *others]:
            assert (await client.event())[0] == "STOP"
        # One that vanishes without a word.
        await others.pop().qmp.disconnect()
        await others[1].execute("quit")
        name, data = await vm.event()
        assert (name, data) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}), (name, data)
        assert await vm.ended() == 0, vm.said()


async def introspection_out_of_band_and_descriptors(case):
    async with case.source() as vm:
        await running(vm)
        schema = {entry["name"]: entry for entry in await vm.execute("query-qmp-schema")}
        commands = {name for name, entry in schema.items() if entry["meta-type"] == "command"}
        assert commands == {command["name"] for command in await vm.execute("query-commands")}

        def members(kind):
            return {member["name"]: schema[member["type"]] for member in schema[kind]["members"]}

        # As a management tool looks for what it may use.
        parameters = members(schema["migrate-set-parameters"]["arg-type"])
        assert set(parameters) >= set(await vm.execute("query-migrate-parameters"))
        assert parameters["multifd-channels"]["json-type"] == "int", parameters["multifd-channels"]
        capability = members(members(schema["migrate-set-capabilities"]["arg-type"])["capabilities"]["element-type"])
        listed = [entry["capability"] for entry in await vm.execute("query-migrate-capabilities")]
        assert capability["capability"]["values"] == listed

        # The library has enabled it, because the greeting offers it.
        assert await vm.qmp.execute("query-yank", oob=True) == []
        try:
            await vm.qmp.execute("query-status", oob=True)
            raise AssertionError("not refused")
        except ExecuteError as error:
            assert "out of band" in str(error), error

        reading, writing = os.pipe()
        vm.qmp.send_fd_scm(writing)
        os.close(writing)
        await vm.execute("getfd", fdname="pipe")
        await vm.execute("migrate", uri="fd:pipe")
        archive = await asyncio.get_running_loop().run_in_executor(None, open(reading, "rb").read)
        await vm.until("query-migrate", lambda m: m.get("status") == "completed")
        assert len(archive) > 12 << 20, len(archive)


CASES = [
    greeting_and_queries,
    stop_and_cont,
    settings_are_all_or_nothing,
    migrate_with_events,
    deferred_incoming,
    cancel_then_migrate,
    failure_is_told,
    several_clients_and_quit,
    introspection_out_of_band_and_descriptors,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmferry", required=True, metavar="PATH", help="the program to test")
    parser.add_argument("--accel", default="auto", choices=("auto", "kvm", "soft"))
    parser.add_argument("--via", default="tcp", choices=("tcp", "unix"))
    parser.add_argument("--case", action="append", metavar="NAME", help="only this one; may be repeated")
    options = parser.parse_args()
    # The library warns about lost connections, which some cases cause on purpose.
    logging.disable(logging.CRITICAL)
    failures = 0
    for case in CASES:
        if options.case and case.__name__ not in options.case:
            continue
        with tempfile.TemporaryDirectory(prefix="vmferry-py-") as directory:
            try:
                asyncio.run(asyncio.wait_for(case(Case(options, directory)), 300))
                print(f"ok    {case.__name__}", flush=True)
            except Exception:
                failures += 1
                print(f"FAIL  {case.__name__}", flush=True)
                traceback.print_exc()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
