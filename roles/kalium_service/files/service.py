#!/usr/bin/env python3
"""Bring one service to its description and wait until it answers: `service.py DESCRIPTION`; prints `changed` or `unchanged`.

DESCRIPTION is the JSON object that roles/kalium_service/tasks/main.yml makes. One description serves both managers: it becomes
a supervisor program or a systemd unit. The unit carries a revision, the hash of the description and of the content of `inputs`
(binaries, configurations, keys, the Python package's stamps), so a service is restarted when one of them changed and only
then, however the run before ended. A service that somebody stopped, or that died with the machine, is started.

"Ready" is asked of the service itself, by `ready`, until its deadline. If it never is, the error carries its answer and the end of its log.

Runs as root under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import hashlib
import json
import os
import subprocess
import sys
import time

POLL_SECONDS = 0.2
COMMAND_SECONDS_MAX = 120
LOG_LINES = 12
SYSTEM_SERVICE_SINCE = 239  # systemd's group of system calls @system-service
JOURNAL = "the journal"  # in the place of a log file
# As long as the supervisor lets a log become. systemd holds the file and appends to it, so it is emptied where it is and not moved away.
ROTATION = """\
# Written by roles/kalium_service.
%s {
    size 50M
    rotate 2
    copytruncate
    missingok
    notifempty
}
"""


def run(command, environment=None, seconds=COMMAND_SECONDS_MAX):
    """Exit status and merged output of `command`; 124 when it did not end in time, 127 when it could not be started."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
            timeout=seconds, env=dict(os.environ, LC_ALL="C", **(environment or {})),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "no answer within %d s" % seconds
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.strip()


def fail(code, attempted, found, next_step):
    sys.exit("error[%s]: %s: %s\nnext: %s" % (code, attempted, found, next_step))


def must(command, what):
    status, text = run(command)
    if status != 0:
        fail(
            "service.manager",
            "cannot " + what,
            "`%s` says: %s" % (" ".join(command), text),
            "see the log of the service manager, then run the same command again",
        )
    return text


def revision_of(service):
    """A hash that changes when the service has to be restarted."""
    keys = ("command", "user", "environment", "log", *(("writes", "hides", "confinement") if service["manager"] == "systemd" else ()))
    whole = hashlib.sha256(json.dumps({key: service[key] for key in keys}, sort_keys=True).encode())
    for path in service["inputs"]:
        try:
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            fail(
                "service.input",
                "cannot start " + service["name"],
                "%s: %s" % (path, error.strerror),
                "the role that makes this file has to run first: run site.yml",
            )
        whole.update(("\0%s\0%s" % (path, content)).encode())
    return whole.hexdigest()[:16]


def replaced(path, text):
    """Make `path` hold `text`; whether it did not."""
    try:
        with open(path) as file:
            if file.read() == text:
                return False
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)
    return True


def quoted(text):
    return '"%s"' % text.replace("\\", "\\\\").replace('"', '\\"')


def shell_words(words, percent="%"):
    """The command line in the quoting that both managers read, with `percent` standing for one percent sign."""
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-:=,@+%")
    return " ".join(word if word and set(word) <= plain else quoted(word) for word in words).replace("%", percent)


def systemd_version():
    """The number of the systemd that is installed; 0 when it does not say."""
    words = run(["systemctl", "--version"])[1].split()
    return int(words[1]) if words[:1] == ["systemd"] and words[1:2] and words[1].isdigit() else 0


def confinement(service, version):
    """The lines of a unit that say what it may do. Directives that an older systemd does not know it passes over, with a warning."""
    lines = []
    for name, value in sorted(service["confinement"].items()):
        if name == "SystemCallFilter" and version < SYSTEM_SERVICE_SINCE:
            continue  # it would take the unknown group for an empty one, and let nothing through
        if value is not None:
            lines += ["%s=%s" % (name, each) for each in (value if isinstance(value, list) else [value])]
    if service["writes"]:
        lines.append("ReadWritePaths=" + " ".join(map(quoted, service["writes"])))
    if service["hides"]:
        lines.append("InaccessiblePaths=" + " ".join(quoted("-" + path) for path in service["hides"]))
    return lines


class Supervisor:
    """Our own supervisord: a program is a file in `programs`."""

    def __init__(self, service):
        self.service = service
        self.control = [service["supervisorctl"], "-c", service["supervisor_conf"]]

    def text(self, revision):
        service = self.service
        environment = dict(service["environment"], KALIUM_REVISION=revision)
        return "\n".join([
            "; Written by roles/kalium_service.",
            "[program:%s]" % service["name"],
            "command=" + shell_words(service["command"], "%%"),
            "directory=/",
            "user=" + service["user"],
            "environment=" + ",".join("%s=%s" % (key, quoted(value).replace("%", "%%")) for key, value in sorted(environment.items())),
            "autostart=true",
            "autorestart=true",
            "startsecs=1",
            "startretries=20",
            "stopwaitsecs=%d" % service["stop_seconds"],
            "killasgroup=true",
            "redirect_stderr=true",
            "stdout_logfile=" + service["log"],
            "stdout_logfile_maxbytes=50MB",
            "stdout_logfile_backups=2",
            "",
        ])  # fmt: skip

    def apply(self, revision):
        name = self.service["name"]
        changed = replaced(os.path.join(self.service["supervisor_programs"], name + ".conf"), self.text(revision))
        # Also without a new file: the supervisor may not have read the last one, if the run before ended here.
        updated = must([*self.control, "update", name], "give %s to the supervisor" % name)
        state = run([*self.control, "status", name])[1].split()
        if len(state) < 2 or state[1] not in ("RUNNING", "STARTING"):
            status, text = run([*self.control, "start", name])
            if status != 0 and "already started" not in text:
                self.blame(text)
            changed = True
        return changed or bool(updated)

    def is_up(self):
        state = run([*self.control, "status", self.service["name"]])[1].split()
        return state[1:2] == ["RUNNING"], " ".join(state[1:])

    def blame(self, found):
        blame(self.service, found)


