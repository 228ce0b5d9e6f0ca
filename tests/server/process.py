"""A real server process on a real port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
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
            command += ["serve", "--port", "0"]
        self.log = ""
        self._process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"COLUMNS": "200"} | (env or {}),
        )
        self.url = ""

    def __enter__(self) -> ServerProcess:
        try:
            return self._await_ready()
        except BaseException:
            self._process.kill()
            self._process.communicate()
            raise

    def _await_ready(self) -> ServerProcess:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log += line
            if found := re.search(r"address +(http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError(f"the server did not start:\n{self.log}")
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
            assert code == 0, self.log

    def wait_for(self, text: str) -> str:
        """The log up to a line with `text`."""
        assert self._process.stderr is not None
        while text not in self.log:
            line = self._process.stderr.readline()
            assert line, self.log
            self.log += line
        return self.log

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 30) -> int:
        """The exit status, with the rest of the log read."""
        try:
            _, rest = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self.log += rest or ""
        return self._process.returncode

    def metric(self, name: str) -> float:
        """One sample of `/metrics`."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{name} is not in\n{text}"
        return float(found[1])

    def idle(self, seconds: float = 10) -> bool:
        """Whether every sequence ends and every page comes back within `seconds`."""
        end = time.monotonic() + seconds
        names = ("requests_running", "requests_waiting", "kv_pages_used")
        while time.monotonic() < end:
            if all(self.metric(f"ryzanstein_{name}") == 0 for name in names):
                return True
            time.sleep(0.02)
        return False
