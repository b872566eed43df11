"""The console as a server: its pages behind the guard of loopback and the gate of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from dagster_prefs.access import Right
from dagster_prefs.console.access import TokenGate
from dagster_prefs.console.catalog_page import CATALOG
from dagster_prefs.console.context import Console, Page
from dagster_prefs.console.frame import add_pages
from dagster_prefs.console.pipeline_page import PIPELINE
from dagster_prefs.console.runbook_page import RUNBOOK
from dagster_prefs.console.shop_page import SHOP
from dagster_prefs.console.viewers_page import VIEWERS
from dagster_prefs.console.why_page import WHY
from dagster_prefs.loopback import LoopbackGuard, listen, loopback_hosts

log = logging.getLogger("dagster_prefs.console")

# In the order of the navigation. The first page that the project has is shown at `/`.
PAGES: tuple[Page, ...] = (SHOP, VIEWERS, PIPELINE, CATALOG, WHY, RUNBOOK)
# Events of a browser are a few hundred bytes.
MOST_SOCKET_BYTES = 1 << 20


def make_app(
    console: Console, *, port: int, host: str = "127.0.0.1", pages: Sequence[Page] = PAGES
) -> FastAPI:
    """Build the console's app for an address. NiceGUI has one app for the process, so it is called once.

    Raises AccessError for malformed tokens, for an address off loopback without any, and for a certificate that cannot
    be used.
    """
    settings = console.settings
    entrance = settings.entrance()
    entrance.check(host, "the console")
    app = FastAPI(title="dagster-prefs console", openapi_url=None, docs_url=None, redoc_url=None)
    add_pages(console, pages)
    # No page uses bindings. Without their updates an idle process uses no CPU.
    ui.run_with(
        app,
        title="dagster-prefs",
        dark=None,
        tailwind=False,
        binding_refresh_interval=None,
        show_welcome_message=False,
    )
    app.add_middleware(TokenGate, tokens=entrance.tokens, needed=partial(needed_right, pages))
    app.add_middleware(
        LoopbackGuard,
        hosts=loopback_hosts(port) | frozenset(settings.ui_hosts),
        own_user_only=settings.local_users == "own",
        log=lambda reason: log.warning("the console refused a request: %s", reason),
    )
    return app


def needed_right(pages: Iterable[Page], path: str) -> Right | None:
    """Return the right that a path needs: its page's; None for paths of no page, such as scripts."""
    return next((page.right for page in pages if path == page.path or path.startswith(f"{page.path}/")), None)


def serve(
    console: Console,
    *,
    host: str = "127.0.0.1",
    port: int = 3001,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; `started` is called with the URL. Raises CannotListen, AccessError."""
    entrance = console.settings.entrance()
    app = make_app(console, port=port, host=host)
    listener = listen(host, port)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_level="error",
            # Access logs would contain the ids of people, which are part of the addresses.
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws_max_size=MOST_SOCKET_BYTES,
            timeout_graceful_shutdown=2,
            ssl_certfile=entrance.certificate,
            ssl_keyfile=entrance.key,
        )
    )
    name = f"[{host}]" if ":" in host else host
    console.watcher.start()
    with listener:
        started(f"{entrance.scheme}://{name}:{port}")
        server.run(sockets=[listener])
