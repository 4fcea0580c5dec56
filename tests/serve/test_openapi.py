"""The endpoint against its own schema, with schemathesis: no request gets a 5xx or an undocumented response."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, Phase, settings

from ragturbo.serve.app import create_app
from ragturbo.serve.config import ServeConfig

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[dev]'")


def test_no_case_of_its_own_schema_is_a_server_error(gen, kit, long_count, record_property):
    """Valid and invalid requests to every path, including the admin's. The count is that of image requests."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    app = create_app(ServeConfig(max_images=2, max_prompt=60, timeout=300, admin_keys=("admin",)), generator=gen)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    total, answers = long_count(2000), {}
    with kit.listening(app) as url, warnings.catch_warnings():
        kit.until(lambda: app.state.service.status == "ready", "server ready")
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 7
        few = total // 50
        for operation in operations:
            images = operation.path == "/v1/images/generations"
            strategy = operation.as_strategy()
            if images:
                # By default schemathesis generates only valid requests.
                strategy = strategy | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

            @settings(
                max_examples=total if images else few,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @_given(strategy)
            def check(case):
                headers = {"Authorization": "Bearer admin"} if case.path.startswith("/admin") else None
                response = case.call_and_validate(checks=checks, headers=headers, timeout=300)
                answers.setdefault(case.path, []).append(response.status_code)

            check()
    statuses = answers["/v1/images/generations"]
    # Both valid and invalid requests were sent.
    assert 200 in statuses and 400 in statuses
    sent = {path: len(codes) for path, codes in answers.items()}
    # Record what was sent: a strategy may generate fewer cases than asked for.
    record_property("counted", sent)
    assert len(statuses) >= total and len(sent) == len(operations), sent


def _given(strategy):
    from hypothesis import given

    return given(case=strategy)
