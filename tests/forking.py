"""Processes forked from one that has imported capsjax, which takes half of a short command's time.

They are as real as others: JAX starts its runtime, threads and devices at their first use, which is
after the fork, and they end as a program does. Run as a program, this file is the server that
forks: it answers each line of its standard input by a line.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings


class Forked:
    """As ``subprocess.Popen`` of ``python -m`` or ``-c``, without input, in its own session."""

    def __init__(self, command, *, cwd, env, stdout, stderr):
        # These are read when Python starts or JAX is imported: others need another server.
        read = sorted(item for item in env.items() if item[0].startswith(("JAX_", "PYTHON")))
        self._server = _server(*read)
        files = [os.devnull, os.path.abspath(stdout.name), os.path.abspath(stderr.name)]
        request = {"command": command, "cwd": str(cwd or os.getcwd()), "env": env, "files": files}
        self.pid, self._code = self._ask(request), None

    def _ask(self, request):
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def poll(self):
        if self._code is None:
            self._code = self._ask(self.pid)
        return self._code

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self._code


def run(*arguments, folder, env=None, timeout=300):
    """As ``subprocess.run`` of Python with ``-m`` or ``-c`` in a folder, where its streams go."""
    streams = [folder / name for name in ("stdout.txt", "stderr.txt")]
    with open(streams[0], "wb") as out, open(streams[1], "wb") as err:
        command = [sys.executable, *map(str, arguments)]
        env = {**os.environ, **(env or {})}
        process = Forked(command, cwd=folder, env=env, stdout=out, stderr=err)
    end = time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    texts = (stream.read_text() for stream in streams)
    return subprocess.CompletedProcess(command, process.poll(), *texts)


@functools.cache
def _server(*variables):
    server = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, **dict(variables)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    atexit.register(server.communicate)  # ends it, with its input
    return server


def _serve():
    """Answers requests; returns only in each forked process, with the command that it runs."""
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        with warnings.catch_warnings():
            # JAX warns that its threads do not survive; it has not started any.
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            return _become(**request)
    sys.exit()


def _become(command, cwd, env, files):
    os.setsid()
    # A terminal must neither end this process nor be gone, as one that nobody holds open is: only
    # with the files open, and its own session, may it be killed and its files be closed elsewhere.
    opened = [os.open(path, os.O_RDWR | os.O_NOCTTY) for path in files]
    print(os.getpid(), flush=True)
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    return command


if __name__ == "__main__":
    sys.path[0] = ""  # as for -m and -c
    for name in ("capsjax.cli", "capsjax.training"):
        importlib.import_module(name)
    gc.freeze()  # the forked processes need not walk it all, above all when they end
    _, how, program, *arguments = _serve()
    sys.argv = [how, *arguments]
    # The end of this file is the end of the process, as of any other.
    if how == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program)
