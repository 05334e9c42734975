"""The OpenAPI document is true: what schemathesis makes of it fails nowhere, and nothing undocumented comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from luthier.server.settings import Limits
from tests.service.here import Here, service_here

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = settings().max_examples // 4


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A service that counts no requests."""
    limits = Limits(requests_per_second=1e6, requests_at_once=10**9, queued_jobs=10**9, reserve_bytes=0)
    with service_here(tmp_path_factory.mktemp("schema"), limits=limits, allowed_hosts=("testserver",)) as made:
        yield made


@pytest.fixture(scope="module")
def document(many: Here) -> Any:
    """The OpenAPI document, with the application behind it; Synth's paths under /api are under /api/v1 once more."""
    many.submit()
    paths = many.client.get("/luthier/v1/openapi.json").json()["paths"]
    twice = [path for path in paths if path.startswith("/api/v1/") and path.replace("/v1", "", 1) in paths]
    assert len(twice) > 20
    app = many.client.app
    return schemathesis.openapi.from_asgi("/luthier/v1/openapi.json", app).exclude(path=twice)


def test_no_request_fails_or_is_answered_in_another_way_than_documented(document: Any, many: Here) -> None:
    headers = {"authorization": f"Bearer {many.keys['admin']}"}
    failures: list[str] = []
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 80
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)

        try:
            ask()
        except (AssertionError, BaseExceptionGroup, schemathesis.errors.SchemathesisError) as error:
            failures.append(f"{operation.label}: {error}")
    assert failures == [], "\n\n".join(failures)
