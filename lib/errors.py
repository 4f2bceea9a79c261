"""Errors for people, `error: WHAT: HOW TO FIX`, without torch: bad input is refused before that is imported."""
import json
import os
import signal
import sys
import time

PATIENCE = 3                                                   # seconds: a busy machine starts processes apart


def get_rank():
    """Number of this process among all, as torchrun tells it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def print_error(message, wait=None):
    """
    `error: MESSAGE` on standard error, once. An error that all processes meet is printed by rank 0, and torchrun stops
    the others while they wait for that; one that rank 0 does not meet is printed after PATIENCE, with its rank. `wait`:
    PATIENCE first, so that another process may speak; by default all but rank 0 do.
    """
    wait = get_rank() > 0 if wait is None else wait
    if wait:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)          # by which torchrun stops them: at once, without a word
        time.sleep(PATIENCE)
    message = f"rank {get_rank()}: {message}" if get_rank() > 0 else message
    print(f"error: {message}", file=sys.stderr, flush=True)
    # torchrun ends with a traceback of its own, which cannot be switched off; this makes the message its last line
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(file, "w") as f:
            about = {"py_callstack": f"error: {message}", "timestamp": int(time.time())}
            json.dump({"message": {"message": message, "extraInfo": about}}, f)
