"""What checkpoints there are; loading, activating and unloading them."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from server.api.bodies import (
    AttributeBody,
    CheckpointBody,
    CheckpointDetailBody,
    CheckpointListBody,
    CheckpointVersionsBody,
    LoadedBody,
    UnloadedBody,
)
from server.api.deps import ServiceOf
from server.api.keys import asks_admin_key, asks_key
from server.api.schemas import VersionRequest
from server.errors import UnknownCheckpoint
from server.registry import Entry

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"])
READS, CHANGES = [Depends(asks_key)], [Depends(asks_admin_key)]

# Plain functions: they read files, and run in a thread of their own.


@router.get("", dependencies=READS)
def checkpoints(service: ServiceOf) -> CheckpointListBody:
    """Every complete checkpoint folder: which are loaded, which is active, which cannot be loaded and why."""
    active = service.registry.active
    return CheckpointListBody(
        active=active.label if active else None,
        checkpoints=[CheckpointBody(**_fields(entry)) for entry in service.registry.entries()],
    )


@router.get("/{name}", dependencies=READS)
def checkpoint(name: str, service: ServiceOf) -> CheckpointVersionsBody:
    """Every version of one checkpoint, with how it was trained and evaluated."""
    entries = service.registry.entries(name)
    if not entries:
        raise UnknownCheckpoint(f"There is no checkpoint {name!r}.", param="name")
    return CheckpointVersionsBody(name=name, versions=[_detail(entry) for entry in entries])


@router.post("/{name}/load", dependencies=CHANGES)
def load(name: str, service: ServiceOf, body: VersionRequest | None = None) -> LoadedBody:
    """EngineStatus a version (absent: the newest) as its folder is now. Requests that run finish on what they began with."""
    return LoadedBody.of(service.registry.renew(name, body.version if body else None))


@router.post("/{name}/activate", dependencies=CHANGES)
def activate(name: str, service: ServiceOf, body: VersionRequest | None = None) -> LoadedBody:
    """The same, and requests that name no checkpoint get it from now on."""
    return LoadedBody.of(service.registry.renew(name, body.version if body else None, activate=True))


@router.delete("/{name}", dependencies=CHANGES)
def unload(name: str, service: ServiceOf, query: Annotated[VersionRequest, Query()]) -> UnloadedBody:
    """Take a version (absent: all) out of the device's memory; the folder stays, and a request loads it again."""
    return UnloadedBody(unloaded=service.registry.unload(name, query.version))


def _detail(entry: Entry) -> CheckpointDetailBody:
    config = entry.checkpoint.config if entry.checkpoint else None
    training, evaluation = (config.training, config.evaluation) if config else ({}, {})
    return CheckpointDetailBody(**_fields(entry), training=training, evaluation=evaluation)


def _fields(entry: Entry) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": entry.name,
        "version": entry.version,
        "active": entry.active,
        "loaded": entry.loaded,
        "changed": entry.changed,
        "loadable": entry.problem is None,
        "reason": entry.problem,
    }
    if entry.checkpoint is not None:
        config = entry.checkpoint.config
        fields |= {
            "method": config.method,
            "positions": config.positions.value,
            "sha256": config.sha256,
            "base_model": config.base_model.model_dump(),
            "attributes": {
                name: AttributeBody(
                    default=default,
                    range=next(column.range for column in config.columns if column.attribute == name),
                    sites=[
                        f"{column.layer}.{column.site.value}" for column in config.columns if column.attribute == name
                    ],
                )
                for name, default in entry.checkpoint.attributes.items()
            },
        }
    return fields
