"""Whatever the OpenAPI document allows, and what it does not, gets the answer that the document promises, and never
a 5xx. `make fuzz` tries far more of it."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from server.app import bare_app, create_app
from server.config import Settings
from tests.server.conftest import listening

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4"))
LEAST = int(os.environ.get("FUZZ_LEAST", "0"))  # requests of all tests together
ANSWERS = Counter[int]()  # by status
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


schema = schemathesis.openapi.from_dict(bare_app().openapi())


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    """A server of its own, which is told to load and unload what there is."""
    app = create_app(settings)
    with TestClient(app), listening(app) as address:
        yield address


@schema.parametrize()
@hypothesis_settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_is_documented(case: Case, url: str) -> None:
    response = case.call(base_url=url)
    ANSWERS[response.status_code] += 1
    case.validate_response(response, checks=CHECKS)


def test_so_many_were_sent_and_none_was_answered_with_a_5xx(capfd: pytest.CaptureFixture[str]) -> None:
    """The last test of the file, for its numbers."""
    with capfd.disabled():
        told = ", ".join(f"{status}: {count:,}" for status, count in sorted(ANSWERS.items()))
        print(f"\n{ANSWERS.total():,} requests, answered with {told}")
    assert ANSWERS.total() >= LEAST
    assert max(ANSWERS, default=0) < 500
