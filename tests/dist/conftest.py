import os
import socket
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def start_ranks():
    """``start_ranks(size, [script, args…], env={})`` runs a Python script once per rank and waits for all of them."""

    def start(size, command, *, env=None, timeout=240, expect=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            ranks.append(subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT,
                                          env=os.environ | {k: str(v) for k, v in place.items()} | (env or {})))
        try:
            said = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        codes = [rank.returncode for rank in ranks]
        assert codes == [expect] * size, f"exit codes {codes}\n" + "\n".join(said)
        return said

    return start
