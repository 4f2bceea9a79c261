"""
All tests in two processes, where there are two cores: a plugin of pytest, which test_all.py names.

When the tests are collected, a second pytest starts with the same words and takes one half of them; what it printed
comes at the end, and its failures are failures, of which --lf does not know. Few tests, those of one topic (-k), those
that failed (--lf, --ff, --sw) and slow ones, which measure time, run in one process as without this.
"""
import os
import signal
import subprocess
import sys
import tempfile

import pytest

FEW, SECOND = 150, "SECOND_HALF"                               # the latter stands in the second one's environment
WHOLE = ("keyword", "lf", "failedfirst", "newfirst", "stepwise", "usepdb", "trace", "collectonly", "basetemp",
         "xmlpath")                                            # options of pytest that want one process
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.environ.get(SECOND):                                     # in the background of a shell it would hear no SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)


def divided(items):
    """
    [those of the first half, the others]: the first are those of train.py in test_all.py, and those of its runs, but
    for those of pipelines, which the second has made.
    """
    with open(os.path.join(HERE, "test_all.py")) as f:
        start = next(n for n, line in enumerate(f) if line.startswith("# ---- train.py"))
    halves = [], []
    for item in items:
        code = item.function.__code__
        own = code.co_filename.endswith("test_all.py") and code.co_firstlineno > start
        halves["runs" not in item.fixturenames and (not own or "pipelines" in item.fixturenames)].append(item)
    return halves


def pytest_collection_modifyitems(config, items):
    second, whole = os.environ.get(SECOND), any(getattr(config.option, name, None) for name in WHOLE)
    if not second and (whole or os.environ.get("SLOW") or len(items) < FEW or CORES < 2):
        return
    halves = divided(items)
    items[:] = halves[bool(second)]
    if not second:
        config.second = Second(halves[1])
        config.pluginmanager.register(config.second)


class Second:
    """The other half: a pytest of its own, and what becomes of it."""

    def __init__(self, items):
        self.output, self.count = tempfile.TemporaryFile("w+"), len(items)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT,
                                        env=os.environ | {SECOND: "1"})

    def pytest_report_collectionfinish(self):
        return f"{self.count} of them in a second process, which reports at the end"

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            self.process.terminate()
        elif session.shouldfail:                               # -x, --maxfail: as Ctrl-C, so that it can tidy up
            self.process.send_signal(signal.SIGINT)
        if self.process.wait() and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        self.output.seek(0)
        terminalreporter.section("the second process")
        terminalreporter.write(self.output.read())


TESTS = """
import os, time, pytest

@pytest.fixture
def runs():
    pass

def test_of_the_first(runs):
    assert "SECOND_HALF" not in os.environ and "STOP" not in os.environ

@pytest.mark.parametrize("number", range(160))
def test_of_the_second(number):
    time.sleep(60 * ("STOP" in os.environ))
    assert "SECOND_HALF" in os.environ and (number != 7 or "FAULT" not in os.environ)
"""


@pytest.mark.skipif(CORES < 2, reason="one core")
def test_the_second_half_is_told_and_fails_as_the_first(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)

    def outcome(*words, **environment):
        command = [sys.executable, "-m", "pytest", "-p", "lib.test_halves", f"{tmp_path}/test_it.py", *words,
                   f"--rootdir={tmp_path}"]                    # else that depends on where this repository lies
        clean = {key: value for key, value in os.environ.items() if key not in (SECOND, "SLOW", "PYTEST_ADDOPTS")}
        done = subprocess.run(command, cwd=HERE, env=clean | environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    status, said = outcome()
    assert status == 0 and "160 of them in a second process" in said and "160 passed" in said and "1 passed" in said
    status, said = outcome(FAULT="1")
    assert status == 1 and "test_of_the_second[7]" in said and "1 failed, 159 passed" in said and "1 passed" in said
    status, said = outcome("--lf")                             # of what a second one would know nothing
    assert status == 1 and "160 failed, 1 passed" in said
    status, said = outcome("-x", STOP="1")                     # does not wait for the other half
    assert status == 1 and "1 failed" in said and "160 passed" not in said
    status, said = outcome("-k", "second")                     # one topic: one process
    assert status == 1 and "160 failed, 1 deselected" in said
