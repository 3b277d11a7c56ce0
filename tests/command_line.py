"""What `python -m PROGRAM ARGUMENTS` does, in the process that tests it, whose imports are done."""

import importlib
import io
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra


def command_line(program, arguments):
    """.returncode, .stdout and .stderr, as of a finished process. `program`: a module with a function main."""
    main = importlib.import_module(program).main
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    handlers, level = logging.root.handlers[:], logging.root.level  # Hydra's own, to stdout, takes their place
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            GlobalHydra.instance().clear()
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())
