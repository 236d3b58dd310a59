"""The monitor of a QEMU from 10.2 on, without a machine: in mode cpr-exec it really becomes the program that it is told.

As there, the status is `completed` before the exec and `failed` if that cannot be done, every program begins with its own parameters,
the state goes through a file, -S has the guest wait, and one client is served at a time.
"""

import argparse
import contextlib
import json
import os
import socket

# Looks at each status of the old program before the next.
LOOKS = 3
STATUSES = ["setup", "active", "device", "completed"]
VERSION = {"qemu": {"major": 10, "minor": 2, "micro": 0}, "package": ""}


class Monitor:
    def __init__(self, incoming, waits):
        self.file = incoming and incoming.removeprefix("file:")
        self.waits = waits
        self.guest = "inmigrate" if incoming else "paused" if waits else "running"
        self.before = None
        self.parameters = {"mode": "normal", "cpr-exec-command": []}
        self.migration = {}
        self.looks = None

    def answer(self, command, arguments):
        match command:
            case "query-qmp-schema":
                return [{"meta-type": "enum", "values": ["normal", "cpr-exec"]}]
            case "query-status":
                return {"status": self.guest, "running": self.guest == "running"}
            case "query-migrate-parameters":
                return self.parameters
            case "migrate-set-parameters":
                self.parameters.update(arguments)
            case "migrate":
                self.file = arguments["channels"][0]["addr"]["filename"]
                self.before = self.guest
                self.looks = 0
            case "query-migrate":
                self.look()
                return self.migration
            case "cont":
                self.guest = "running"
            case "stop":
                self.guest = "paused"
        return {}

    def look(self):
        if self.looks is not None:
            at = min(self.looks // LOOKS, len(STATUSES) - 1)
            self.migration = {"status": STATUSES[at]}
            self.looks += 1
            if STATUSES[at] == "completed":
                self.guest = "postmigrate"
        elif self.guest == "inmigrate":
            self.migration = {"status": "active"}

    def afterwards(self):
        """What the main loop does when the answer is on its way."""
        if self.looks == LOOKS * len(STATUSES):
            self.execute()
        elif self.migration.get("status") == "active" and self.looks is None:
            # Without the file this process ends, as it does there.
            with open(self.file) as file:
                ran = file.read() == "running"
            self.guest = "running" if ran and not self.waits else "paused"
            self.migration = {"status": "completed"}

    def execute(self):
        with open(self.file, "w") as file:
            file.write(self.before)
        command = self.parameters["cpr-exec-command"]
        try:
            os.execvp(command[0], command)
        except OSError as error:
            self.looks = None
            self.guest = self.before
            self.migration = {"status": "failed", "error-desc": f"execvp {command[0]}: {error.strerror}"}

    def serve(self, client):
        def say(message):
            client.write(json.dumps(message) + "\n")
            client.flush()

        say({"QMP": {"version": VERSION, "capabilities": []}})
        for line in client:
            asked = json.loads(line)
            say({"return": self.answer(asked["execute"], asked.get("arguments", {})), "id": asked.get("id")})
            if asked["execute"] == "quit":
                raise SystemExit
            self.afterwards()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("qmp")
    parser.add_argument("-S", action="store_true", dest="waits")
    parser.add_argument("-incoming")
    options = parser.parse_args()
    if os.path.exists(options.qmp):
        os.unlink(options.qmp)
    monitor = Monitor(options.incoming, options.waits)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(options.qmp)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            # Who leaves while it is told something is a client like others.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                with connection, connection.makefile("rw") as client:
                    monitor.serve(client)


main()
