"""Blind comparisons: votes, their tallies, and a table of them."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from starlette.responses import StreamingResponse

from server.api.body import BodyRoute
from server.api.deps import ServiceDep, require_api_key
from server.formatting import study
from server.schemas import StudiesBody, StudyBody, VoteRequest
from server.studies import Studies, Vote

router = APIRouter(prefix="/studies", tags=["studies"], route_class=BodyRoute, dependencies=[Depends(require_api_key)])
Name = Annotated[str, Path(min_length=1, max_length=64)]
CSV: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/csv": {"schema": {"type": "string"}}}, "description": "a row for each vote"}
}
COLUMNS = ("id", "at", "study", "arm_1", "arm_2", "shown_first", "winner", "asked", "text_1", "text_2")


@router.get("")
async def studies(service: ServiceDep) -> StudiesBody:
    """Every study: votes, wins, and the second arm's win rate with its interval."""
    return StudiesBody(studies=list(map(study, await service.in_studies(Studies.tallies))))


@router.post("/{name}/votes")
async def vote(name: Name, body: VoteRequest, service: ServiceDep) -> StudyBody:
    """Keep a vote; the first one makes the study. The same vote sent again, by its id, counts once."""
    kept = body.to_vote()
    return study(await service.in_studies(lambda studies: studies.add(name, kept)))


@router.get("/{name}/votes.csv", responses=CSV, response_class=StreamingResponse)
async def votes(name: Name, service: ServiceDep) -> StreamingResponse:
    """Every vote of a study as a row, with what was asked and both texts."""
    rows = _rows(name, await service.in_studies(lambda studies: studies.votes(name)))
    headers = {"content-disposition": 'attachment; filename="votes.csv"', "x-content-type-options": "nosniff"}
    return StreamingResponse(rows, media_type="text/csv; charset=utf-8", headers=headers)


def _rows(name: str, votes: list[Vote]) -> Iterator[str]:
    yield _line(COLUMNS)
    for one in votes:
        names = [str(arm["name"]) for arm in one.arms]
        winner = "tie" if one.winner is None else names[one.winner]
        at = datetime.fromtimestamp(one.at, UTC).isoformat()
        yield _line(
            (
                one.id,
                at,
                name,
                *names,
                names[one.shown_first],
                winner,
                json.dumps(one.asked, ensure_ascii=False),
                *one.texts,
            )
        )


def _line(cells: tuple[str, ...]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()
