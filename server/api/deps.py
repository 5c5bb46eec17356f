"""What handlers need."""

from typing import Annotated

from fastapi import Depends, Request

from server.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]
