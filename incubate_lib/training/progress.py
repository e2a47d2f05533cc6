"""Progress of a training phase: a status file, and for people a bar, or plain lines in a log."""

import os
import sys
import time

from tqdm import tqdm

from incubate_lib.training.runs import PhaseFolder

LINE_SECONDS = 5.0  # between plain lines; papermill keeps every refresh of a bar as an output


class Progress:
    """Tells how far a phase is, at most once a second on disk."""

    def __init__(self, folder: PhaseFolder, title: str, steps: int, start: int, score: str) -> None:
        self.score = score  # what the score is called
        self.folder, self.title, self.steps, self.start = folder, title, steps, start
        self.began = self.last_line = time.monotonic()
        headless = bool(os.environ.get("INCUBATE_HEADLESS")) or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = None if headless else tqdm(desc=title, total=steps, initial=start, unit="step", file=sys.stdout, mininterval=1)

    def update(self, step: int, **values: float | None) -> None:
        """Record the step and values such as loss and score, with an ETA from this attempt's own speed."""
        now = time.monotonic()
        done = step - self.start
        eta = (now - self.began) / done * (self.steps - step) if done else None
        shown = {k: v for k, v in values.items() if v is not None}
        self.folder.set_status(progress={"step": step, "steps": self.steps, "eta_seconds": eta} | shown)
        words = ", ".join(f"{self.score if k == 'score' else k} {v:.3f}" for k, v in shown.items())
        if self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_line >= LINE_SECONDS or step == self.steps:
            self.last_line = now
            print(f"{self.title}: step {step}/{self.steps}, {words}, ETA {eta or 0:.0f} s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
