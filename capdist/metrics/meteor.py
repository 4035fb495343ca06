"""METEOR 1.5, the only metric that needs Java. It may be missing or fail, but it never hangs.

`pycocoevalcap` talks to the METEOR jar over pipes, and four things can go wrong. If Java dies, it waits endlessly for
its own lock. With a German locale Java writes `0,5`, which it cannot read as a number. An ASCII locale spoils accents,
and a full error pipe stops both sides. This module therefore starts the process itself, with a fixed locale, and always
ends it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import tempfile
import threading
from typing import IO

from pycocoevalcap.meteor import meteor as reference

SECONDS = 300.0
"""How long Java may take before it is stopped; loading its tables alone takes about 10 s."""
SECONDS_PER_IMAGE = 0.1


def meteor(
    references: dict[int, list[str]], hypotheses: dict[int, list[str]], *, seconds: float | None = None
) -> tuple[float | None, str | None]:
    """Score captions with METEOR 1.5 (English, all its modules, text normalised).

    Args:
        references: For each image its captions, tokens joined by spaces.
        hypotheses: Maps each image to a list of one caption, tokens joined by spaces.
        seconds: How long Java may take; by default 300 and a tenth for each image.

    Returns:
        The corpus score, 0..1, and None; or None and why there is no score, in one line.
    """
    java = shutil.which("java")
    if java is None:
        return None, "no `java` on PATH; METEOR needs a Java runtime (8 or newer)"
    seconds = SECONDS + SECONDS_PER_IMAGE * len(hypotheses) if seconds is None else seconds
    with tempfile.TemporaryFile() as errors:
        try:
            scorer = _Meteor(java, errors)
        except OSError as error:
            return None, f"{java} did not start: {error.strerror}"
        try:
            score = scorer.score_within(seconds, _clean(references), _clean(hypotheses))
            # If all captions are empty, the jar divides 0 by 0.
            return (score if math.isfinite(score) else 0.0), None
        except (OSError, ValueError):  # a broken pipe, or an end of file instead of a number
            return None, scorer.failure(seconds)
        finally:
            scorer.close()


class _Meteor(reference.Meteor):
    """The reference's conversation with the jar over a process that we start and end."""

    def __init__(self, java: str, errors: IO[bytes]) -> None:
        # The parent's constructor is left out: it starts a Java of its own.
        locale = ["-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
        options = ["-", "-", "-stdio", "-l", "en", "-norm"]
        self.errors = errors
        self.timed_out = False
        self.lock = threading.Lock()
        self.meteor_p = subprocess.Popen(
            [java, *locale, "-Xmx2G", "-jar", reference.METEOR_JAR, *options],
            cwd=os.path.dirname(os.path.abspath(reference.__file__)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )

    def score_within(self, seconds: float, references: dict[int, list[str]], hypotheses: dict[int, list[str]]) -> float:
        """Return the score; stop Java after `seconds`, which then shows as a ValueError or OSError."""
        watchdog = threading.Timer(seconds, self._time_out)
        watchdog.daemon = True
        watchdog.start()
        try:
            score, _ = self.compute_score(references, hypotheses)
        finally:
            watchdog.cancel()
        return float(score)

    def failure(self, seconds: float) -> str:
        """Return in one line why there was no score: too slow, or the first error that Java printed."""
        if self.timed_out:
            return f"java gave no METEOR score within {seconds:.0f} s"
        self.close()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").splitlines()
        complaint = next((line.strip() for line in lines if line.strip()), "no message")
        return f"java ended with code {self.meteor_p.returncode}: {complaint}"

    def close(self) -> None:
        """End Java and wait until it is gone; harmless when repeated."""
        if self.meteor_p.poll() is None:
            self.meteor_p.kill()
        self.meteor_p.wait()
        for pipe in filter(None, (self.meteor_p.stdin, self.meteor_p.stdout)):
            with contextlib.suppress(OSError):  # the rest of the output cannot be written any more
                pipe.close()

    def _time_out(self) -> None:
        self.timed_out = True
        self.meteor_p.kill()

    def __del__(self) -> None:
        """Do nothing: the parent's method would wait for a lock that a failed conversation never released."""


def _clean(captions: dict[int, list[str]]) -> dict[int, list[str]]:
    """Return the captions without characters that have a meaning in the line protocol of the jar."""
    return {
        image: [" ".join(caption.replace("|||", " ").split()) for caption in lines] for image, lines in captions.items()
    }
