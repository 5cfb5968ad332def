"""Several processes that share a problem, against one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from . import processes


SCRIPT = pathlib.Path(processes.__file__)


def free_address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def run(directory, what, num):
    # What each found, or its last words.
    address = free_address()
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    environment["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    running = []
    for which in range(num):
        arguments = [str(directory), address, str(num), str(which), what]
        command = [sys.executable, str(SCRIPT), *arguments]
        kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(subprocess.Popen(command, env=environment, **kwargs))
    out = []
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for which, (process, words) in enumerate(zip(running, said)):
        file = directory / f"{what}-{which}.json"
        out.append(json.loads(file.read_text()) if process.returncode == 0 else words)
    return out


def test_processes_share_it(tmp_path):
    expected = processes.solved()
    for found in run(tmp_path, "solve", 4):
        assert np.allclose(found["values"], expected["values"], rtol=1e-7, atol=0)
        # Each has its share of what is large.
        (shape,) = found["share"]
        assert shape == [33, 132]


def test_process_that_dies(tmp_path):
    # The other raises, with what to do; nothing that was learned is lost.
    expected = processes.learned()
    words, _ = run(tmp_path, "die", 2)
    assert "The same call goes on from there" in words and "step(s) of" in words
    first, second = run(tmp_path, "learn", 2)
    assert first["lengthscale"] == second["lengthscale"]
    assert expected["seen"][0] == 1 and first["seen"][0] > 2
    assert np.isclose(first["lengthscale"], expected["lengthscale"], rtol=1e-5)
    objectives = first["objectives"], expected["objectives"]
    assert np.allclose(*map(np.log, objectives), atol=1e-3)
