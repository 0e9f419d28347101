"""A soak: ``python -m benchmarks.chaos --hours H [--seed S] [--out FILE] [--faults N]`` breaks a training at random.

On a SLURM of two nodes on the loopback (``loopback``), MSF trains small networks on scanned digits with four ranks, a
bank, a moving-average target and a checkpoint every 5 steps. First once undisturbed; then faults strike
(``chaos_kinds``; the seed names their sequence, ``chaos_plan``), and whenever a training is finished its digest is
held against the undisturbed one's, and the same training begins anew. No fault comes after H hours or N faults; the
training of that moment is still finished. Exit code 1 where a digest differs or anything else was found.

Steps lost are finished steps that had to be done again: the last one in the journal when the attempt had ended, less
the one at which the next attempt began. ``after_kill`` counts kills between two periodic saves,
``after_kill_in_a_save`` those that came while the newest save had not got its manifest. The report is written after
every bout of faults.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import loopback
from benchmarks.chaos_faults import Missed
from benchmarks.chaos_kinds import BOUTS, KINDS
from benchmarks.chaos_plan import Fault, sequence
from benchmarks.chaos_scene import PATIENCE, PERIOD, After, Before, Scene, Stuck, Trainer
from hpcssl.files import RunDir, atomic_write
from slurm import attempts, freeze

STEPS = 600
ROOM_MB = 256
MEASURES = ("after_signal", "after_kill", "after_kill_in_a_save", "after_damage", "after_full_disk")
IN_FLIGHT = 5
"""Steps that a save may take until it is sealed."""

Blow = tuple[Fault, float, str]
"""A fault that has struck: when, in seconds since the start, and whom."""


@dataclass
class Report:
    """What was done and found so far; ``write`` replaces the file as a whole."""

    out: Path | None
    about: dict
    expected: str = ""
    began: float = field(default_factory=time.monotonic)
    log: list[dict] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    undisturbed_s: float = 0.0

    def body(self) -> dict:
        lost = {name: [row["lost"] for row in self.log if row["measure"] == name] for name in MEASURES}
        return self.about | {
            "hours": round((time.monotonic() - self.began) / 3600, 3), "faults": len(self.log),
            "digest_equal": bool(self.digests) and set(self.digests) == {self.expected},
            "trainings_finished": len(self.digests), "digest": self.expected, "undisturbed_s": self.undisturbed_s,
            "steps_lost": {name: {"max": max(rows, default=0), "total": sum(rows), "faults": len(rows)}
                           for name, rows in lost.items()} | {"checkpoint_period": PERIOD},
            "by_kind": {kind: _of_kind([row for row in self.log if row["kind"] == kind])
                        for kind in KINDS if any(row["kind"] == kind for row in self.log)},
            "surprises": self.surprises, "log": self.log}

    def write(self) -> None:
        if self.out is not None:
            head = json.dumps({k: v for k, v in self.body().items() if k != "log"}, indent=1)
            lines = ",\n  ".join(json.dumps(row) for row in self.log)  # one line per fault
            atomic_write(self.out, f'{head[:-2]},\n "log": [\n  {lines}\n ]\n}}\n')

    def surprise(self, sentence: str) -> None:
        self.surprises.append(sentence)
        say(f"  SURPRISE: {sentence}")


def _row(blow: Blow, before: int, after: int | None, lost: int = 0, measure: str | None = None,
         causes: Sequence[str] = ()) -> dict:
    """One line of the log. ``causes``: how attempts ended because of this fault."""
    fault, at, victim = blow
    return {"fault": fault.number, "time": round(at, 1), "kind": fault.kind, "victim": victim, "step_before": before,
            "step_after": after, "lost": lost, "measure": measure, "causes": list(causes)}


def _of_kind(rows: list[dict]) -> dict:
    return {"count": len(rows), "steps_lost": sum(row["lost"] for row in rows),
            "attempts": sum(len(row["causes"]) for row in rows),
            "submitted_again": sum(len(row.get("submitted_again", [])) for row in rows),
            "causes": dict(Counter(cause for row in rows for cause in row["causes"]))}


class Soak:
    """Trainings one after another on one cluster, and what is done to them."""

    def __init__(self, cluster: loopback.Cluster, room: Path, trainer: Trainer, report: Report):
        self.cluster, self.room, self.trainer, self.report = cluster, room, trainer, report
        self.scene: Scene | None = None
        self.floor = 0
        """The next bout waits for a later step: two crashes at one step would end the asking."""
        self.full_at = -1
        """The step at which this training last met a full disk: until it has saved again, what a kill costs is the
        disk's doing."""
        self._runs = self._stuck = 0

    def undisturbed(self) -> None:
        began = time.monotonic()
        scene = self._new()
        self.report.expected = scene.finish()
        if causes := [attempt.cause for attempt in attempts.history(scene.run)[:-1]]:
            self.report.surprise(f"the undisturbed training was disturbed: {', '.join(map(str, causes))}")
        self.report.undisturbed_s = round(time.monotonic() - began, 1)
        self._away()
        say(f"undisturbed: {self.trainer.steps} steps in {self.report.undisturbed_s:g} s, "
            f"digest {self.report.expected[:12]}")

    def strike(self, bout: list[Fault]) -> None:
        """One bout, whatever it takes; a training that ends before it was struck gives way to the next one. Raises
        ``Stuck`` where nothing works any more."""
        done: list[Blow] = []
        try:
            while not done:
                scene = self._alive()
                with contextlib.suppress(Missed):  # the training has just ended, or is between two attempts
                    self._approach(scene, bout[0])
                    before = scene.now()
                    for fault in bout:
                        done.append((fault, time.monotonic() - self.report.began,
                                     KINDS[fault.kind].strike(scene, fault)))
                time.sleep(0 if done else 1)
            after = scene.back(before, any(KINDS[fault.kind].restarts is not False for fault, _, _ in done))
        except (Stuck, AssertionError, OSError, subprocess.SubprocessError) as error:
            self._rescue(bout, done, error)
        else:
            self._stuck = 0
            self._note(done, before, after)

    def finish(self) -> None:
        if self.scene is not None:
            self._finish()

    # -- parts ------------------------------------------------------------------------------------------------

    def _new(self) -> Scene:
        self._runs += 1
        self.scene, self.floor = Scene(self.cluster, RunDir(self.room / f"run-{self._runs}"), self.trainer, say), 0
        self.full_at = -1
        return self.scene

    def _alive(self) -> Scene:
        if self.scene is not None and self.scene.done:
            self._finish()
        return self.scene or self._new()

    def _approach(self, scene: Scene, first: Fault) -> None:
        goal = self.floor + first.steps
        scene.until(lambda: scene.step() >= goal and len(scene.tasks()) == 4, f"step {goal}", 240)
        time.sleep(first.delay_s)
        if scene.done:
            raise Missed
        scene.struck = set(scene.tasks().values())

    def _finish(self) -> None:
        digest = self.scene.finish()
        self.report.digests.append(digest)
        if digest != self.report.expected:
            self.report.surprise(f"{self.scene.run.root.name} ended with digest {digest[:12]} instead of "
                                 f"{self.report.expected[:12]}")
        say(f"training {len(self.report.digests)} finished: digest {digest[:12]}, "
            f"{'equal' if digest == self.report.expected else 'DIFFERENT'}")
        self._away()
        self.report.write()

    def _away(self) -> None:
        """What the training leaves is given back; the next one finds an idle cluster."""
        scene, self.scene = self.scene, None
        for left in scene.left_over:
            left.kill()  # it has had its time: ranks wait for one another for 5 s
            if "let in" in left.communicate()[1]:
                self.report.surprise("a rank of another attempt was let in at the rendezvous")
        self.cluster("scancel", scene.job)
        with contextlib.suppress(AssertionError):
            self.cluster.until(lambda: not scene.processes("slurm"), "end of the job's processes", 30)
        scene.kill(*scene.processes("slurm"))
        shutil.rmtree(scene.run.root, ignore_errors=True)

    def _rescue(self, bout: list[Fault], done: list[Blow], error: Exception) -> None:
        """The training is stuck: that is a finding. It is given up, and another one begins."""
        self.report.surprise(f"{', '.join(f'fault {f.number} ({f.kind})' for f in bout)}: {error}")
        self._stuck += 1
        self.report.log += [_row(blow, self.floor, None) for blow in done]
        if self.scene is not None:
            say(self.scene.about())
            self._away()
        self.report.write()
        if self._stuck >= PATIENCE:
            raise Stuck(f"{PATIENCE} bouts in a row") from error

    def _note(self, done: list[Blow], before: Before, after: After) -> None:
        lost = after.peak - after.first
        measures = [KINDS[fault.kind].lost for fault, _, _ in done]
        worst = max(measures, key=("none", "signal", "kill", "damage", "disk").index)
        if worst == "disk":
            self.full_at = after.peak
        elif after.first <= self.full_at and worst != "none":
            worst = "disk"
        name = {"none": "after_signal", "signal": "after_signal", "damage": "after_damage", "disk": "after_full_disk",
                "kill": "after_kill_in_a_save" if after.saving else "after_kill"}[worst]
        answers = [fault for fault, _, _ in done if KINDS[fault.kind].restarts is not False] or [done[-1][0]]
        causes = list(after.causes)
        for blow in done:
            fault, last = blow[0], blow[0] is answers[-1]
            mine = [causes.pop(0) for _ in range(len(causes) if last else min(1, len(causes))) if fault in answers]
            row = _row(blow, after.peak, after.first, lost if last else 0, name if last and mine else None, mine)
            self.report.log.append(row | ({"submitted_again": after.resubmitted} if last and after.resubmitted else {}))
            say(f"{row['fault']:4d} {row['time']:7.1f} s  {row['kind']}: {row['victim']}; step {row['step_before']}, "
                f"then {row['step_after']}" + (f" ({', '.join(mine)})" if mine else ""))
        self._judge(done, after, lost, worst)
        self.floor = max(after.peak, after.first)
        self.report.write()

    def _judge(self, done: list[Blow], after: After, lost: int, worst: str) -> None:
        """Hold what happened against what the kinds allow."""
        name = ", ".join(f"fault {fault.number} ({fault.kind})" for fault, _, _ in done)
        allowed = {"none": 0, "signal": 0, "kill": PERIOD + IN_FLIGHT * after.saving,
                   "damage": 2 * PERIOD + IN_FLIGHT, "disk": None}[worst]
        if allowed is not None and lost > allowed:
            self.report.surprise(f"{name}: {lost} steps lost, {allowed} allowed")
        causes = {cause for fault, _, _ in done for cause in KINDS[fault.kind].causes}
        if wrong := [cause for cause in after.causes if cause not in causes | {"done"}]:
            self.report.surprise(f"{name}: ended as {', '.join(wrong)}")
        if not after.causes and any(KINDS[fault.kind].restarts for fault, _, _ in done):
            self.report.surprise(f"{name}: nobody took notice")
        if after.resubmitted and not any(KINDS[fault.kind].ends for fault, _, _ in done):
            self.report.surprise(f"{name}: the job had to be submitted again: {'; '.join(after.resubmitted)}")


