"""``python -m sfumato``, and the ``sfumato`` command."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is somebody to tell of it, it ends without a traceback

from sfumato.cli import main

if __name__ == "__main__":
    sys.exit(main())
