"""`capdist features`, once for each of FAULTS, with one thing going wrong each time; exit codes go to CODES_<rank>.

kill:0:3     SIGKILL between writing the third batch and marking it done
error:1:2    rank 1 cannot encode its second batch
term:1:2     SIGTERM to rank 1 when it has its second batch
none         nothing goes wrong
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

from capdist import cli  # noqa: E402
from capdist.errors import DataError  # noqa: E402
from capdist.features import store as features  # noqa: E402

rank = os.environ.get("RANK", "0")
put, flush = features.StoreWriter.put, features.StoreWriter.flush
batches, fault = 0, ""


def faulty_put(self, rows, values):
    global batches
    batches += 1
    if fault == f"error:{rank}:{batches}":
        raise DataError("photo.jpg: broken")
    if fault == f"term:{rank}:{batches}":
        os.kill(os.getpid(), signal.SIGTERM)
    put(self, rows, values)


def faulty_flush(self):
    if fault == f"kill:{rank}:{batches}":
        os.kill(os.getpid(), signal.SIGKILL)
    flush(self)


features.StoreWriter.put, features.StoreWriter.flush = faulty_put, faulty_flush
features.FLUSH_EVERY_S = 0 if os.environ["FAULTS"].startswith("kill") else 3600

if __name__ == "__main__":
    for fault in os.environ["FAULTS"].split():  # noqa: B007
        batches = 0
        try:
            cli.main(["features", *sys.argv[1:]])
        except SystemExit as end:
            with open(f"{os.environ['CODES']}_{rank}", "a") as file:
                print(end.code, file=file)
