"""``mmrag serve``: one warm process that answers over HTTP, for people and for programs.

``create_app`` gives the ASGI application; ``mmrag.server.run`` starts it with uvicorn. Needs the
extra ``serve``.
"""
