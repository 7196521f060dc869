"""The example app: built for the web and served, and its types of the database.

make app         the app in a browser, against the local stack
make app DEV=1   Expo's development server, for a phone with Expo Go on the same network
make types       examples/expo/src/darkroom/database.types.ts, from the migrations
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processes import StackError, free_port
from stack import PROJECT, Stack, interrupt, node, run, supabase_cli

APP = PROJECT / "examples/expo"
TYPES = APP / "src/darkroom/database.types.ts"
HEAD = "// Built from the migrations by `make types`: do not edit.\n// deno-fmt-ignore-file\n"


def variables(api_url: str, anon_key: str) -> dict[str, str]:
    """Return the environment in which Expo builds the app with this address and key in it."""
    return os.environ | {
        "EXPO_NO_TELEMETRY": "1",
        "EXPO_PUBLIC_SUPABASE_ANON_KEY": anon_key,
        "EXPO_PUBLIC_SUPABASE_URL": api_url,
        "PATH": f"{node().parent}:{os.environ['PATH']}",
    }


def export(folder: Path, api_url: str, anon_key: str) -> None:
    """Build the app into a folder, with this address and key in it."""
    with tempfile.TemporaryDirectory(prefix="darkroom-metro-") as cache:
        # Metro keeps what it has built in the temporary folder, whatever the variables then were.
        environment = variables(api_url, anon_key)
        environment |= {"CI": "1", "EXPO_OFFLINE": "1", "TMPDIR": cache}
        cli = [node(), APP / "node_modules/expo/bin/cli"]
        options = ["--platform", "web", "--clear", "--output-dir", str(folder)]
        run([*cli, "export", *options], cwd=APP, env=environment)
    if not any(api_url in bundle.read_text() for bundle in folder.rglob("*.js")):
        raise StackError(f"{api_url} is not in what was exported")


class Handler(http.server.SimpleHTTPRequestHandler):
    """The files of one folder."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line for each request is of no use to anybody."""


class Server(http.server.ThreadingHTTPServer):
    """One that takes it calmly when a browser does not wait for its answer."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve a folder on the loopback address; the value is the URL."""
    server = Server(("127.0.0.1", port), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def types_of(database_url: str) -> str:
    """Return the TypeScript types of schema public, as the Supabase CLI makes them."""
    output = supabase_cli(database_url, "gen", "types", "typescript", "--schema", "public")
    _, start, types = output.partition("export type Json =")  # what is before is for people
    if not start:
        raise StackError(f"supabase gen types told of no types:\n{output}")
    return HEAD + start + types


def write_types() -> None:
    """Build the types from the migrations, in a stack made for that."""
    with tempfile.TemporaryDirectory(prefix="darkroom-types-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user passes through
        stack = Stack(Path(folder) / "stack", fsync=False)
        try:
            TYPES.write_text(types_of(stack.up().database_url))
        finally:
            stack.clean()


def lan_address() -> str:
    """Return this machine's address on the network that leads outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it asks for the way there
        except OSError:
            raise StackError("this machine is on no network: DEV=its address") from None
        return str(probe.getsockname()[0])


def develop(address: str) -> None:
    """Run Expo's development server until Ctrl-C, with the API open to this network."""
    stack = Stack.local(with_worker=True)
    with stack.running():
        try:
            stack.lan.open(address, stack.upstream())
            port = free_port(8081)
            print(
                f"app: open to everybody on the network of {address} until Ctrl-C:\n"
                f"app:   {stack.lan.address()}   sign-up, RPC, files, edge functions\n"
                f"app:   http://{address}:{port}   Expo, with the app's source: on all addresses",
                flush=True,
            )
            environment = variables(stack.lan.address(), stack.anon_key)
            environment |= {"REACT_NATIVE_PACKAGER_HOSTNAME": address}
            cli = [node(), APP / "node_modules/expo/bin/cli"]
            subprocess.call([*cli, "start", "--port", str(port)], cwd=APP, env=environment)
        finally:
            stack.lan.stop()
            print(f"app: {address} is closed again", flush=True)


def show_app() -> None:
    """Build the app and serve it until Ctrl-C."""
    stack = Stack.local(with_worker=True)
    folder = Path(tempfile.mkdtemp(prefix="darkroom-app-"))
    try:
        with stack.running():
            print("app: the stack is up, building ...", flush=True)
            export(folder, stack.api_url, stack.anon_key)
            with serve(folder, stack.settings.new_port("APP_PORT")) as url:
                print(f"app: {url}   (Ctrl-C ends it)", flush=True)
                signal.pause()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run one command from the command line."""
    parser = argparse.ArgumentParser(description="Show the example app, or write its types.")
    parser.add_argument("command", choices=["show", "types"])
    command = parser.parse_args().command
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if command == "show" and (address := os.environ.get("DEV")):
            develop(lan_address() if address == "1" else address)
        elif command == "show":
            show_app()
        else:
            write_types()
    except StackError as error:
        sys.exit(f"app: {error}")
    except KeyboardInterrupt:
        sys.exit("app: interrupted")


if __name__ == "__main__":
    main()
