"""A plugin of pytest in the processes that tests.py starts: writes a line of JSON when a test begins and when it ends.

The file is CYFLASH_SESSION_RECORD. A process whose GPU a test has left broken ends at once: later tests would fail for
that alone.
"""
import json
import os
import sys

BROKEN = 70  # exit status

record = open(os.environ["CYFLASH_SESSION_RECORD"], "a")  # noqa: SIM115  as long as the process
_outcomes = {}


def write(**line):
    record.write(json.dumps(line) + "\n")
    record.flush()


def pytest_collection_finish(session):
    write(event="collected", ids=[item.nodeid for item in session.items])


def pytest_collectreport(report):
    if report.failed:
        write(event="not collected", id=report.nodeid, why=str(report.longrepr)[-2000:])


def pytest_runtest_logstart(nodeid, location):
    _outcomes[nodeid] = {"outcome": "passed", "seconds": 0.0}
    write(event="begin", id=nodeid)


def pytest_runtest_logreport(report):
    found = _outcomes[report.nodeid]
    found["seconds"] += report.duration
    if report.failed and found["outcome"] != "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        found |= {"outcome": "failed", "why": crash.message if crash else report.longreprtext[-1500:]}
        found["text"] = report.longreprtext[-6000:]
    elif report.skipped:
        found |= {"outcome": "skipped", "why": report.longrepr[2] if isinstance(report.longrepr, tuple) else ""}


def pytest_runtest_logfinish(nodeid, location):
    found = _outcomes.pop(nodeid)
    broken = found["outcome"] == "failed" and why_broken()
    if broken:
        found["broken"] = broken
    write(event="end", id=nodeid, **found)
    if broken:
        record.close()
        os._exit(BROKEN)


def why_broken():
    """Why no later test of this process can succeed, or an empty text."""
    device = sys.modules.get("gpu_on_device")
    if device and device.Device.broken:
        return device.Device.broken
    if "cupy" in sys.modules:
        try:
            sys.modules["cupy"].cuda.runtime.deviceSynchronize()
        except Exception as error:
            return str(error)
    return ""
