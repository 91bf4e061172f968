"""`pytest -m gpu`, some tests at a time in a process of their own, several processes beside each other.

A test that takes too long is ended with its process, one that crashes ends it: that test has failed, the others go on
in a new process. What tests.jsonl of the session's folder has already is not run again.
"""
import contextlib
import json
import queue
import tempfile
import threading
import time
from pathlib import Path

from gpu_session import processes
from gpu_session.processes import TESTS, python

BATCH = 24         # tests of a process, at most: its start takes some seconds
STARTING = 120.0   # seconds until the first test begins, and after the last one ends
FIRST = ("test_gpu_device_primitives.py",)  # what the others are made of
LAST = ("test_gpu_device_sanitizer.py",)    # minutes long


def files():
    """All files with tests that need a GPU, in the order in which they are run."""
    found = sorted(path.name for path in TESTS.glob("test_gpu_device*.py"))
    return [*FIRST, *(name for name in found if name not in FIRST + LAST), *LAST]


def command(*arguments, dry):
    plugins = ["-p", "gpu_pretend"] if dry else []
    settings = ["-c", "pyproject.toml", "--rootdir", ".", "-o", "addopts=", "-o", "timeout=0",
                "--import-mode=importlib", "-m", "gpu", "-q", "--tb=short"]
    return python("-P", "-m", "pytest", *plugins, "-p", "gpu_session.recorder", "-p", "no:cacheprovider", *settings,
                  *arguments)


class Record:
    """The lines that a process writes, as they come."""

    def __init__(self, folder):
        self.path = Path(tempfile.mkstemp(dir=folder, suffix=".jsonl")[1])
        self.at, self.rest = 0, ""

    def new(self):
        with self.path.open() as file:
            file.seek(self.at)
            self.rest += file.read()
            self.at = file.tell()
        *lines, self.rest = self.rest.split("\n")
        return [json.loads(line) for line in lines]


def collect(names, folder, dry):
    """(node ids in order, errors) of files of tests."""
    record = Record(folder)
    done = processes.run(command("--collect-only", *(TESTS / name for name in names), dry=dry), STARTING,
                         CYFLASH_SESSION_RECORD=str(record.path))
    ids, errors = [], []
    for line in record.new():
        if line["event"] == "collected":
            ids = line["ids"]
        else:
            errors.append(f"{line['id']}: {line['why']}")
    if not ids and not errors:
        errors.append(f"pytest found no tests: {done.why()}\n{done.tail()}")
    return ids, errors


class Running:
    """One process with a batch of tests."""

    def __init__(self, ids, folder, dry):
        self.ids, self.ended, self.current, self.since = ids, set(), None, time.monotonic()
        self.record = Record(folder)
        self.output = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed in `finish`
        named = {"CYFLASH_SESSION_RECORD": str(self.record.path)}
        self.process = processes.start(command(*ids, dry=dry), self.output, **named)

    def lines(self):
        """Results of tests that have ended since the last look."""
        for line in self.record.new():
            if line["event"] == "begin":
                self.current, self.since = line["id"], time.monotonic()
            elif line["event"] == "end":
                self.current, self.since = None, time.monotonic()
                self.ended.add(line["id"])
                yield line

    def finish(self):
        """End it; what is left of its tests, and the output."""
        processes.end(self.process)
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        self.output.close()
        return [one for one in self.ids if one not in self.ended], text


