"""New processes that need not import torch, transformers and kvbench: forks of one that imported them and did no more.

Importing takes some 6 s of processor time, which each command of an installed package would pay anew. A fork has what a
process has that was started for the command, and finds plugins itself: the one that it comes from looked for none.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTED = [
    "transformers.models.llama.modeling_llama", "transformers.generation.utils", "kvbench.strategies",
    "kvbench.indexes", "kvbench.analysis", "kvbench.tasks", "kvbench.runs.runner", "kvbench.cli",
]  # fmt: skip


class Prepared:
    """Runs scripts and commands with a given Python, each in a new process."""

    def __init__(self, python=sys.executable):
        self.python = python
        self._folder = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        atexit.register(self.close)

    def close(self):
        """End the process that others are forks of."""
        self._server.communicate()
        self._folder.cleanup()

    def run(self, script, *arguments):
        """Run `script`, a file or the name of a module, as `python script` does."""
        out, err = (Path(self._folder.name, name) for name in ("out", "err"))
        words = [str(script), *map(str, arguments)]
        self._server.stdin.write(json.dumps([words, str(out), str(err)]) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())

    def kvbench(self, *arguments):
        """Run the command."""
        return self.run("kvbench.cli.__main__", *arguments)


def serve():
    """Fork for each line of stdin: the words of a command, and the files of its output."""
    for name in IMPORTED:
        importlib.import_module(name)
    know_imports()
    gc.freeze()  # else the collector writes to every page of what was imported, and each is copied
    while line := sys.stdin.readline():
        words, *files = json.loads(line)
        pid = os.fork()
        if not pid:
            for number, file in enumerate([os.devnull, *files]):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            code = execute(words)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)  # taking all that was imported apart would cost more than the command
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def know_imports():
    """Read what kvbench's own modules import, which the identity of every plugin asks for again in each command."""
    from kvbench import identity

    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] == "kvbench" and file:
            identity._imports(Path(file).read_bytes(), name, hasattr(module, "__path__"))


def execute(words):
    """Run a script, or a module, as the only one of a process; its exit code."""
    sys.argv = words
    try:
        if words[0].endswith(".py"):
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # what lies beside this file is not for those who run
    serve()
    os._exit(0)
