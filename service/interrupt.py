"""Stop Python code that runs in another thread, between two of its bytecodes."""

import ctypes
import sys
import threading


def interrupt(thread: threading.Thread, with_exception: type[BaseException] = KeyboardInterrupt) -> None:
    """Raise the exception in the thread, as soon as it comes back from C code.

    Code that is blocked in C (a sleep, a socket, one long kernel) gets the exception only after that. Nothing happens
    if the thread has ended; if it imports (an interrupted import of a library such as torch cannot be repeated); or if
    it starts another thread (which has the number of its starter at first: the exception would kill the new thread, and
    its starter would wait for it for ever). So the caller checks whether the interrupt helped, and repeats it.
    """
    if thread.ident is not None and thread.is_alive() and not _is_delicate(thread.ident):
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(with_exception))


def _is_delicate(ident: int) -> bool:
    frame = sys._current_frames().get(ident)
    while frame is not None:
        if frame.f_code is threading.Thread.start.__code__ or frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
