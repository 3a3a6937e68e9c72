"""A PostgreSQL server of a test's own, from the binaries that the system offers; not as root, which it refuses."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

OWNER = "postgres"


def binary(name: str) -> str | None:
    found = shutil.which(name)
    return found or next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


def missing() -> str | None:
    """Why there can be no server here, or None."""
    if not (binary("initdb") and binary("postgres")):
        return "PostgreSQL's initdb and postgres are not installed (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and not (shutil.which("setpriv") and _owner()):
        return f"root needs setpriv and a user {OWNER} to run PostgreSQL as"
    return None


def _owner() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(OWNER)
    except KeyError:
        return None


class Server:
    """A cluster in a temporary folder, reached through a socket there alone.

    Not in the test's folder: its parents belong to whoever runs the tests, and its path is too long for a socket.
    """

    def __init__(self) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="simba-pg-"))
        self._as: list[str] = []
        if os.getuid() == 0:
            owner = _owner()
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            self._as = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        self._run(binary("initdb"), "-D", str(folder / "data"), "-U", "lab", "-A", "trust", "--no-sync")
        self.process = self.start()

    def _run(self, *command: str) -> None:
        subprocess.run([*self._as, *command], check=True, capture_output=True, cwd=self.folder)

    def start(self) -> subprocess.Popen:
        # What these tests lose are clients and connections, never the machine: nothing has to wait for the disk.
        settings = ["-c", "listen_addresses=", "-c", "fsync=off"]
        command = ["-D", str(self.folder / "data"), "-k", str(self.folder), *settings]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*self._as, binary("postgres"), *command], cwd=self.folder, **quiet)
        self._until_ready()
        return process

    def _until_ready(self) -> None:
        import psycopg

        for _ in range(300):
            try:
                psycopg.connect(self.conninfo("postgres")).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise TimeoutError("PostgreSQL did not start")

    def conninfo(self, database: str) -> str:
        return f"host={self.folder} user=lab dbname={database}"

    def database(self, name: str) -> str:
        """Makes a database; returns its address for SQLAlchemy."""
        self.sql("postgres", f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://lab@/{name}?host={self.folder}"

    def sql(self, database: str, statement: str) -> list[tuple]:
        import psycopg

        with psycopg.connect(self.conninfo(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def cut_connections(self, database: str) -> int:
        """Kills every connection to ``database``, as an administrator or a failing network would."""
        rows = self.sql(
            "postgres", f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        )
        return len(rows)

    def stop(self) -> None:
        """At once, whoever is connected: SIGTERM would wait for them."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)
        shutil.rmtree(self.folder)


def server() -> Server:
    """A started server; skips the test, with its reason, where there can be none."""
    pytest.importorskip("psycopg")
    if reason := missing():
        pytest.skip(reason)
    return Server()
