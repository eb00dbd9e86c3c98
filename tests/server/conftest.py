"""Gives the tests of the server their fixtures."""

from tests.server.databases import postgres, postgres_server, url

__all__ = ["postgres", "postgres_server", "url"]
