"""Stop Python code that runs in another thread, between two of its bytecodes."""

import ctypes
import sys
import threading


def interrupt(thread: threading.Thread, with_exception: type[BaseException] = KeyboardInterrupt) -> None:
    """Raise the exception in the thread, as soon as it comes back from C code.

    Code that is blocked in C (a sleep, a socket, one long kernel) hears of it only when that is over. Nothing happens
    where the thread has ended, imports (libraries such as torch cannot be imported again after an import that was
    broken off) or starts another thread (which has its number at first, so that the exception would kill the new one,
    and leave this one waiting for it). So who interrupts looks whether it helped, and does it again.
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
