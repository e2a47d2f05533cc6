"""A kernel for nbmake that imports nothing anew: a fork of the warm process at $TEST_WARM, which is waited for here.

python -m warm_kernel CONNECTION_FILE
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing import forkserver


def serve(connection_file: str, env: dict[str, str], folder: str) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, "")
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()
    IPKernelApp.launch_instance(argv=["-f", connection_file])


if __name__ == "__main__":
    server, (_, alive) = forkserver._forkserver, os.pipe()
    server._forkserver_address, server._forkserver_alive_fd = os.environ["TEST_WARM"], alive
    server.ensure_running = lambda: None
    arguments = sys.argv[1], dict(os.environ), os.getcwd()
    process = multiprocessing.get_context("forkserver").Process(target=serve, args=arguments)
    process.start()
    process.join()
    sys.exit(process.exitcode)
