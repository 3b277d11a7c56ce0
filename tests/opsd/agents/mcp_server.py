"""An MCP server, as a user may have one: a program of its own, which remembers what it was told."""

import asyncio
import os

from mcp.server.mcpserver import Image, MCPServer
from mcp.types import CallToolResult, TextContent

server = MCPServer("counter", log_level="CRITICAL")
told = 0


@server.tool()
def add(n: int) -> str:
    """Adds a number to what was added before."""
    global told
    told += n
    return f"total {told} of {os.getpid()}"


@server.tool()
def look(number: int) -> dict:
    return {"number": number, "where": "ä"}


@server.tool()
def draw() -> list:
    return ["two of them:", Image(data=b"x", format="png")]


@server.tool()
def refuse() -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text="no such\nplace")], is_error=True)


@server.tool()
async def wait(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
def told_of_the_run() -> str:
    return f"{os.environ.get('OF_THE_RUN')} {os.environ.get('OF_THE_SERVER')}"


if __name__ == "__main__":
    server.run()