class Systemd:
    """The system's own manager: a unit in /etc/systemd/system."""

    def __init__(self, service):
        self.service = service
        self.unit = service["name"] + ".service"
        self.folders = "/etc/tmpfiles.d/%s.conf" % service["name"]
        self.rotation = "/etc/logrotate.d/" + service["name"]

    def text(self, revision):
        service = self.service
        environment = dict(service["environment"], KALIUM_REVISION=revision)
        return "\n".join([
            "# Written by roles/kalium_service.",
            "[Unit]",
            "Description=" + service["description"],
            "After=network.target",
            "# A service that cannot start yet, because its certificate is being renewed, say, is tried for ever.",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "ExecStart=" + shell_words(service["command"], "%%"),
            "User=" + service["user"],
            *["Environment=" + quoted("%s=%s" % pair).replace("%", "%%") for pair in sorted(environment.items())],
            "Restart=always",
            "RestartSec=1",
            "TimeoutStopSec=%d" % service["stop_seconds"],
            "KillMode=mixed",
            "LimitNOFILE=65536",
            "StandardOutput=append:" + service["log"],
            "StandardError=inherit",
            *confinement(service, systemd_version()),
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ])  # fmt: skip

    def running_revision(self):
        """The revision in the environment of the main process; None when it does not run."""
        pid = run(["systemctl", "show", "--property=MainPID", "--value", self.unit])[1]
        try:
            with open("/proc/%s/environ" % pid, "rb") as file:
                pairs = [pair.partition(b"=") for pair in file.read().split(b"\0")]
        except OSError:
            return None
        return next((value.decode() for key, _, value in pairs if key == b"KALIUM_REVISION"), None)

    def write(self, revision):
        return replaced("/etc/systemd/system/" + self.unit, self.text(revision))

    def apply(self, revision):
        changed = self.write(revision)
        if self.service["log"] != JOURNAL and os.path.isdir(os.path.dirname(self.rotation)):
            changed = replaced(self.rotation, ROTATION % self.service["log"]) or changed
        if self.service["run_folders"]:
            # A restart of the host empties /run, and systemd starts the service again before anybody runs Ansible.
            lines = ["d %s 0755 %s %s -\n" % (path, owner, owner) for path, owner in sorted(self.service["run_folders"].items())]
            changed = replaced(self.folders, "# Written by roles/kalium_service.\n" + "".join(lines)) or changed
        must(["systemctl", "daemon-reload"], "have systemd read its units")
        if run(["systemctl", "is-enabled", self.unit])[0] != 0:
            must(["systemctl", "enable", self.unit], "enable " + self.unit)
            changed = True
        if not self.is_up()[0] or self.running_revision() != revision:
            run(["systemctl", "reset-failed", self.unit])
            must(["systemctl", "restart", self.unit], "start " + self.unit)
            changed = True
        return changed

    def is_up(self):
        state = run(["systemctl", "is-active", self.unit])[1]
        return state == "active", state


class Unit(Systemd):
    """A unit that a package or another role wrote, which logs to the journal: it gets its revision by a drop-in."""

    def write(self, revision):
        text = "# Written by roles/kalium_service.\n[Service]\nEnvironment=KALIUM_REVISION=%s\n" % revision
        return replaced("/etc/systemd/system/%s.d/kalium.conf" % self.unit, text)


def blame(service, found):
    try:
        if service["log"] == JOURNAL:
            lines = run(["journalctl", "--no-pager", "--output=cat", "--lines=%d" % LOG_LINES, "--unit=" + service["name"]])[1].splitlines()
        else:
            with open(service["log"], errors="replace") as file:
                lines = file.readlines()
        tail = "\n".join("    " + line.rstrip() for line in lines[-LOG_LINES:])
    except OSError as error:
        tail = "    (%s)" % error
    fail(
        "service.not_ready",
        "cannot start " + service["name"],
        "%s\nthe end of %s:\n%s" % (found, service["log"], tail),
        "mend what the log says, then run the same command again",
    )


def wait_until_ready(service, manager):
    """Ask until the service says yes. A process that is up is not yet one that answers, and one that restarts is not up."""
    deadline = time.monotonic() + service["ready_seconds"]
    while True:
        is_up, state = manager.is_up()
        found = "its state is %s" % (state or "unknown")
        if is_up:
            status, text = run(service["ready"], service["ready_environment"], seconds=max(1, service["ready_seconds"]))
            if status == 0:
                return
            found = "it runs, but `%s` says: %s" % (" ".join(service["ready"]), text or "exit status %d" % status)
        if time.monotonic() > deadline:
            blame(service, "not ready after %d s; %s" % (service["ready_seconds"], found))
        time.sleep(POLL_SECONDS)


def main(description):
    service = json.loads(description)
    # Ansible before 2.19 renders numbers as text.
    service.update({key: int(service[key]) for key in ("ready_seconds", "stop_seconds")})
    manager = {"supervisor": Supervisor, "systemd": Systemd, "unit": Unit}[service["manager"]](service)
    changed = manager.apply(revision_of(service))
    wait_until_ready(service, manager)
    print("changed" if changed else "unchanged")


if __name__ == "__main__":
    main(sys.argv[1])
