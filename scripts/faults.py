"""Faults on purpose: kills, full and read-only disks, two processes on one output, jumping clocks, malformed inputs.

    python scripts/faults.py                                     # the whole campaign: eval/results/faults.json and .md
    python scripts/faults.py --only inputs --seconds 100         # one part, or what fits in that time

Everything runs on a tiny model, in children forked from one process that has imported everything, so that a run takes
about a second. What is drawn depends on --seed alone. A run is judged by its exit code, by what it prints, by whether
the same command then ends with what an undisturbed run writes, and by whether its inputs are what they were.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

COLUMNS = ("tried", "clear paragraph", "resumed", "finished", "lost", "tracebacks", "hung", "silently wrong")
LONGEST = 90.0  # seconds until a run counts as hung
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MEMORY = 12 << 30  # bytes of address space beyond what is mapped at the start
PARTS = ("kills", "disk", "two", "clock", "inputs")


class Run:
    """One run of the command line in a child, its output in a file.

    Args:
        words: arguments of `linearize`.
        folder: where the output is kept.
        before: called in the child first.
    """

    def __init__(self, words: list[str], folder: Path, before: Callable[[], None] = lambda: None):
        self.words, self.file, self.start = words, folder / "output.txt", time.monotonic()
        self.code: int | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child can answer
        self.pid = os.fork()
        if self.pid == 0:
            self._child(before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _child(self, before: Callable[[], None]) -> None:
        from linearize import cli

        code = 1
        try:
            os.setsid()
            out = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            faulthandler.register(signal.SIGUSR1, file=out)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
            before()
            sys.argv = ["linearize", *self.words]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        except BaseException:
            traceback.print_exc()
        finally:
            try:  # a signal that comes as late as here must not take the child up into what its parent does
                with contextlib.suppress(Exception):
                    sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code)

    def wait(self, seconds: float = LONGEST) -> int | None:
        """The exit code, negative for a signal; None when it had to be killed as hung."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.start
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)  # children that it left
                return self.code
            if time.monotonic() > end:
                self.send(signal.SIGUSR1)  # where each of its threads is, into its output
                time.sleep(1)
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            time.sleep(0.002)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What it printed."""
        return self.file.read_text(errors="replace") if self.file.exists() else ""


def digests(folder: Path) -> dict[str, str]:
    """What counts of a folder or results file: weights and configuration by hash, scores without times."""
    if folder.suffix == ".json":
        if not folder.exists():
            return {}
        columns = json.loads(folder.read_text())["columns"]
        return {name: json.dumps([column.get(k) for k in ("tasks", "perplexity")]) for name, column in columns.items()}
    kept = [file for file in sorted(folder.rglob("*")) if file.suffix == ".safetensors" or file.name == "config.json"]
    kept = [file for file in kept if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


class Campaign:
    """The tiny models, the undisturbed runs, and the counts.

    Args:
        folder: to work in.
        seed: of everything that is drawn.
        deadline: `time.monotonic` at which no further run begins.
        verbose: print what every disturbed run says.
    """

    def __init__(self, folder: Path, seed: int, deadline: float, verbose: bool = False):
        self.folder, self.rng, self.deadline, self.verbose = folder, random.Random(seed), deadline, verbose
        self.counts: dict[str, Counter[str]] = {}
        self.bad: list[dict[str, str]] = []
        self.number = 0
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, str]] = {}

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def count(self, row: str, column: str, run: Run | None = None, note: str = "") -> None:
        """Count one outcome; of a bad one keep what was done and said."""
        self.counts.setdefault(row, Counter())[column] += 1
        if column in COLUMNS[4:]:
            said = "" if run is None else run.said
            self.bad.append({"row": row, "column": column, "note": note, "command": " ".join(run.words) if run else "",
                             "said": said[-1500:]})  # fmt: skip
            print(f"{row}: {column}: {note}\n{said[-1500:]}", file=sys.stderr)

    def fresh(self) -> Path:
        """A new empty folder."""
        self.number += 1
        folder = self.folder / f"run{self.number}"
        folder.mkdir()
        return folder

    def prepare(self) -> None:
        """Write the source, and every stage undisturbed."""
        from helpers.tiny import TEXT, save_source

        made = self.folder / "made"
        save_source(made / "source", layers=3)
        (made / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(40)))
        (made / "words.txt").write_text(TEXT * 20)
        perplexity = [{"text": str(made / "words.txt"), "length": 64, "blocks": 2}]
        suite = {"columns": ["source", "window", "student"], "perplexity": perplexity}
        (made / "suite.yaml").write_text(json.dumps(suite))
        reading = {"tokens": 512, "seq_len": 64}
        stage = {"name": "distil", "tokens": 1024, "seq_len": 64, "batch": 2, "micro_batch": 1, "save_every": 2,
                 "peft": {"r": 4, "alpha": 8, "roles": ["q", "v"]}}  # fmt: skip
        mixer = {"name": "gla", "window": 8, "sinks": 2}
        recipe = {"source": {"id": str(made / "source")}, "convert": {"mixer": mixer},
                  "data": [{"path": str(made / "text.jsonl")}], "train": [stage],
                  "calibrate": reading, "select": {**reading, "keep": 1}}  # fmt: skip
        (made / "recipe.yaml").write_text(json.dumps(recipe))
        for verb in VERBS:
            run = Run(self.words(verb, made / verb), self.folder)
            if run.wait() != 0:
                raise SystemExit(f"the undisturbed {verb} fails:\n{run.said}")
            self.seconds[verb], self.expected[verb] = run.seconds, self.written(verb, made / verb)
        self.inputs = {name: digests(made / name) for name in ("source", *VERBS[:-2])}

    def words(self, verb: str, out: Path) -> list[str]:
        """The command that writes a stage to `out`."""
        made = self.folder / "made"
        return {
            "convert": ["convert", "--model", str(made / "recipe.yaml"), "--out", str(out)],
            "calibrate": ["calibrate", str(made / "convert"), "--out", str(out)],
            "select": ["select", str(made / "convert"), "--out", str(out)],
            "train": ["train", str(made / "convert"), "--out", str(out), "--resume"],
            "merge": ["merge", str(made / "train"), "--out", str(out)],
            "eval": ["eval", str(made / "merge"), "--suite", str(made / "suite.yaml"),
                     "--out", str(out / "results.json"), "--resume"],
            "push": ["push", str(made / "merge"), "--repo", f"tester/{out.parent.name}-{out.name}"],
        }[verb]  # fmt: skip

    def written(self, verb: str, out: Path) -> dict[str, str]:
        """What a stage has left."""
        if verb != "push":
            return digests(out / "results.json" if verb == "eval" else out)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            folder = snapshot_download(f"tester/{out.parent.name}-{out.name}", local_dir=self.fresh() / "there")
        except (HfHubHTTPError, OSError):
            return {}
        return digests(Path(folder))

    def judge(self, row: str, run: Run, allowed: tuple[int, ...], note: str = "") -> bool:
        """Count how a disturbed run ended; whether it ended as it may."""
        self.count(row, "tried")
        if self.verbose:
            print(f"{row} ({note}): linearize {' '.join(run.words)}\n  {run.code}: {run.said[-600:]}", file=sys.stderr)
        if run.code is None:
            self.count(row, "hung", run, note)
        elif "Traceback (most recent" in re.sub(r"Exception ignored in.*\nTraceback", "", run.said):
            self.count(row, "tracebacks", run, note)
        elif run.code == 2 and re.search(r"^Error: .{20}", run.said, re.MULTILINE | re.DOTALL):
            self.count(row, "clear paragraph")
            return True
        elif run.code == 0:
            self.count(row, "finished")
            return True
        elif run.code in allowed:
            return True
        else:
            self.count(row, "tracebacks", run, f"{note} exit code {run.code}")
        return False

    def again(self, row: str, verb: str, out: Path) -> None:
        """The same command once more: it has to end with what the undisturbed run wrote."""
        run = Run(self.words(verb, out), out.parent)
        code = run.wait()
        there = code == 0 or code == 2 and "exists" in run.said  # it had ended before it was killed
        written = self.written(verb, out) if there else {}
        if not there:
            self.count(row, "hung" if code is None else "lost", run, f"second run ended with {code}")
        elif written != self.expected[verb]:
            self.count(row, "silently wrong", run, f"{set(written.items()) ^ set(self.expected[verb].items())}")
        else:
            self.count(row, "resumed")
        changed = [name for name, before in self.inputs.items() if digests(self.folder / "made" / name) != before]
        if changed:
            self.count(row, "lost", run, f"inputs changed: {changed}")
        shutil.rmtree(out.parent, ignore_errors=True)


VERBS = ("convert", "calibrate", "select", "train", "merge", "eval", "push")


def kills(campaign: Campaign, tries: int) -> None:
    """SIGKILL, SIGTERM or SIGINT at a random moment."""
    for number in range(tries):
        if campaign.over:
            return
        verb, sent = VERBS[number % len(VERBS)], SIGNALS[number // len(VERBS) % len(SIGNALS)]
        out = campaign.fresh() / "out"
        moment = campaign.rng.random() * campaign.seconds[verb]
        run = Run(campaign.words(verb, out), out.parent)
        time.sleep(moment)
        run.send(sent)
        run.wait()
        row = f"{sent.name} {verb}"
        if campaign.judge(row, run, (-sent, 128 + sent), f"after {moment:.3f} s"):
            campaign.again(row, verb, out)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory of a given size at a folder; needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk(campaign: Campaign, tries: int) -> None:
    """Disks that become full, in `--out` or the cache, and disks that cannot be written to."""
    for number in range(tries):
        if campaign.over or os.geteuid() != 0:
            return
        verb = VERBS[number % len(VERBS)]
        kind = ("full", "full cache", "read-only")[number // len(VERBS) % 3]
        if kind == "full" and verb == "push" or kind == "full cache" and verb not in ("calibrate", "select", "train"):
            continue
        out = campaign.fresh() / "disk" / "out"
        out.parent.mkdir()
        size = campaign.rng.choice([16, 64, 128, 256, 384, 512, 768, 1024])
        with small_disk(out.parent, "size=512m" if kind == "read-only" else f"size={size}k"):
            if kind == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", out.parent], check=True)
            target = campaign.fresh() / "out" if kind == "full cache" else out

            def cache(folder: Path = out.parent) -> None:
                os.environ["LINEARIZE_CACHE"] = str(folder)

            run = Run(campaign.words(verb, target), campaign.folder, cache if kind == "full cache" else lambda: None)
            run.wait()
            if campaign.judge(f"{kind} disk, {verb}", run, (), f"{size} KiB"):
                if kind != "full cache":
                    subprocess.run(["mount", "-o", "remount,rw,size=512m", out.parent], check=True)
                campaign.again(f"{kind} disk, {verb}", verb, target)


def two(campaign: Campaign, tries: int) -> None:
    """Two processes, one output."""
    for number in range(tries):
        if campaign.over:
            return
        verb = VERBS[number % (len(VERBS) - 1)]
        out = campaign.fresh() / "out"
        first = Run(campaign.words(verb, out), out.parent)
        time.sleep(campaign.rng.random() * campaign.seconds[verb])
        other = campaign.fresh()
        second = Run(campaign.words(verb, out), other)
        codes = {first.wait(), second.wait()}
        row = f"two at once, {verb}"
        fine = all([campaign.judge(row, run, ()) for run in (first, second)])
        if fine and 0 not in codes:
            campaign.count(row, "lost", second, "neither finished")
        elif fine:
            campaign.again(row, verb, out)


def clock(campaign: Campaign, tries: int) -> None:
    """The clock of the machine jumps by years, back or forth, in the middle of a run."""
    for number in range(tries):
        if campaign.over:
            return
        verb = VERBS[number % len(VERBS)]
        out = campaign.fresh() / "out"
        jump = campaign.rng.choice([-1, 1]) * campaign.rng.choice([3600.0, 3e7, 3e8])
        moment = time.time() + campaign.rng.random() * campaign.seconds[verb]

        def jumping(jump: float = jump, moment: float = moment) -> None:
            real, real_ns = time.time, time.time_ns
            time.time = lambda: real() + jump * (real() > moment)
            time.time_ns = lambda: real_ns() + int(1e9 * jump) * (real() > moment)

        run = Run(campaign.words(verb, out), out.parent, jumping)
        run.wait()
        if campaign.judge(f"clock jumps, {verb}", run, ()):
            campaign.again(f"clock jumps, {verb}", verb, out)


def inputs(campaign: Campaign, tries: int, kinds: list[str]) -> None:
    """Malformed files of every kind; see tests/helpers/malformed.py."""
    from helpers import malformed

    def attempt(kind: str, words: list[str], note: str, check: Callable[[], str]) -> None:
        row = f"malformed {kind}"
        if campaign.over and row in campaign.counts:
            return
        folder = campaign.fresh()
        run = Run([word.replace("OUT", str(folder / "out")) for word in words], folder)
        run.wait()
        if campaign.judge(row, run, (), note) and run.code == 0:
            problem = malformed.in_child(lambda: check(folder / "out"), folder)
            if problem:
                campaign.count(row, "silently wrong", run, f"{note}: {problem}")
        shutil.rmtree(folder, ignore_errors=True)

    malformed.draw(campaign.folder, campaign.rng, tries, kinds, attempt, lambda: campaign.over)


def report(campaign: Campaign, given: argparse.Namespace, seconds: float) -> bool:
    """Write results; whether nothing bad was seen."""
    import bench_common as common
    import torch

    from linearize.evaluation.environment import environment

    total: Counter[str] = sum(campaign.counts.values(), Counter())
    bad = sum(total[column] for column in COLUMNS[4:])
    header = f"{total['tried']} faults in {seconds:.0f} s, seed {given.seed}: {bad} bad outcomes."
    table = [(row, *(str(count[column] or "") for column in COLUMNS)) for row, count in campaign.counts.items()]
    lines = [header, *common.table(("", *COLUMNS), [*table, ("all", *(str(total[c]) for c in COLUMNS))], left=1)]
    print("\n".join(lines))
    if given.out:
        results = {"schema": 1, "seed": given.seed, "seconds": seconds, "total": total, "rows": campaign.counts,
                   "bad": campaign.bad, "environment": environment(torch.device("cpu"), given.seed, {})}  # fmt: skip
        common.save(results, given.out / "faults.json")
        common.write_markdown(lines, given.out / "faults.json")
    return not bad


def main() -> None:
    """Parse, run the parts, report; exit code 1 where something bad was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--kinds", nargs="*", help="of malformed inputs (default: all)")
    parser.add_argument("--seconds", type=float, default=7200.0, help="no run begins later; shared by the parts")
    parser.add_argument(
        "--tries", type=int, help="of each part (default: 210 kills, 84 disks, 36 two, 28 clock, 600 inputs)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print what every disturbed run says")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="scratch, removed at the end")
    parser.add_argument("--out", type=Path, help="folder of the results; none are written without it")
    given = parser.parse_args()
    start, here = time.monotonic(), os.getpid()
    shutil.rmtree(given.folder, ignore_errors=True)
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    hub = _environment(folder)
    from helpers import malformed

    campaign = Campaign(folder, given.seed, start + given.seconds, given.verbose)
    numbers = dict(zip(PARTS, (210, 84, 36, 28, 600), strict=True))
    try:
        campaign.prepare()
        for index, part in enumerate(given.only):  # each gets its share of the time that is left
            campaign.deadline = time.monotonic() + (start + given.seconds - time.monotonic()) / (
                len(given.only) - index
            )
            tries = given.tries or numbers[part]
            if part == "inputs":
                inputs(campaign, tries, given.kinds or list(malformed.KINDS))
            else:
                {"kills": kills, "disk": disk, "two": two, "clock": clock}[part](campaign, tries)
        good = report(campaign, given, time.monotonic() - start)
    finally:
        if os.getpid() == here:
            os.kill(hub, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(not good)


def _environment(folder: Path) -> int:
    """Set what the libraries read when they are imported, import them; returns the process id of a Hub on loopback."""
    from helpers.fakehub import FakeHub

    read, write = os.pipe()
    hub = os.fork()
    if hub == 0:
        with FakeHub() as server:
            os.write(write, json.dumps(server.environ(folder / "hf")).encode())
            os.close(write)
            signal.pause()
    os.close(write)
    os.environ |= json.loads(os.read(read, 65536))
    os.environ |= {"LINEARIZE_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets"),
                   "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "LINEARIZE_NO_FSYNC": "1"}  # fmt: skip
    import torch

    import linearize.cli
    import linearize.evaluation.evaluate
    import linearize.evaluation.tasks
    import linearize.hub.push
    import linearize.recovery.merge
    import linearize.recovery.select
    import linearize.recovery.train
    import linearize.reporting.page  # noqa: F401

    torch.set_num_threads(1)
    return hub


if __name__ == "__main__":
    main()
