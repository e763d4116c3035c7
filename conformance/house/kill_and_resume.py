# May import: standard library.
"""Kill a training run at random moments and go on: it has to end in the bits of a run that nobody killed.

    python conformance/house/kill_and_resume.py 20 [backend=cpu]

Checkpoints are written after every step, so that many of the moments lie inside the writing of one; how many did is counted by what they left behind.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

MODEL = ("model.d_model=16", "model.d_ff=32", "model.heads=2", "model.d_kv=8", "model.dropout=0.1", "model.expert_dropout=0.2")
SMALL = ("backend=reference", "precision=float32", *MODEL, "data.batch=4", "data.inputs_length=32", "eval_batches=1", "eval_every=5")


class Seen(NamedTuple):
    """What the killings met."""

    killed: int
    while_writing: int  # a checkpoint was there in part


def write_text(folder: Path, words: int = 40_000) -> Path:
    """Write a small corpus."""
    source = random.Random(0)
    for i in range(20):
        text = " ".join(source.choice(("expert", "token", "router", "slot", "gate", "switch")) for _ in range(words // 20))
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def command(run_dir: Path, text: Path, steps: int, *more: str) -> list[str]:
    """Return the command line of a run."""
    keys = (*SMALL, f"data.sources=[{text}]", "data.held_out=0.2", f"steps={steps}", "checkpoint_every=1", f"run_dir={run_dir}")
    return [sys.executable, "-m", "refswitch", "train", "tiny", *keys, "-q", *more]


def digest(run_dir: Path, step: int) -> str:
    """Return a digest of everything that a run leaves, but for the time that it took."""
    whole = hashlib.sha256()
    for path in sorted((run_dir / "checkpoints" / f"step-{step}").iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        entry.pop("seconds")
        whole.update(json.dumps(entry).encode())
    return whole.hexdigest()


def kill_and_resume(folder: Path, kills: int, steps: int, seed: int, *keys: str) -> Seen:
    """Kill a run `kills` times, then let it end; raise AssertionError where it ends in other bits than a run of one piece."""
    text = folder / "text"
    text.mkdir()
    write_text(text)
    whole, cut = folder / "whole", folder / "cut"
    begun = time.monotonic()
    subprocess.run(command(whole, text, steps, *keys), check=True)
    seconds = time.monotonic() - begun
    source, killed, while_writing = random.Random(seed), 0, 0
    while killed < kills:
        resume = ("--resume",) if (cut / "config.yaml").is_file() else ()
        process = subprocess.Popen(command(cut, text, steps, *keys, *resume), stderr=subprocess.PIPE)
        try:
            process.wait(timeout=source.uniform(0.4, 0.4 + seconds / 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        if process.returncode == 0:  # it came to its end: begin anew, for the moments that are left
            assert digest(cut, steps) == digest(whole, steps), "a resumed run ended in other bits"
            subprocess.run(["rm", "-rf", str(cut)], check=True)
        elif (cut / "checkpoints").is_dir():
            while_writing += any(path.name.startswith(".step-") for path in (cut / "checkpoints").iterdir())
    resume = ("--resume",) if (cut / "config.yaml").is_file() else ()
    subprocess.run(command(cut, text, steps, *keys, *resume), check=True)
    assert digest(cut, steps) == digest(whole, steps), "a resumed run ended in other bits"
    return Seen(killed, while_writing)


def main() -> None:
    """Run from the command line."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        seen = kill_and_resume(Path(folder), kills, 60, 1, *sys.argv[2:])
    print(f"killed {seen.killed} times, {seen.while_writing} of them while a checkpoint was being written: the same bits")


if __name__ == "__main__":
    main()
