"""The page at / and its files."""

import os

from fastapi import APIRouter
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from server.api.deps import ServiceDep
from server.web import home

router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The page's script, style and icon."""

    def __init__(self) -> None:
        super().__init__(directory=home.STATIC / "page")

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(home.HEADERS)
        return response


@router.get("/")
@router.head("/")
def root() -> FileResponse:
    return FileResponse(home.STATIC / "index.html", headers=home.HEADERS)


@router.get("/page.json")
def page_info(service: ServiceDep) -> home.PageInfo:
    return home.page_info(service)
