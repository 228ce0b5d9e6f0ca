"""A real server process on a real port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """Starts a server, waits until it is ready, and stops it with SIGTERM.

    By default `ryzanstein serve` on a model folder; `module` runs another entry point.
    """

    def __init__(
        self, *arguments: str, module: str = "server.cli", env: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", module]
        if module == "server.cli":
            command += ["serve", "--port", "0", "--set", "batches.enabled=false"]
        self.log = ""
        self.status = 0
        """With which it is to exit."""
        self._process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"COLUMNS": "200"} | (env or {}),
        )
        self.url = ""
        # A pipe that nobody reads would hold the server up once it is full.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self.log += line

    def __enter__(self) -> ServerProcess:
        try:
            return self._await_ready()
        except BaseException:
            self._process.kill()
            self.wait()
            raise

    def _await_ready(self) -> ServerProcess:
        while not (found := re.search(r"address +(http://\S+)", self.log)):
            if not self._reader.is_alive():
                raise AssertionError(f"the server did not start:\n{self.log}")
            time.sleep(0.02)
        self.url = found[1]
        for _ in range(200):
            if httpx.get(f"{self.url}/health/ready").status_code == 200:
                return self
            time.sleep(0.05)
        raise AssertionError("the server does not become ready")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.terminate()
        code = self.wait()
        if kind is None:
            assert code == self.status, self.log

    def wait_for(self, text: str) -> str:
        """The log up to a line with `text`."""
        while text not in self.log:
            assert self._reader.is_alive(), self.log
            time.sleep(0.02)
        return self.log

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """As a machine would that loses its power."""
        self.status = -signal.SIGKILL
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float = 30) -> int:
        """The exit status, with the rest of the log read."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._reader.join()
        assert "leaked" not in self.log, "nobody who stops a server wants a list of its objects"
        return self._process.returncode

    def metric(self, name: str) -> float:
        """One sample of `/metrics`."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{name} is not in\n{text}"
        return float(found[1])

    def wait_for_metric(self, name: str, least: float, seconds: float = 20) -> None:
        """Wait until a sample of `/metrics` is `least` or more."""
        end = time.monotonic() + seconds
        while (value := self.metric(name)) < least:
            assert time.monotonic() < end, f"{name} is {value}, not {least}, after {seconds} s"
            time.sleep(0.005)

    def held(self) -> tuple[int, int]:
        """Open descriptors, and tasks of the event loop (of the mock server)."""
        descriptors = len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))
        return descriptors, httpx.get(f"{self.url}/test/tasks").json()

    def idle(self, seconds: float = 10) -> bool:
        """Whether every sequence ends and every page comes back within `seconds`."""
        end = time.monotonic() + seconds
        names = ("requests_running", "requests_waiting", "kv_pages_used")
        while time.monotonic() < end:
            if all(self.metric(f"ryzanstein_{name}") == 0 for name in names):
                return True
            time.sleep(0.02)
        return False
