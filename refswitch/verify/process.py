# May import: standard library, numpy, safetensors, refswitch.verify.case, refswitch.errors.
"""The judge's side of an adapter's process: start it, hand it a case, wait no longer than the deadline.

An adapter is somebody else's program. Whatever it does to its own process is one `AdapterFailure` here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refswitch.verify.case import MUTATED, Case, write_case

# Idle OpenMP threads that spin slow a machine of few cores down by an order of magnitude. Waiting has no part in any result.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


class AdapterFailure(Exception):
    """The adapter could not be run: one line that says why."""


class AdapterMissing(Exception):
    """A package that the adapter requires is not installed."""


class AdapterProcess:
    """One adapter in a process of its own; a context manager that ends the process.

    Attributes
    ----------
    adapters : list of dict
        What the file declares: label, dialect, profile, features, limits.
    import_seconds : float
        How long the adapter's own imports took.
    """

    def __init__(self, path: Path, name: str, deadline: float) -> None:
        self.path, self.deadline = path, deadline
        self._folder = tempfile.TemporaryDirectory(prefix="refswitch-")
        self._captured = (Path(self._folder.name) / "captured.txt").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refswitch.verify.child", str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._captured,
            env={**PATIENT, **os.environ},
            text=True,
            encoding="utf-8",
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._calls = 0
        try:
            reply = self._wait("to be imported")
            if "not_run" in reply:
                raise AdapterMissing(reply["not_run"])
            self._raise_if_error(reply)
        except BaseException:
            self.close()
            raise
        self.adapters: list[dict[str, Any]] = reply["adapters"]
        self.import_seconds = float(reply["seconds"])

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def _wait(self, doing: str) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=self.deadline)
        except queue.Empty:
            self._process.kill()
            raise AdapterFailure(f"did not answer within {self.deadline:g} s while it was {doing}") from None
        if not line:
            status = self._process.wait()
            last = self.captured().strip().splitlines()[-1:]
            said = f"; its last words: {last[0][:300]}" if last else ""
            raise AdapterFailure(f"ended its process with status {status} while it was {doing}{said}")
        return json.loads(line)

    @staticmethod
    def _raise_if_error(reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise AdapterFailure(reply["error"])

    def run(self, case: Case, case_id: str) -> tuple[dict[str, np.ndarray], list[str]]:
        """Run one case; return its outputs and the names of the inputs that the adapter wrote to.

        Raises
        ------
        AdapterFailure
            If it raises, breaks the contract, hangs or ends its process; the message names the case.
        """
        folder = Path(self._folder.name) / f"{self._calls:05d}"
        self._calls += 1
        write_case(case, folder)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, and the wait says how
            self._process.stdin.write(json.dumps({"folder": str(folder)}) + "\n")
            self._process.stdin.flush()
        try:
            reply = self._wait("to run a case")
            self._raise_if_error(reply)
            outputs = load_file(folder / "outputs.safetensors")
        except AdapterFailure as failure:
            raise AdapterFailure(f"{failure} [case {case_id}]") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFailure(f"left outputs that cannot be read: {error} [case {case_id}]") from None
        finally:
            for file in folder.glob("*"):
                file.unlink()
        return outputs, list(reply[MUTATED])

    def captured(self) -> str:
        """Return what the adapter printed so far."""
        return Path(self._captured.name).read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End the process and remove its files."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._captured.close()
        self._folder.cleanup()

    def __enter__(self) -> AdapterProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
