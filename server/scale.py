"""Replicas of the server on a Ray cluster: `matsteer serve --ray`, or `serve run server.scale:app replicas=2`.

Ray Serve places replicas on GPUs, restarts and counts them, and brings requests to them. A ledger
(`server/ledger.py`), an actor of the deployment that outlives its replicas, keeps their checkpoints the same.
"""

import asyncio
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.config import Settings, load_settings
from server.errors import EngineDown, StartupError
from server.ledger import Change, Follower, Joined, Ledger, LedgerGone, Outcome

log = logging.getLogger(__name__)
APPLICATION = "mat-steer"
LEDGER = "ledger"
SERVE_NAMESPACE = "serve"  # of Ray Serve's actors
HEALTH_CHECK_S, HEALTH_TIMEOUT_S = 5.0, 10.0  # a replica that does not answer three of them in time is replaced
CONSTRUCTIONS = 3  # how often a replica that does not start is tried
SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


def app(args: dict[str, Any]) -> Any:
    """The application for `serve run server.scale:app NAME=VALUE ...` and Ray's config files: `args` are settings.

    Raises StartupError.
    """
    return application(load_settings(**args))


def application(settings: Settings) -> Any:
    """A Ray Serve application of `settings.replicas` replicas. Ray runs already. Raises StartupError."""
    ray, serve = _ray()
    from ray.serve.config import AutoscalingConfig, DeploymentActorConfig, RequestRouterConfig

    gpus = replica_gpus(settings, lambda: ray.cluster_resources().get("GPU", 0) > 0)
    settings = replica_settings(settings, gpus)
    rows = settings.step_limits("cuda" if gpus else "cpu").max_num_seqs
    ledger = DeploymentActorConfig(
        name=LEDGER,
        actor_class=ray.remote(Ledger),
        init_kwargs={
            "root": settings.checkpoints,
            "model": settings.served_name,
            "is_alive": _is_alive,
            "remember": settings.remember,
            "active": settings.checkpoint is not None,
        },
        actor_options={"num_cpus": 0},
    )
    options: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        options = {
            "num_replicas": None,
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas, max_replicas=settings.max_replicas, target_ongoing_requests=rows
            ),
        }
    if settings.session_affinity:
        options["request_router_config"] = RequestRouterConfig(request_router_class=SESSION_ROUTER)
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name="Replica",
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": gpus},
        # The engine itself makes requests wait and refuses those beyond its queue.
        max_ongoing_requests=rows + settings.queue_limit,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=CONSTRUCTIONS,
        deployment_actors=[ledger],
        logging_config={"enable_access_log": False},  # the server has its own
        **options,
    )
    return deployment.bind(settings)


def replica_gpus(settings: Settings, cluster_has_gpus: Callable[[], bool]) -> float:
    """GPUs of a replica: as they are set, else one where there are any and the model is to be on one."""
    if settings.device == "cpu":
        return 0.0
    if settings.replica_gpus is not None:
        return settings.replica_gpus
    return 1.0 if settings.device != "auto" or cluster_has_gpus() else 0.0


def replica_settings(settings: Settings, gpus: float) -> Settings:
    """The settings of one replica, wherever it runs: of the GPU its share, of the CPUs as many threads as it has."""
    if settings.device.startswith("cuda:"):
        raise StartupError(f"Ray chooses the GPU of each replica: set device to cuda, not {settings.device}.")
    # A replica's working directory is another one.
    paths = {name: getattr(settings, name) for name in ("chat_template", "studies", "api_keys_file")}
    if "checkpoints" in settings.model_fields_set:
        paths["checkpoints"] = settings.checkpoints
    changes: dict[str, Any] = {name: path.absolute() for name, path in paths.items() if path}
    if settings.model and Path(settings.model).exists():
        changes["model"] = str(Path(settings.model).absolute())
        changes["model_name"] = settings.served_name
    if 0 < gpus < 1 and "gpu_memory_utilization" not in settings.model_fields_set:
        changes["gpu_memory_utilization"] = settings.gpu_memory_utilization * gpus
    if not gpus:
        changes["device"] = "cpu"
        if "cpu_kv_cache_share" not in settings.model_fields_set:  # they may all run on one host
            changes["cpu_kv_cache_share"] = settings.cpu_kv_cache_share / (settings.max_replicas or settings.replicas)
    return settings.model_copy(update={"threads": settings.threads or max(1, int(settings.replica_cpus)), **changes})


