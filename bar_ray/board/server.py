"""The board's web server: pages made here, a little script that keeps them fresh.

On the loopback interface it asks for nothing (and answers only to loopback names, so that no page
from elsewhere can read it); anywhere else it asks for Ray's token, as Ray's own dashboard does.
"""

import asyncio
import contextlib
import hashlib
import importlib.resources
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bar_ray.board import state
from bar_ray.board.state import Run
from bar_ray.log import duration
from bar_ray.report.page import WORDS, title_of
from bar_ray.types import UserError

HERE = Path(__file__).parent
REFRESH_S = 2.0
PARTS = ("head", "grid", "others", "pool", "faults")
CHARTS = importlib.resources.files("chartkick") / "django/static/chartkick/Chart.bundle.js"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)
MOST_LINES = 12  # in one chart
OVERVIEW = (("rlvr", "reward"), ("rlvr", "loss"), ("sft", "loss"), ("midtrain", "loss"))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Board:
    """One run at a time, read in the background; links to the others."""

    def __init__(self, storage_uri: str, run_id: str, ray_url: str = "") -> None:
        self.storage_uri, self.ray_url = storage_uri, ray_url.rstrip("/")
        self.runs: dict[str, Run] = {}
        self.first = run_id
        self.reading = False
        self.pages = Environment(
            loader=FileSystemLoader(HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.pages.filters |= {"duration": duration, "when": title_of, "words": state.words}
        files = {"board.js": HERE / "board.js", "board.css": HERE / "board.css", "chart.js": CHARTS}
        self.files = {name: file.read_bytes() for name, file in files.items()}
        marks = {n: hashlib.sha256(content).hexdigest()[:12] for n, content in self.files.items()}
        self.links = {name: f"/static/{mark}/{name}" for name, mark in marks.items()}

    def app(self, hosts: tuple[str, ...] = LOOPBACK) -> web.Application:
        """The application; without `hosts` it asks for Ray's token."""
        guard = only_for(hosts) if hosts else token_guard()
        app = web.Application(middlewares=[guard, plain_errors])
        app.router.add_get("/", self._page)
        app.router.add_get("/parts", self._parts)
        app.router.add_get("/overview", self._overview)
        app.router.add_get("/step", self._step)
        app.router.add_get("/static/{mark}/{name}", self._file)
        app.cleanup_ctx.append(self._background)
        return app

    def run(self, request: web.Request) -> Run:
        wanted = request.query.get("run", self.first)
        if wanted not in self.runs:
            run = Run(self.storage_uri, state.pick(self.storage_uri, wanted))
            run.catch_up(1, ("events",))  # what fits into a moment; numbers follow
            run.look_at_pool()
            self.runs[wanted] = run
        return self.runs[wanted]

    async def _background(self, _app: web.Application) -> Any:
        task = asyncio.create_task(self._read())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _read(self) -> None:
        while True:
            for run in list(self.runs.values()):
                with contextlib.suppress(UserError):  # storage that cannot be reached for a while
                    while await asyncio.to_thread(run.catch_up, 1):
                        pass
                    await asyncio.to_thread(run.look_at_pool)
            await asyncio.sleep(REFRESH_S)

    # --- answers ----------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.Response:
        run = await asyncio.to_thread(self.run, request)
        runs = await asyncio.to_thread(state.run_ids, self.storage_uri)
        page = self.pages.get_template("page.html.j2")
        text = page.render(
            run=run, runs=runs[:50], links=self.links, parts=self.parts(run), refresh_s=REFRESH_S
        )
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
        return web.Response(text=text, content_type="text/html", headers=headers)

    def parts(self, run: Run) -> dict[str, str]:
        """The sections that change, as HTML."""
        made = self.pages.get_template("parts.html.j2").make_module({"run": run, "board": self})
        return {name: str(getattr(made, name)()) for name in PARTS}

    async def _parts(self, request: web.Request) -> web.Response:
        run = self.run(request)
        return web.json_response({"version": run.version, "parts": self.parts(run)})

    async def _overview(self, request: web.Request) -> web.Response:
        """Curves of the experts beside each other, those at work first."""
        run, charts = self.run(request), []
        for verb, metric in OVERVIEW:
            lines = {}
            cells = [c for c in run.cells.values() if c.verb == verb and c.curves.steps]
            for cell in sorted(cells, key=lambda c: (c.state != "running", -c.since))[:MOST_LINES]:
                if points := cell.curves.points().get(metric):
                    lines[cell.title] = points
            if lines:
                more = len(cells) - len(lines)
                title = f"{verb}: {metric}" + (f" ({more} more experts)" if more > 0 else "")
                charts.append({"title": title, "words": WORDS.get(metric, metric), "lines": lines})
        return web.json_response(charts)

    async def _step(self, request: web.Request) -> web.Response:
        """One step: its curves, what happened to it, some of its rollouts."""
        run = self.run(request)
        cell = run.find(request.query.get("key", ""))
        me = (cell.verb, cell.name, cell.fingerprint)
        page = self.pages.get_template("step.html.j2")
        events = [f for f in run.faults if f.get("fingerprint") == cell.fingerprint]
        told = reversed(run.transcripts.get(me, []))
        html = page.render(cell=cell, events=events, transcripts=list(told), board=self)
        charts = [
            {"title": metric, "words": WORDS.get(metric, metric), "lines": {cell.title: points}}
            for metric, points in cell.curves.points().items()
            if any(value for _, value in points)
        ]
        if cell.held_out:
            lines = {cell.title: cell.held_out}
            words = "held-out score, 0 to 1"
            charts.insert(0, {"title": "held out", "words": words, "lines": lines})
        return web.json_response({"html": html, "charts": charts})

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.files:
            raise web.HTTPNotFound
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        forever = {"Cache-Control": "public, max-age=31536000, immutable"}
        response = web.Response(body=self.files[name], content_type=kind, headers=forever)
        response.enable_compression()
        return response

    def ray_link(self, path: str) -> str:
        """Into Ray's own dashboard, where there is one."""
        return f"{self.ray_url}/#/{quote(path, safe='/')}" if self.ray_url else ""


# --- who may look ---------------------------------------------------------------------------------


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A user's mistake is a sentence, not a traceback."""
    try:
        return await handler(request)
    except UserError as error:
        return web.Response(status=404, text=str(error))


def only_for(hosts: tuple[str, ...]) -> Any:
    """Answers to these names alone: a page of another site may know our port, not our name."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = request.host.rsplit(":", 1)[0].strip("[]")
        if name not in hosts:
            raise web.HTTPForbidden(text=f"this board answers to {', '.join(hosts)} alone")
        return await handler(request)

    return guard


def token_guard() -> Any:
    """Ray's token, as Ray's own pages ask for it: a header, or the cookie that its login sets."""
    from ray._private.authentication import authentication_utils
    from ray._private.authentication.http_token_authentication import get_token_auth_middleware

    if not authentication_utils.is_token_auth_enabled():
        raise UserError(
            "beyond this machine the board asks for Ray's token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN (or ~/.ray/auth_token), or stay at 127.0.0.1 and use a tunnel"
        )
    return get_token_auth_middleware(aiohttp)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def serve(board: Board, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Start serving; returns what to clean up and the URL. Port 0 takes a free one."""
    app = board.app(LOOPBACK if is_loopback(host) else ())
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise UserError(f"cannot serve on {host}:{port}: {error.strerror}; try --port 0") from error
    taken = runner.addresses[0][1]
    name = f"[{host}]" if ":" in host else host
    return runner, f"http://{name}:{taken}/"
