"""Blind comparisons: votes, their tallies, and a table of them."""

import csv
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
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
    first = await service.in_studies(partial(_page, name, 0))  # raises NotFound before the answer begins

    async def table() -> AsyncIterator[str]:
        rows, last = first
        yield _line(COLUMNS)
        while rows:
            yield rows
            rows, last = await service.in_studies(partial(_page, name, last))

    headers = {"content-disposition": 'attachment; filename="votes.csv"', "x-content-type-options": "nosniff"}
    return StreamingResponse(table(), media_type="text/csv; charset=utf-8", headers=headers)


def _page(study: str, after: int, studies: Studies) -> tuple[str, int]:
    """Rows of the votes after one, and the number of the last."""
    found = studies.votes(study, after)
    return "".join(_row(study, vote) for _, vote in found), found[-1][0] if found else after


def _row(study: str, vote: Vote) -> str:
    names = [str(arm["name"]) for arm in vote.arms]
    winner = "tie" if vote.winner is None else names[vote.winner]
    at = datetime.fromtimestamp(vote.at, UTC).isoformat()
    asked = json.dumps(vote.asked, ensure_ascii=False)
    return _line((vote.id, at, study, *names, names[vote.shown_first], winner, asked, *vote.texts))


def _line(cells: tuple[str, ...]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()
