"""What a session found, in files that are complete whenever it is cut off: report.txt to read, report.json to keep."""
import json
import os
import time
from pathlib import Path


class Report:
    """A folder's report. `found` is what goes to report.json; a session that goes on begins with what is there."""

    def __init__(self, folder, fresh):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in ("report.json", "tests.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        self.path = self.folder / "report.json"
        self.found = self._earlier()
        self.begin = time.monotonic()
        self.text = (self.folder / "report.txt").open("w" if fresh else "a")
        self.log = (self.folder / "log.txt").open("w" if fresh else "a")

    def _earlier(self):
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}

    def say(self, *lines):
        """Print, and write to report.txt."""
        for line in lines:
            print(line, flush=True)
            self.text.write(f"{line}\n")
        self.text.flush()
        os.fsync(self.text.fileno())

    def title(self, text):
        seconds = time.monotonic() - self.begin
        self.say("", f"== {text} [{seconds // 60:.0f}:{seconds % 60:02.0f}]")

    def keep(self, name, value):
        """Put something into report.json, which is never half written."""
        self.found[name] = value
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1, default=str))
        os.replace(part, self.path)

    def add_log(self, title, text):
        """Whole outputs of processes, in log.txt."""
        self.log.write(f"---- {title}\n{text}\n")
        self.log.flush()
