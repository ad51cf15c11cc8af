"""Runs the program on standard input within limits; the process that `programs.run` starts, and nothing else.

It takes seconds, bytes of memory, and the exit code that says that the program came to its end. A program that ends
itself gives another one. The first line on standard output says what keeps the network away, the second what went
wrong.
"""

import ctypes
import os
import resource
import sys

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # of Linux's unshare
LARGEST_FILE = 0
TOLD = 300  # characters of what went wrong
PROCESSES = (
    "os.fork",
    "os.forkpty",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "os.kill",
    "os.killpg",
    "subprocess.Popen",
)
FILES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.mkdir",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "shutil.",
    "sqlite3.connect",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: int, memory: int) -> None:
    """Bound what the kernel counts."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def alone() -> bool:
    """Go into a network of one's own, which has no way out; False where the kernel does not let us."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    return unshare is not None and unshare(NEW_USER | NEW_NETWORK) == 0


def refuse(event: str, arguments: tuple) -> None:
    """An audit hook: no sockets, no other processes, no file changed."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(("socket.", *PROCESSES, *FILES)):
        raise PermissionError(f"{event} is not allowed here")


def main() -> None:
    """Run the program; what it prints is thrown away."""
    seconds, memory, ended = map(int, sys.argv[1:])
    del sys.path[0]  # where this file is
    source = sys.stdin.read()
    said, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(nowhere, standard)
    limit(seconds, memory)
    print("namespace" if alone() else "hook", file=said, flush=True)
    sys.addaudithook(refuse)
    try:
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # a program may raise anything, SystemExit among it
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:TOLD], file=said, flush=True)
        os._exit(1)
    os._exit(ended)


if __name__ == "__main__":
    main()