def run_batch(ids, limit, deadline, tell, folder, dry):
    """Run tests in processes until each has a result; tell(result) of each. limit: seconds of a test."""
    while ids and time.monotonic() < deadline:
        running, hung = Running(ids, folder, dry), False
        while running.process.poll() is None and time.monotonic() < deadline:
            for line in running.lines():
                tell(line)
            if time.monotonic() - running.since > (limit if running.current else STARTING):
                hung = True
                break
            time.sleep(0.05)
        code, late = running.process.poll(), time.monotonic() >= deadline
        for line in running.lines():
            tell(line)
        left, text = running.finish()
        if not left or (late and code is None and not hung):
            return left
        begun = running.current
        broken = code == 70 and begun is None  # after a failure that was told: the others go on
        if not broken:
            name = begun or left[0]
            why = f"took more than {limit:.0f} s" if hung else f"the process ended: {ended(code)}"
            tell({"id": name, "outcome": "hung" if hung else "crashed", "why": why, "text": text[-4000:], "seconds": 0})
            left = [one for one in left if one != name]
        ids = left
    return ids


def ended(code):
    return processes.Done(code, 0, "").why()


def run(report, deadline, *, jobs, limit, dry=False, only=None, names=None):
    """Run the tests of some files; whether none failed. only: a function that picks some of the ids."""
    path = report.folder / "tests.jsonl"
    results = found_before(path)
    with tempfile.TemporaryDirectory(prefix="cyflash-session-") as folder:
        ids, errors = collect(names or files(), folder, dry)
        for error in errors:
            report.say(f"NOT COLLECTED {error}")
        wanted = only(ids) if only else ids
        ids = [one for one in wanted if one not in results]
        before = len(wanted) - len(ids)
        report.say(f"{len(ids)} tests, {jobs} processes, {limit:.0f} s each at most; {before} done before")
        lock = threading.Lock()
        stream = path.open("a")

        def tell(result):
            with lock:
                result.pop("event", None)
                results[result["id"]] = result
                stream.write(json.dumps(result) + "\n")
                stream.flush()
                if result["outcome"] not in ("passed", "skipped"):
                    why = " ".join(result.get("why", "").split())[:600]
                    report.say(f"{result['outcome'].upper()} {result['id']}: {why}")
                    report.add_log(result["id"], result.get("text", ""))

        for these in stages(ids):
            _run_stage(these, jobs, limit, deadline, tell, folder, dry)
        stream.close()
        for one in ids:
            results.setdefault(one, {"id": one, "outcome": "not run", "seconds": 0})
    report.keep("tests", list(results.values()))
    found = [results[one] for one in wanted]
    summarise(report, found)
    return not errors and all(one["outcome"] in ("passed", "skipped") for one in found)


def found_before(path):
    """{id: result} of an earlier session in the same folder; its last line may be cut short."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            one = json.loads(line)
            found[one["id"]] = one
    return found


def stages(ids):
    """The files of FIRST, what lies between, those of LAST."""
    def place(one):
        return 0 if any(name in one for name in FIRST) else 2 if any(name in one for name in LAST) else 1

    return [[one for one in ids if place(one) == stage] for stage in range(3)]


def _run_stage(ids, jobs, limit, deadline, tell, folder, dry):
    batches = queue.SimpleQueue()
    size = max(1, min(BATCH, len(ids) // (2 * jobs)))
    for at in range(0, len(ids), size):
        batches.put(ids[at : at + size])

    def work():
        while time.monotonic() < deadline:
            try:
                batch = batches.get_nowait()
            except queue.Empty:
                return
            run_batch(batch, limit, deadline, tell, folder, dry)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def summarise(report, results):
    """How many of each file ended how, and why some were skipped."""
    counts, skipped = {}, {}
    for one in results:
        file = one["id"].partition("::")[0].rpartition("/")[2]
        counts.setdefault(file, {}).setdefault(one["outcome"], []).append(one["seconds"])
        if one["outcome"] == "skipped":
            skipped[one.get("why", "")] = skipped.get(one.get("why", ""), 0) + 1
    for file, outcomes in counts.items():
        told = ", ".join(f"{len(seconds)} {outcome}" for outcome, seconds in sorted(outcomes.items()))
        report.say(f"{file}: {told}; {sum(sum(seconds) for seconds in outcomes.values()):.0f} s")
    for why, times in skipped.items():
        report.say(f"skipped {times} times: {why}")