@contextlib.contextmanager
def place() -> Iterator[tuple[loopback.Cluster, Path, Path]]:
    """A cluster, a small disk for runs, and digits; all of it is gone afterwards, whatever happens."""
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    room, cluster = root / "runs", loopback.Cluster(root / "cluster")
    cluster.root.mkdir()
    room.mkdir()
    before, mounted = os.environ.get("SLURM_CONF"), False
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_MB}m", "tmpfs", str(room)],
                                 capture_output=True).returncode == 0
        subprocess.run([sys.executable, "-m", "data_prep", "digits", str(root / "digits")], check=True,
                       capture_output=True)
        cluster.start()
        yield cluster, room, root / "digits" / "train"
    finally:
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            cluster.stop()
        cluster.sweep()
        os.environ.pop("SLURM_CONF", None) if before is None else os.environ.update(SLURM_CONF=before)
        if mounted:
            subprocess.run(["umount", "-l", str(room)], capture_output=True)
        shutil.rmtree(root, ignore_errors=True)


def about(seed: int) -> dict:
    """What the figures depend on; nothing that names a machine or a person."""
    from benchmarks.common import versions  # imports torch, which nothing else here waits for

    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    return {"benchmark": "chaos", "what": "random faults against MSF on digits, 2 nodes x 2 tasks on the loopback",
            "commit": freeze.commit(), "seed": seed, "machine": versions() | {"slurm": slurm}}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, required=True, help="no fault comes later than this")
    parser.add_argument("--seed", type=int, default=0, help="names the sequence of faults")
    parser.add_argument("--faults", type=int, default=None, help="no more than this many (the bout is finished)")
    parser.add_argument("--out", type=Path, default=None, help="write the report here as JSON, after every bout")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of one training ({STEPS})")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help="only bouts that have one of these")
    options = parser.parse_args()
    if why := loopback.missing():
        parser.error(why)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every attempt would compile the frozen code anew
    bouts = [bout for bout in BOUTS if not options.only or set(bout) & set(options.only)]
    report = Report(options.out, about(options.seed))
    with place() as (cluster, room, data):
        soak = Soak(cluster, room, Trainer(data, options.steps), report)
        run(soak, report, sequence(options.seed, bouts), options)
    report.write()
    body = report.body()
    say(f"{body['faults']} faults in {body['hours']:g} h; {body['trainings_finished']} trainings finished, digests "
        f"{'equal' if body['digest_equal'] else 'NOT equal'}; {len(report.surprises)} surprises")
    say(json.dumps(body["steps_lost"]))
    return int(bool(report.surprises) or not body["digest_equal"])


def run(soak: Soak, report: Report, bouts: Iterator[list[Fault]], options: argparse.Namespace) -> None:
    try:
        soak.undisturbed()
        for bout in bouts:
            if time.monotonic() - report.began > options.hours * 3600 or \
                    (options.faults is not None and len(report.log) >= options.faults):
                break
            soak.strike(bout)
        soak.finish()
    except KeyboardInterrupt:
        say("interrupted: what was done so far stands")
    except (Stuck, subprocess.TimeoutExpired) as error:
        report.surprise(f"the end: {error}")


if __name__ == "__main__":
    sys.exit(main())