class Replica:
    """One server of the application, in a process that Ray has made for it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        import ray

        from server.api.routes import readyz
        from server.app import create_app
        from server.cli import _configure_logging
        from server.heap import limit_arenas

        limit_arenas()
        _configure_logging(settings)
        # The ledger writes the state file, and says what a replica begins with.
        self._app = await asyncio.to_thread(create_app, settings.model_copy(update={"remember": False}))
        self._app.add_middleware(_Disconnects)
        self._service = self._app.state.service
        follower = Follower(self._service, _RayLedger(), ray.get_runtime_context().get_actor_name() or "")
        await follower.join((await readyz(self._service)).checkpoint)
        self._app.state.changes = self._follower = follower
        self._following = asyncio.create_task(follower.follow())

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray's name
        return self._app

    async def check_health(self) -> None:
        """Ray calls it, and replaces a replica for which it raises."""
        from server.api.routes import health

        if self._follower.trouble is not None:
            raise EngineDown(self._follower.trouble)
        if self._following.done():
            self._following.result()
        await health(self._service)


class _Disconnects:
    """Where a client has gone, Ray's `receive` raises; ASGI's says so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from ray.exceptions import TaskCancelledError

        async def receive_or_end() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_end, send)


class _RayLedger:
    """The ledger of this replica's deployment. Looked up for each call: Ray may have made it anew."""

    async def join(self, replica: str, known: list[Change]) -> Joined:
        return cast(Joined, await self._call("join", replica, known))

    async def changes_after(
        self, ledger: str, replica: str, number: int, problem: str | None
    ) -> list[tuple[int, Change]] | None:
        news = await self._call("changes_after", ledger, replica, number, problem)
        return cast(list[tuple[int, Change]] | None, news)

    async def publish(self, change: Change) -> Outcome:
        return cast(Outcome, await self._call("publish", change))

    async def _call(self, method: str, *arguments: Any) -> Any:
        from ray import serve
        from ray.exceptions import RayActorError

        try:  # ValueError: there is none at this moment
            return await getattr(serve.get_deployment_actor(LEDGER), method).remote(*arguments)
        except (RayActorError, ValueError) as error:
            raise LedgerGone(str(error)) from error


async def _is_alive(replica: str) -> bool:
    import ray

    try:
        await asyncio.to_thread(ray.get_actor, replica, SERVE_NAMESPACE)
    except ValueError:  # Ray forgets the name of an actor that has died
        return False
    return True


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. A cluster is found as Ray finds it (RAY_ADDRESS); without one it is this machine.

    Raises StartupError.
    """
    ray, ray_serve = _ray()
    from server.sockets import listen

    listen(settings).close()  # Ray would only log that the port is taken
    ray.init(namespace=APPLICATION, include_dashboard=False, configure_logging=False)
    for signum in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own
        signal.signal(signum, lambda *_: sys.exit(0))
    try:
        http = {"host": settings.host, "port": settings.port}
        keep_alive = {"keep_alive_timeout_s": math.ceil(settings.keepalive_timeout_s)}
        try:
            ray_serve.start(proxy_location="EveryNode", http_options={**http, **keep_alive})
            ray_serve.run(application(settings), name=APPLICATION, route_prefix="/")
        except (RuntimeError, ray.exceptions.RayError) as error:  # the second: a part of Ray's is late
            raise StartupError(f"Ray could not start the replicas: {error}") from error
        log.info("ready at http://%s:%d on %d replicas", settings.host, settings.port, settings.replicas)
        threading.Event().wait()
    finally:
        ray_serve.delete(APPLICATION)  # running requests have drain_s
        ray.shutdown()


def _ray() -> tuple[Any, Any]:
    """The modules ray and ray.serve. Raises StartupError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to others unless the operator wants it
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise StartupError("Replicas need Ray Serve: pip install 'ray[serve]>=2.60'.") from error
    return ray, serve
