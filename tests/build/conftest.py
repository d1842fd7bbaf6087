"""Fixtures of the tests of the build pipeline."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from kvexport.build import analysis, conversion_job


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were finished by computation, in order, by the names of their functions."""
    done: list[str] = []

    def count(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            done.append(name)
            return result

        monkeypatch.setattr(module, name, counted)

    count(conversion_job, "calibration_windows")
    count(analysis, "analyze_sensitivity")
    return done
