"""Where the trials of a search lie: a journal file, or a database by its URL. Both are Optuna's own storages."""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrim.errors import CheckpointError, InputError, MissingDependencyError

__all__ = ["JOURNAL", "errors_of", "hide_password", "import_optuna", "open_storage", "quiet"]

JOURNAL = "trials.journal"
"""Name of the journal in the folder of a run."""

_ATTEMPTS = 5
"""To open a database whose tables another process is just making."""

_LOCK_SECONDS = 10
"""A lock on a journal that is older belongs to a process that was killed."""

_DRIVERS = {"psycopg": "postgresql", "psycopg2": "postgresql"}
"""Driver -> extra that installs one for the same database."""


def import_optuna(purpose: str) -> Any:
    """The package ``optuna``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingDependencyError("optuna", "search", purpose) from error
    return optuna


def open_storage(where: str | Path) -> Any:
    """Open, or make, a storage of trials.

    Args:
        where: a file (an Optuna journal, which many processes of one machine or of a network file system may share), or a
            URL as SQLAlchemy knows it: ``sqlite:///trials.db``, ``postgresql://user@host/db``, ``mysql+pymysql://…``.

    Raises:
        MissingDependencyError: Optuna or the driver of the database is not installed.
        InputError: not a URL, or the database cannot be reached.

    Example:
        >>> storage = open_storage("postgresql://me@db.example/trials")
    """
    optuna = import_optuna("keeping the trials of a search")
    if "://" not in str(where):
        return _journal(optuna, Path(where))
    url = _with_driver(str(where))
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    for attempt in range(_ATTEMPTS):
        try:
            with quiet():
                return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            raise _no_driver(url, error) from error
        except Exception as error:  # sqlalchemy and the drivers raise anything
            if attempt + 1 == _ATTEMPTS or not _half_made(error):
                raise _unusable(url, error) from error
            time.sleep(0.2 * 2**attempt)
    return None


@contextmanager
def errors_of(where: str) -> Iterator[None]:
    """Inside, failures of a storage become errors that name it.

    Raises:
        CheckpointError: the storage could not be read or written.
    """
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        raise CheckpointError(
            f"the trials in '{hide_password(where)}' could not be read or written: {_first_line(error, where)}. What is "
            "finished is kept there: start the search again with resume=True once the storage answers."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna neither logs below warnings nor warns of experimental parts."""
    from optuna.exceptions import ExperimentalWarning

    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        logger.setLevel(level)


def hide_password(where: str | Path) -> str:
    """A storage as it may be shown and written down."""
    scheme, mark, rest = str(where).partition("://")
    user, at, host = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{scheme}{mark}{name}{at}{host}" if mark and at and colon else str(where)


def _journal(optuna: Any, path: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    if path.is_dir():
        raise InputError(f"storage: '{path}' is a folder. Expected a file, such as {path / JOURNAL}, or a URL.")
    full = path.resolve()  # the lock is a link to it, and is judged by what it leads to
    full.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(full), grace_period=_LOCK_SECONDS)
    if full.exists():
        lock.acquire()
        try:
            _cut_torn_line(full)
        finally:
            lock.release()
    return optuna.storages.JournalStorage(JournalFileBackend(str(full), lock))


def _cut_torn_line(path: Path) -> None:
    """Leave out a last line that was never finished: it would spoil the one that is written behind it."""
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)


def _with_driver(url: str) -> str:
    """PostgreSQL by the driver that is installed: SQLAlchemy alone would only look for the older one."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            old = importlib.util.find_spec("psycopg2") is not None
            return ("postgresql+psycopg2://" if old else "postgresql+psycopg://") + url.removeprefix(scheme)
    return url


def _no_driver(url: str, error: ImportError) -> Exception:
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "name", None):
        cause = cause.__cause__
    package = getattr(cause, "name", None) or "a driver"
    if package in _DRIVERS:
        return MissingDependencyError(package, _DRIVERS[package], f"the storage '{hide_password(url)}'")
    return InputError(
        f"storage: '{hide_password(url)}' needs the package '{package}', which is not installed. Install it with pip."
    )


def _unusable(url: str, error: BaseException) -> InputError:
    return InputError(
        f"storage: cannot open '{hide_password(url)}': {_first_line(error, url)}. Expected the path of a journal file, or a "
        "URL such as sqlite:///trials.db or postgresql://user@host/database."
    )


def _half_made(error: BaseException | None) -> bool:
    """Whether another process was making the same tables just now."""
    while error is not None:
        if any(word in str(error) for word in ("already exists", "duplicate key", "UNIQUE constraint", "locked")):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException, url: str) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return text.replace(url, hide_password(url))
