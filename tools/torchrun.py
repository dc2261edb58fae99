"""torchrun for the ``dist_`` scripts: the exit status of the tool, and no trace of torchrun itself.

Takes torchrun's arguments. Plain torchrun exits with 1 whatever happened and puts a page of its
own trace under the one sentence that matters.
"""

from __future__ import annotations

import signal
import socket
import sys

if __name__ == '__main__':
    # The folder of the tools is no place to import from: it has a `test` and a `train`.
    del sys.path[0]

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_FREE_PORT = '--master_port=0'


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as server:
        server.bind(('', 0))
        return server.getsockname()[1]


def main(argv: list[str]) -> int:
    """Run torchrun.

    Args:
        argv: Its arguments; ``--master_port=0`` means any free port.

    Returns:
        Status of the rank that failed first, 128 + n after signal n, or 0.
    """
    argv = [f'--master_port={free_port()}' if arg == _FREE_PORT else arg for arg in argv]
    try:
        torchrun(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        status = failure.exitcode
        return 128 - status if status < 0 else status
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
