"""Headless Chromium, driven through its own protocol: open a page, run script in it, look at it."""

import asyncio
import base64
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
)


class Page:
    """One tab. `problems` are errors that reached the console, and requests that failed."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number, self.problems = socket, 0, []
        self.answers: dict[int, asyncio.Future] = {}
        self.listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for message in self.socket:
            found = message.json()
            if "id" in found:
                self.answers.pop(found["id"]).set_result(found)
            elif found["method"] == "Runtime.exceptionThrown":
                self.problems.append(found["params"]["exceptionDetails"])
            elif found["method"] == "Log.entryAdded":
                entry = found["params"]["entry"]
                self.problems += [entry] if entry["level"] == "error" else []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.answers[self.number] = answer = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        found = await asyncio.wait_for(answer, 60)
        assert "error" not in found, found
        return found["result"]

    async def open(self, url: str, width: int = 1100, height: int = 1400) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **sizes)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> None:
        for _ in range(int(10 * seconds)):
            with contextlib.suppress(AssertionError):  # between two pages there is no context
                if await self.run(script):
                    return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never came true: {script}")

    async def press(self, key: str, code: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" if key == "Enter" and kind == "keyDown" else "",
            )

    async def picture(self, path: Path) -> None:
        found = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program,
            *FLAGS,
            f"--user-data-dir={profile}",
            "about:blank",
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            place = await asyncio.wait_for(_place(process), 60)
            async with aiohttp.ClientSession() as session:
                targets = f"http://{place.split('/')[2]}/json"
                async with session.get(targets) as answer:
                    tabs = await answer.json(content_type=None)
                url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    page = Page(socket)
                    yield page
                    page.listening.cancel()
        finally:
            process.terminate()
            await process.wait()


async def _place(process: asyncio.subprocess.Process) -> str:
    """Where it listens, which it says when it is ready."""
    while line := (await process.stderr.readline()).decode():
        if "listening on ws://" in line:
            return line.split("listening on ")[1].strip()
    raise AssertionError("chromium did not start")
