"""The Ray cluster that a command line runs on."""

import logging
import os
import signal
import socket
from functools import partial
from pathlib import Path

import psutil

from entropy_masking import storage
from entropy_masking.commands import console
from entropy_masking.errors import RunError, UsageError, one_line

OBJECT_STORE_BYTES = 128 << 20  # descriptors and records are small; Ray would reserve a third of the memory
CONNECT_SECONDS = 10.0
TOKEN_FIX = "set RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head node"


def check_kept(flag: str, output: str) -> None:
    """Raises UsageError if the output would be deleted with the working directory of a Ray job."""
    kept = storage.is_remote(output) or Path(storage.local_path(output)).is_absolute()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not kept:
        lost = "would be deleted with the working directory of the Ray job"
        raise UsageError(f"{flag} {output} {lost}; name an absolute path")


def address() -> str | None:
    """The cluster to join: that of RAY_ADDRESS, of the submitted job, or of a `ray start` here; None if there is none.

    Call it before ``import ray``, because Ray reads its environment when it is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if _has_token():  # then `ray start` asks for it, but Ray does not send it to an address that is given
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # no public function finds a `ray start` here without also finding a cluster that another run started for itself
    from ray._private.services import find_bootstrap_address

    return os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)


def connect(*applications: str, cpus: int | None = None) -> None:
    """Join the cluster of ``address``, unless that is done; else start one for this run.

    Call it before ``import ray``. Workers import ``applications`` besides the library. A new cluster has at least
    ``cpus``.

    Raises:
        UsageError: the cluster cannot be joined.
        RunError: Ray does not start here.
    """
    cluster = address()
    import ray

    if ray.is_initialized():
        return
    # Ray's own handlers of SIGTERM would end this process with another exit code and without cleaning up
    ray._private.utils.set_sigterm_handler = lambda _handler: None
    # while it starts, the core of Ray replaces the handlers; if a signal raised an exception before Ray has stored the
    # core, Ray would crash at the exit
    ray._private.worker.connect = console.hold_signals()(ray._private.worker.connect)
    root = Path(__file__).resolve().parents[2]
    modules = [str(root / package) for package in ("entropy_masking", *applications)]
    start = partial(ray.init, runtime_env={"py_modules": modules}, log_to_driver=False, logging_level=logging.ERROR)
    if cluster:
        _check_address(cluster)
        console.note(f"joining the Ray cluster at {cluster} …")
        try:
            start(cluster)
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            refused = f"the Ray cluster at {cluster} refuses the connection ({one_line(error)})"
            fix = "run the command on one of its nodes, with the same versions of Ray and Python"
            raise UsageError(f"{refused}; {fix}") from None
    else:
        console.note("starting Ray on this machine …")
        # listen on the loopback address only, as Ray does by default where it has no clusters of several machines
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        cores = max(cpus, psutil.cpu_count() or 1) if cpus else None
        before = psutil.Process().children()
        try:
            start("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, num_cpus=cores)
        except KeyboardInterrupt:
            begun = [child for child in psutil.Process().children() if child not in before]
            for process in [below for child in begun for below in (child, *child.children(recursive=True))]:
                process.kill()  # some of them would live for a minute
            raise
        except Exception as error:  # of no class of its own, as where a busy machine lets it time out
            reason = f"Ray did not start on this machine ({one_line(error)})"
            raise RunError(f"{reason}; try again when it is less busy, or read /tmp/ray/session_latest/logs") from None


def disconnect() -> None:
    """Leave the cluster, and end it if this process has started it."""
    import ray

    ray.shutdown()
    # the core of Ray has replaced the handler without Python's knowledge
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _check_address(address: str) -> None:
    """Raises UsageError if no Ray cluster answers at this address, or if it does not accept this user's token.

    Ray itself would try for minutes, and would not name the cause.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise UsageError(f"RAY_ADDRESS {address} is not HOST:PORT; name the head node, such as HEAD:6379, or unset it")
    if os.environ.get("RAY_AUTH_MODE") == "token" and not _has_token():
        raise UsageError(f"RAY_AUTH_MODE is token, but this user has no token; {TOKEN_FIX}")
    fix = "unset RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "forget the last one with `ray stop`"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError:
        raise UsageError(f"nothing answers at {address}; start a Ray cluster there, or {fix}") from None
    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        refused = f"the Ray cluster at {address} asks for a token, and this user's is missing or wrong"
        raise UsageError(f"{refused}; {TOKEN_FIX}, and unset RAY_AUTH_MODE unless it is token") from None
    except ray.exceptions.RayError:
        reason = f"the service at {address} does not answer as the head of a Ray cluster"
        raise UsageError(f"{reason}; name the port of `ray start`, by default 6379") from None


def _has_token() -> bool:
    """Whether this user has a token for Ray clusters."""
    return (
        bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys())
        or (Path.home() / ".ray" / "auth_token").exists()
    )
