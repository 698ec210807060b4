"""How the tools refuse: in one line on stderr, with exit status 2 and nothing on stdout."""

import pytest


def refusal(capsys, main, words):
    """The line with which ``main`` refuses ``words``; lines of progress may come before it."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    out, err = capsys.readouterr()
    *before, line = err.splitlines()
    assert stop.value.code == 2 and out == "" and err.endswith("\n"), (stop.value.code, out, err)
    assert ": error: " in line and not any("error: " in each or "Traceback" in each for each in before)
    return line
