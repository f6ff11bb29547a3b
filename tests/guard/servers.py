"""Real servers in a lab's world: HTTPS with HTTP/1.1 and HTTP/2, MariaDB, mail. What they received is read from themselves."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .lab import ROOT, Lab, until

PROGRAMS = Path(__file__).with_name("programs")
HTTPS_PORT, MYSQL_PORT, MAIL_PORT = 4443, 3306, 2525


class Server:
    """A process in the world, and the file that it prints to."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.folder = lab.folder / name
        self.folder.mkdir()
        self.out, self.errors = self.folder / "out", self.folder / "err"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str, env: dict[str, str] | None = None) -> None:
        with self.out.open("wb") as out, self.errors.open("wb") as errors:
            self._process = subprocess.Popen(self.lab.world.command(*command), stdout=out, stderr=errors, cwd=ROOT, env={**os.environ, **(env or {})})

    def said(self) -> str:
        assert self._process is not None, "it was started"
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.folder.name} ended: {self.errors.read_text(errors='replace')[-2000:]}")
        return self.out.read_text(errors="replace")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def certificate(self, name: str) -> tuple[str, str]:
        """A certificate of the lab's CA for `name`: paths of certificate and key."""
        pki = self.lab.folder / "pki"
        self.lab.kalium("pki", "issue", "--dir", str(pki), "--role", "server", "--name", name)
        return str(pki / f"{name}.crt"), str(pki / f"{name}.key")


class Https(Server):
    """HTTPS at `address`:4443 by `python`, which has the package h2."""

    def __init__(self, lab: Lab, address: str, name: str, *, python: Path, version: str = "", ciphers: str = "", port: int = HTTPS_PORT) -> None:
        super().__init__(lab, f"https-{address}-{port}")
        certificate, key = self.certificate(name)
        self.start(str(python), str(PROGRAMS / "https_server.py"), address, str(port), certificate, key, *filter(None, (version, ciphers)))
        until(lambda: "listening" in self.said(), "the HTTPS server")
        self._read = len(self.said().splitlines())

    def requests(self) -> list[dict[str, Any]]:
        """The requests since the last call."""
        lines = self.said().splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [json.loads(line) for line in new]


class MariaDB(Server):
    """MariaDB with TLS at `address`:3306 and its general log, which is the evidence of what arrived."""

    def __init__(self, lab: Lab, address: str, name: str, *, tls: bool = True) -> None:
        super().__init__(lab, "mariadb")
        data, user = self.folder / "data", pwd.getpwuid(os.getuid()).pw_name
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={data}",
                f"--user={user}",
                "--skip-test-db",
                "--auth-root-authentication-method=normal",
            ],
            capture_output=True,
            check=True,
        )
        setup = self.folder / "setup.sql"
        statements = (  # one a line, as --init-file wants it
            "CREATE DATABASE helloRetail",
            "USE helloRetail",
            "CREATE TABLE photos (id INT PRIMARY KEY, name VARCHAR(40))",
            "INSERT INTO photos VALUES (1, 'one')",
            "CREATE TABLE secrets (id INT)",
            "CREATE USER 'abc'@'%' IDENTIFIED BY 'xyz'",
            "GRANT ALL ON helloRetail.* TO 'abc'@'%'",
        )
        setup.write_text("".join(f"{statement};\n" for statement in statements), encoding="utf-8")
        self.log = self.folder / "general.log"
        certificate, key = self.certificate(name)
        secure = [f"--ssl-cert={certificate}", f"--ssl-key={key}", f"--ssl-ca={lab.folder / 'pki' / 'ca.crt'}"] if tls else ["--skip-ssl"]
        server = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
        where = [f"--datadir={data}", f"--user={user}", f"--bind-address={address}", f"--port={MYSQL_PORT}", f"--socket={self.folder / 'sock'}"]
        logs = ["--general-log=1", f"--general-log-file={self.log}", "--skip-log-bin"]
        self.start(server, "--no-defaults", *where, *logs, f"--init-file={setup}", "--innodb-buffer-pool-size=16M", "--skip-name-resolve", *secure)
        until(lambda: self.said() is not None and "ready for connections" in self.errors.read_text(errors="replace"), "MariaDB")

    def queries(self) -> str:
        """The statements in the general log, a line each; MariaDB writes one before it answers it."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(line for line in lines if re.search(r"\b(Query|Prepare|Execute)\t", line))


class Mail(Server):
    """The project's mail sink with STARTTLS at `address`:2525."""

    def __init__(self, lab: Lab, address: str, name: str) -> None:
        super().__init__(lab, "mail")
        certificate, key = self.certificate(name)
        self.maildir = self.folder / "maildir"
        config = self.folder / "config.json"
        config.write_text(
            json.dumps(
                {"listen": {"host": address, "port": MAIL_PORT}, "maildir": str(self.maildir), "tls": {"certificate": certificate, "key": key}}
            ),
            encoding="utf-8",
        )
        self.start(sys.executable, "-m", "kalium.cli.main", "mailsink", "serve", "--config", str(config))

        def listening() -> bool:
            self.said()
            try:
                lab.world.connect(address, MAIL_PORT, 1).close()
            except OSError:
                time.sleep(0.1)
                return False
            return True

        until(listening, "the mail sink")

    def mails(self) -> str:
        """All mails that arrived."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.maildir.rglob("*")) if path.is_file())
