"""Kills real small runs at seeded random moments, lets them go on, and compares them with runs that nobody killed.

    python tests/faults/driver.py --kills 100 --seed 0

A run is killed by SIGKILL once or several times: at a random time, or at a random moment within one of the places that
write. After every other kill the newest checkpoint is damaged, too: one of its files has a bit flipped, is cut, emptied
or removed. A run that has ended must have the metrics, rollouts and final weights of the run that nobody killed, and no
leftovers. The last line is a JSON object with counts; the exit code is 1 where a run differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import environment_of_rank
from toy import toy_trainer

import vpd.base_trainer
import vpd.runs.checkpoints
import vpd.runs.folder
from vpd.evaluation import Evaluator
from vpd.runs import RunError, RunFolder, read_metrics, read_rollouts

TIMINGS = ("seconds", "train_seconds", "tokens_per_second", "peak_memory")
PATIENCE = 300.0
KILLS_A_RUN = 3

PLACES: dict[str, tuple[Any, str]] = {
    "writing a checkpoint": (vpd.runs.checkpoints, "write_state"),
    "writing its manifest": (vpd.runs.folder, "write_manifest"),
    "syncing a checkpoint": (vpd.runs.folder, "sync_tree"),
    "pruning": (vpd.runs.folder, "_remove"),
    "saving the best weights": (vpd.runs.checkpoints, "save_policy"),
    "evaluation": (Evaluator, "accuracy"),
    "metrics": (RunFolder, "log"),
    "the final save": (vpd.base_trainer, "save_policy"),
    "the result": (vpd.runs.folder, "write_checked_json"),
}
ANY_TIME = "any time"


def settings(algorithm: str) -> dict[str, dict[str, Any]]:
    """Four steps that write everything a run can write."""
    return {
        "algorithm": {"type": algorithm},
        "eval": {"eval_steps": 2, "load_best_model_at_end": True, "preflight_tasks": 2, "final_tasks": 4},
        "run": {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "logged_samples": 4},
    }


def damaged(data: bytes, kind: str, draw: random.Random) -> bytes:
    if kind == "emptied" or not data:
        return b""
    place = draw.randrange(len(data))
    return (
        data[:place]
        if kind == "cut"
        else data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    )


def on_calls(report: Callable[[str], Any]) -> None:
    """Let ``report`` hear of each call of a place, before it is made."""
    for place, (owner, name) in PLACES.items():
        setattr(owner, name, _told(getattr(owner, name), place, report))


def _told(function: Callable[..., Any], place: str, report: Callable[[str], Any]) -> Callable[..., Any]:
    def told(*args, **kwargs):
        report(place)
        return function(*args, **kwargs)

    return told


def child(folder: Path, algorithm: str, rank: int, ranks: int, port: int, pipe: int) -> None:
    """Run or go on, and tell each call of a place through the pipe; this is the forked process."""
    code = 1
    try:
        os.environ.update(environment_of_rank(rank, ranks, port))
        log = os.open(folder.with_name(f"{folder.name}.{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        on_calls(lambda place: os.write(pipe, place.encode() + b"\n") if rank == 0 else 0)
        toy_trainer(folder, **settings(algorithm)).train(resume_from_checkpoint=True)
        code = 0
    except RunError as error:
        print(f"RunError: {error}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        # Not by the interpreter's own way out, which would run what belongs to the parent.
        os._exit(code)


@dataclass
class Moment:
    """When a run is killed: at the call of a place with this number, or ``delay`` seconds after its start."""

    place: str
    call: int
    delay: float


@dataclass
class Ended:
    """How the processes of a run ended: killed, or by themselves with a code; and how often each place was called."""

    killed: bool
    code: int
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def start(folder: Path, algorithm: str, ranks: int, port: int) -> tuple[list[int], int]:
    reading, writing = os.pipe()
    pids = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            os.close(reading)
            child(folder, algorithm, rank, ranks, port, writing)
        pids.append(pid)
    os.close(writing)
    return pids, reading


def run(folder: Path, algorithm: str, ranks: int, port: int, moment: Moment | None = None) -> Ended:
    """Let a run begin or go on in processes of its own, until it ends or its moment comes."""
    pids, reading = start(folder, algorithm, ranks, port)
    began, ended, rest, killed = time.monotonic(), Ended(False, 0), b"", False
    os.set_blocking(reading, False)
    left = dict.fromkeys(pids)
    while left:
        try:
            data = os.read(reading, 65536)
        except BlockingIOError:
            data = b""
        *lines, rest = (rest + data).split(b"\n")
        ended.calls.update(line.decode() for line in lines)
        waited = time.monotonic() - began
        if waited > PATIENCE:
            raise TimeoutError(f"{folder} did not end in {PATIENCE:.0f} s")
        if moment is not None and not killed:
            at_time = moment.place == ANY_TIME and waited >= moment.delay
            if at_time or ended.calls[moment.place] >= moment.call > 0:
                time.sleep(0.0 if at_time else moment.delay)
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                killed = True
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del left[pid]
                ended.killed |= os.WIFSIGNALED(status)
                ended.code = max(ended.code, os.waitstatus_to_exitcode(status))
        time.sleep(0.0002)
    os.close(reading)
    ended.seconds = time.monotonic() - began
    return ended


def contents(folder: Path) -> dict[str, Any]:
    """All that must be equal: metrics without timings, rollouts, the final weights, the table, the kinds of files."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith(TIMINGS)}
        for line in read_metrics(folder)
        if line.get("name") != "damaged_files"
    ]
    rows = json.loads((folder / "result.json").read_text())["rows"]
    return {
        "metrics": lines,
        "rollouts": {path.name: read_rollouts(path) for path in sorted(folder.glob("rollouts/*"))},
        "weights": {path.name: path.read_bytes() for path in folder.glob("model/*.safetensors")},
        "table": [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


def draw_moment(draw: random.Random, whole: Ended) -> Moment:
    place = draw.choice([ANY_TIME, *PLACES])
    if place == ANY_TIME:
        return Moment(place, 0, draw.uniform(0, whole.seconds))
    return Moment(place, draw.randint(1, max(1, whole.calls[place])), draw.choice([0.0, draw.uniform(0, 0.01)]))


def damage_newest(folder: Path, draw: random.Random) -> tuple[Path, bytes, str] | None:
    """Damage a file of the newest checkpoint, and return it as it was; None where there is no checkpoint."""
    found = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name[11:]))
    if not found:
        return None
    path = draw.choice(sorted(path for path in found[-1].rglob("*") if path.is_file()))
    sound, kind = path.read_bytes(), draw.choice(["flipped", "cut", "emptied", "removed"])
    path.unlink()
    if kind != "removed":
        path.write_bytes(damaged(sound, kind, draw))
    return path, sound, kind


