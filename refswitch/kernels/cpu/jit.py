# May import: standard library, numba, threadpoolctl, scipy, refswitch.errors.
"""How a kernel is compiled, where the machine code is kept, and on how many threads it runs.

`kernel`, `scalar_kernel` and `parallel_kernel` are the only decorators of this package. Nothing is compiled at import: the first call does it, and
the disk keeps it. Numba's own cache looks at the file of a function alone and would serve stale code after a change in a function that it calls
from another file, so the folder's name is a hash of every source that the file imports from here, of Numba's version and of the options and settings
that change the code. No setting of Numba is touched: a program that uses it too keeps its own cache, thread count and threading layer.

Kernels run inside `on_threads`: inside a kernel each thread calls BLAS for itself, and BLAS on threads of its own would be slower and change bits.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config as numba_config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.misc.appdirs import AppDirs
from threadpoolctl import ThreadpoolController

from refswitch.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])
config: Any = numba_config  # its attributes are made at import, which a type checker does not see
PACKAGE = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}  # nogil: the ranks of a world of Python threads run side by side
# prange alone: Numba would also split sums and assignments of whole arrays, and a sum split among threads depends on their number
PRANGE_ONLY: Any = {
    name: name == "prange" for name in ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion", "prange")
}


def kernel(function: Function) -> Function:
    """Compile a function at its first call, for one thread; `.py_func` is the function as written."""
    return _compiled(function, **OPTIONS)


def scalar_kernel(function: Function) -> Function:
    """Compile a function of scalars that becomes a part of the loop that calls it: a loop with a call in it is not vectorized."""
    return _compiled(function, forceinline=True, **OPTIONS)


def parallel_kernel(function: Function) -> Function:
    """Compile a function whose `prange` loops run on the threads of `on_threads`. It costs seconds: put the work into kernels that it calls."""
    return _compiled(function, parallel=PRANGE_ONLY, **OPTIONS)


def imported_sources(file: Path, package: Path = PACKAGE) -> set[Path]:
    """Return a file of the package and every file of the package that it imports, through others too."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(_imports_of(path, package))
    return found


@functools.cache
def _imports_of(file: Path, package: Path) -> tuple[Path, ...]:
    names: list[str] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:  # imports inside functions are of host code
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    paths = [package.parent / Path(*name.split(".")).with_suffix(".py") for name in names if name.startswith(f"{package.name}.")]
    return tuple(path for path in paths if path.exists())


def source_key(file: Path, options: str, package: Path = PACKAGE) -> str:
    """Return what decides whether compiled code of a file is still that of its source; `options` are the decorator's."""
    settings = [numba.__version__, options, *(str(getattr(config, name)) for name in ("BOUNDSCHECK", "OPT", "DEBUGINFO_DEFAULT"))]
    digest = hashlib.sha256(" ".join(settings).encode())
    for path in sorted(imported_sources(file, package)):
        digest.update(os.path.relpath(path, package).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def _key_of(file: str, options: str) -> str:
    return source_key(Path(file).resolve(), options)


class _KeyedLocator(_CacheLocator):
    """A folder of the user's cache directory, or of NUMBA_CACHE_DIR, named by the key."""

    options: str

    def __init__(self, py_func: Callable[..., Any], py_file: str):
        self._py_file = py_file  # Numba names it where it cannot keep a function
        self.key, self.line = _key_of(py_file, self.options), py_func.__code__.co_firstlineno
        root = config.CACHE_DIR or AppDirs(appname="refswitch", appauthor=False).user_cache_dir
        self.folder = Path(root) / "kernels" / f"{Path(py_file).stem}-{self.key}"

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return self.key

    def get_disambiguator(self) -> str:
        return str(self.line)

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _KeyedLocator:
        return cls(py_func, py_file)


class _KeyedCache(FunctionCache):
    def save_overload(self, sig: Any, data: Any) -> None:
        """Save compiled code; where the folder cannot be written, the next process compiles again."""
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError:
            self.disable()  # type: ignore[no-untyped-call]


@functools.cache
def _cache_class(options: str) -> Callable[..., Any]:
    """Return Numba's cache with our folder; it takes its parts as classes that know nothing but the function."""
    locator = type("Locator", (_KeyedLocator,), {"options": options})
    parts = type("Parts", (CompileResultCacheImpl,), {"_locator_classes": (locator,)})
    return type("Cache", (_KeyedCache,), {"_impl_class": parts})


def _compiled(function: Any, **options: Any) -> Any:
    dispatcher: Any = numba.njit(**options)(function)
    if not config.DISABLE_JIT:  # then it is the function itself
        dispatcher._cache = _cache_class(repr(sorted(options.items())))(dispatcher.py_func)
    return dispatcher


class _OneBlasThread:
    """Hold BLAS to one thread while anybody is inside: the first to come limits it, the last to leave restores it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.limit: AbstractContextManager[Any] | None = None

    @functools.cached_property
    def controller(self) -> ThreadpoolController:
        """Every BLAS of the process; looking for them takes milliseconds, limiting them microseconds."""
        import scipy.linalg.cython_blas  # noqa: F401  the one that np.dot inside Numba calls

        return ThreadpoolController()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.limit = self.controller.limit(limits=1, user_api="blas")
                self.limit.__enter__()
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.limit is not None:
                self.limit.__exit__(None, None, None)


one_blas_thread = _OneBlasThread()


@contextmanager
def on_threads(count: int | None = None) -> Iterator[None]:
    """Run kernels on `count` threads, or on as many as Numba has, each calling BLAS for itself.

    May be nested, and entered by several threads of Python at once. While anybody is inside, BLAS has one thread for the whole process.

    Parameters
    ----------
    count : int, threads
        At most NUMBA_NUM_THREADS, which Numba reads when it is imported; by default one per core.

    Raises
    ------
    InputError
        For a count that Numba cannot give.
    """
    most = config.NUMBA_NUM_THREADS
    if count is not None and not 1 <= count <= most:
        raise InputError(
            f"on_threads: {count} threads were asked for, but there are 1 to {most}; NUMBA_NUM_THREADS={count} in the environment gives more"
        )
    _start_threads()
    before = numba.get_num_threads()
    with one_blas_thread:
        numba.set_num_threads(before if count is None else count)
        try:
            yield
        finally:
            numba.set_num_threads(before)


@functools.cache
def _start_threads() -> None:
    """Start Numba's threads in a layer that Python threads may share, unless they have been started: "workqueue" would abort the process."""
    chosen = config.THREADING_LAYER
    try:
        if chosen == "default":
            config.THREADING_LAYER = "threadsafe"
        numba.get_num_threads()  # starts them
    finally:
        config.THREADING_LAYER = chosen
