"""Lets one run of the tests compile each of Inductor's C++ files once, even if caches are emptied meanwhile.

Files are named by their content. Inductor's own caches are not touched: Inductor only sees a fast compiler.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = "WANFAST_TESTS_COMPILED"  # in the environment: processes of one run share it
_COMPILER = r"""#!/bin/sh
# CXX as it was, but for one C++ file into one library: what that gave before, of the same text and options.
out= source= last= key=
for word; do
    case "$last" in -o) out="$word"; word="${word##*.}";; esac
    case "$word" in *.cpp) source="$source$word"; word="";; esac
    last="$word" key="$key $word"
done
case "$out" in *.so) ;; *) exec REAL "$@";; esac
[ -f "$source" ] || exec REAL "$@"
known="$(dirname "$0")/$( (printf %s "$key"; cat "$source") | sha256sum | cut -c1-40)"
exec 9>"$known.lock"
flock 9 2>/dev/null # so that ranks that want the same file at once do not compile it twice
if [ ! -f "$known" ]; then
    REAL "$@" || exit
    cp "$out" "$known.$$" && mv "$known.$$" "$known"
    exit
fi
exec cp "$known" "$out"
"""


def install() -> None:
    """Sets the compiler of this process and of those that it starts; call it before Inductor is imported."""
    if _FOLDER in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="wanfast-tests-"))
    compiler = folder / "g++"
    compiler.write_text(_COMPILER.replace("REAL", os.environ.get("CXX", "g++")))
    compiler.chmod(0o755)
    os.environ |= {_FOLDER: str(folder), "CXX": str(compiler)}
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