def one_run(folder: Path, algorithm: str, ranks: int, port: int, whole: Ended, draw: random.Random) -> Counter[str]:
    """Kill a run several times, let it go on to its end, and count what was done to it."""
    counts: Counter[str] = Counter()
    for _ in range(draw.randint(1, KILLS_A_RUN)):
        moment = draw_moment(draw, whole)
        if not run(folder, algorithm, ranks, port, moment).killed:
            # A later run makes fewer calls than the whole one, and may end before its moment.
            break
        counts["kills"] += 1
        counts[f"kills at {moment.place}"] += 1
        has_ended = (folder / "result.json").exists()
        if draw.random() < 0.5 and not has_ended and (damage := damage_newest(folder, draw)) is not None:
            path, sound, kind = damage
            counts[f"checkpoints {kind}"] += 1
            ended = run(folder, algorithm, ranks, port)
            if ended.code == 2 and len(list(folder.glob("checkpoints/checkpoint-*"))) == 1:
                # The only checkpoint was damaged, and the run was refused with a sentence.
                counts["refused, and restored"] += 1
                path.write_bytes(sound)
            elif ended.code:
                raise AssertionError(f"ended with code {ended.code} after {path} was {kind}")
            else:
                return counts
    ended = run(folder, algorithm, ranks, port)
    if ended.code:
        raise AssertionError(f"ended with code {ended.code}")
    return counts


def main(kills: int, seed: int, ranks: int) -> int:
    draw, totals, different = random.Random(seed), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="vpd-faults-") as place:
        base = Path(place)
        references = {}
        port = 20000 + os.getpid() % 20000
        for algorithm in ("vpd", "sdpo"):
            whole = run(base / algorithm, algorithm, ranks, port)
            if whole.code:
                sys.exit((base / f"{algorithm}.0.log").read_text())
            references[algorithm] = (whole, contents(base / algorithm))
        while totals["kills"] < kills:
            index = totals["runs"]
            algorithm, folder = ("vpd", "sdpo")[index % 2], base / f"run-{index}"
            whole, wanted = references[algorithm]
            try:
                counts = one_run(folder, algorithm, ranks, port, whole, draw)
                found = contents(folder)
                wrong = [name for name in wanted if found[name] != wanted[name]]
            except (AssertionError, OSError, ValueError, RunError) as error:
                counts, wrong = Counter(), [f"{type(error).__name__}: {error}"]
            if wrong:
                logs = "".join(path.read_text()[-3000:] for path in base.glob(f"{folder.name}.*.log"))
                print(f"run {index} ({algorithm}) differs in {', '.join(wrong)}:\n{logs}")
                different.append(index)
            totals += counts + Counter(runs=1)
            print(f"run {index} ({algorithm}): {dict(counts)}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            if len(different) > 3:
                break
    print(json.dumps({"seed": seed, "ranks": ranks, **dict(sorted(totals.items())), "different": len(different)}))
    return 1 if different else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, choices=[1, 2])
    options = parser.parse_args()
    sys.exit(main(options.kills, options.seed, options.ranks))
