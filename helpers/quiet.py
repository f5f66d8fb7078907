"""Start-up notes that libraries write to stderr from C++, where no setting of their own holds them back."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what this process and its children write to stderr; an exception lets it out.

    It works on the file descriptor, so it also reaches C++. Threads of this process are silent too.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            held.seek(0)
            with open(kept, "wb", closefd=False) as stderr:
                stderr.write(held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
