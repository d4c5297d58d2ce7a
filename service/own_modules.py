"""Where the modules of this process come from, for the processes that it starts."""

import os
import sys


def own_modules() -> str:
    """PYTHONPATH for a child that is started with ``-P``.

    The child has the modules of this process, and none out of the folder where a person stands: a
    folder there that is called ``service`` would otherwise be run.
    """
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
