"""``mmrag serve``: one warm process that answers over HTTP, for people and for programs.

``mmrag.server.app.create_app`` gives the ASGI application; ``mmrag.server.run.serve`` starts it
with uvicorn. They need the extra ``serve``, and the tools of MCP the extra ``mcp``.
"""

from __future__ import annotations

from importlib.util import find_spec

from mmrag.errors import ConfigError

_MODULES = {
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "mcp": ("mcp",),
}


def require(extra: str) -> None:
    """Raise ConfigError with what to install if an extra is missing: ``serve`` or ``mcp``."""
    # find_spec looks a module up without importing it: a check must not take as long as a start.
    missing = [name for name in _MODULES[extra] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Missing: {', '.join(missing)}. Install it with: pip install 'mmrag[{extra}]'"
        )
