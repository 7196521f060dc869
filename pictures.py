"""Has pictures looked at, and drawn, by processes that die of what costs too much, not the worker.

`worker.py` starts this file as a small server, which forks a process for each picture: with as
much memory and time as one may take, and no secret to tell. So whatever hostile bytes do to a
decoder is over with that process. The server starts with the first picture and ends when there was
none for a while, or with the worker.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import gc
import io
import json
import math
import mmap
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from xml.parsers import expat

import blurhash  # type: ignore[import-untyped]
from PIL import (
    AvifImagePlugin,
    Image,
    ImageColor,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from py_svg_hush import filter_svg

SMALL_BYTES, LARGE_BYTES = 100_000_000, 450_000_000  # of memory, for what is done with one picture
SMALL_AT_ONCE = 3  # such pictures; beside them one large one, so that none waits for a dear one
PICTURE_SECONDS = 3  # of a core, for one picture
IDLE_SECONDS = 60  # without a picture, after which the server ends
MAX_IMAGE_PIXELS = 50_000_000
MAX_SVG_BYTES = 10 << 20
BASE_BYTES = 32_000_000  # of memory, for any picture
BLUR_PIXELS = 32  # longest side of what a blurhash is made of
TURNED_PIXELS = 3000  # shorter side that a JPEG is left which is decoded smaller, to be turned
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that swap width and height
EXIF_TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))
FIRST_BYTES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "AVIF": rb"....ftyp(avi[fs]|mif1|msf1)",
    "GIF": rb"GIF8[79]a",
}
# Of what is whole, and yet no picture that is taken: other pictures, films, sounds, archives.
OTHER_BYTES = (
    rb"BM|II\*\0|MM\0\*|8BPS|\0\0\x01\0|\0\0\0\x0cj[PX]|\xff\x0a|\xff\x4f\xff"
    rb"|....ftyp(?!avi[fs]|mif1|msf1).{4}|....moov|\x1aE\xdf\xa3|RIFF....(WAVE|AVI )"
    rb"|OggS|ID3|fLaC|PK\x03\x04|\x1f\x8b|%PDF|glTF|ply\s|\x7fELF"
)
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
PNG_CHUNKS = PIXEL_CHUNKS | {
    *(b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"mDCV", b"cLLI", b"sBIT", b"pHYs"),
}
WEBP_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"}
JPEG_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")  # and not within what is packed
# What tells: segments for applications and comments, but for size, colours, and repetition.
JPEG_TOLD = re.compile(
    rb"(?!\xe0..JFIF\0|\xe2..ICC_PROFILE\0|\xee..Adobe)[\xe0-\xef\xfe]", re.DOTALL
)
GIF_TOLD = re.compile(rb"!(?!\xf9|\xff\x0b(?:NETSCAPE2\.0|ANIMEXTS1\.0|ICCRGBG1012))", re.DOTALL)
SVG_WORDS = re.compile(rb"<(title|desc)\b[^<>/]*>[^<]*</\1>")
SVG = "http://www.w3.org/2000/svg"
FOREIGN = re.compile(rb"@import|(?:image-set|\bsrc)\s*\(|url\(\W*(?:\w+:)?//", re.IGNORECASE)


class NoPicture(Exception):
    """The bytes are no image that can be read. Says why, in words that are ours."""

    code = "provider_error"  # of private.error_codes, if this is an output


class NotTaken(NoPicture):
    """Nor would they be if they came once more: too large, or of a kind that is not taken."""

    code = "output_refused"


@dataclass(frozen=True)
class Picture:
    """What the bytes of an output show. SVGs have neither blurhash nor preview, some no size."""

    format: str
    width: int | None
    height: int | None
    blurhash: str | None = None
    preview: bytes | None = None  # WebP; None too if the picture itself is not larger
    lacks: str | None = None  # memory or time for blurhash and preview, or what went wrong there


# --- in the worker ------------------------------------------------------------------------------


class Pictures:
    """The worker's side: asks the server, which it starts when it is needed."""

    def __init__(self) -> None:
        self.lanes = [
            (SMALL_BYTES, asyncio.Semaphore(SMALL_AT_ONCE)),
            (LARGE_BYTES, asyncio.Semaphore(1)),
        ]
        self.server: subprocess.Popen[bytes] | None = None
        self.door: socket.socket

    async def inspect(self, file: IO[bytes], preview_pixels: int) -> Picture:
        """Do what inspect_image does. Raises NoPicture."""
        said = await self._ask(file, preview_pixels=preview_pixels)
        if "format" in said:
            preview = base64.b64decode(said.get("preview") or "") or None
            return Picture(**said | {"preview": preview})
        file.seek(0)
        head = file.read(32)
        for kind, first in FIRST_BYTES.items():
            if re.match(first, head, re.DOTALL):
                return Picture(kind, None, None, lacks=said["lacks"])
        raise NoPicture(f"no image that takes little {said['lacks']}")

    async def look_at_source(self, file: IO[bytes]) -> tuple[str, bool]:
        """Do what look_at_source does, and put into the file what it answers. Raises NoPicture.

        Answers the format, and whether the file is as it was given.
        """
        said = await self._ask(file, is_source=True)
        if said["lacks"]:
            raise NoPicture(f"takes too much {said['lacks']}")
        if data := base64.b64decode(said["data"] or ""):
            file.seek(0)
            file.truncate()
            file.write(data)
        return said["format"], not data

    async def draw(self, prompt: str, size: tuple[int, int], source: str, seed: int) -> bytes:
        """Do what draw_preview does. Raises NoPicture."""
        with Path(os.devnull).open("r+b") as file:  # none is needed, and the disk may be full
            said = await self._ask(file, wish=(prompt, size, source, seed))
        if said["lacks"]:
            raise NoPicture(f"preview: takes too much {said['lacks']}")
        return base64.b64decode(said["data"])

    async def _ask(self, file: IO[bytes], **request: Any) -> dict[str, Any]:
        """Have it done as a small picture; if that takes more memory, among the large ones."""
        said: dict[str, Any] = {}
        for means, lane in self.lanes:
            async with lane:
                said = await self._run(file, {"means": means, **request})
            if said.get("lacks") != "memory":
                break
        for refusal in (NotTaken, NoPicture):
            if refusal.__name__ in said:
                raise refusal(said[refusal.__name__])
        return said

    async def _run(self, file: IO[bytes], request: dict[str, Any]) -> dict[str, Any]:
        """Answer all that a new process told until its end. Raises OSError if there is none."""
        file.flush()
        for attempt in range(3):  # perhaps the server ends just now, as nobody has asked
            await asyncio.sleep(attempt / 5)
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(ConnectionError):
                socket.send_fds(self.start(), [b"1"], [theirs.fileno(), file.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 26)
            pid, said = 0, dict[str, Any]()
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                with contextlib.suppress(ConnectionError):
                    said = json.loads(await reader.readline() or "{}")
                    pid = said.pop("pid", 0)
                    while (line := await reader.readline()).endswith(b"\n"):
                        said |= json.loads(line)
            except asyncio.CancelledError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL) if pid else None
                raise
            finally:
                writer.close()
            if pid:
                return said
        raise OSError(errno.EAGAIN, "no process for pictures")

    def start(self) -> socket.socket:
        """Have the server run; answer how to reach it."""
        if self.server is None or self.server.poll() is not None:
            self.close()
            self.door, theirs = socket.socketpair()
            public = {"PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"} & os.environ.keys()
            with theirs:
                self.server = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in public},
                    start_new_session=True,  # not stopped by what stops the worker, as Ctrl-C
                )
        return self.door

    def close(self) -> None:
        """End all processes for pictures."""
        if self.server:
            self.door.close()
            self.server.wait()


# --- the server ---------------------------------------------------------------------------------


def serve() -> None:
    """Fork a process for each request, without threads, until the worker is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the stacks of many would count as memory
    Image.init()
    gc.freeze()  # what is there already is not copied by looking at it
    control = socket.socket(fileno=0)
    control.settimeout(IDLE_SECONDS)
    with contextlib.suppress(TimeoutError):
        while descriptors := socket.recv_fds(control, 1, 2)[1]:
            with contextlib.suppress(OSError):  # the worker sees that there is none
                if os.fork() == 0:
                    try:
                        serve_picture(*descriptors)
                    finally:
                        os._exit(0)
            for each in descriptors:
                os.close(each)
    os.killpg(0, signal.SIGKILL)  # who is still at work would be so for nobody


def serve_picture(channel: int, descriptor: int) -> None:
    """Do one request and end. What is told line by line holds, even if it is ended before."""
    with socket.socket(fileno=channel) as worker, os.fdopen(descriptor, "r+b") as file:

        def tell(**said: Any) -> None:
            line = json.dumps(said, default=lambda data: base64.b64encode(data).decode())
            worker.sendall(line.encode() + b"\n")

        tell(pid=os.getpid(), lacks="time")  # so it is, unless it gets to say something else
        request = json.loads(worker.makefile("rb").readline())
        restrict(request["means"] + os.fstat(descriptor).st_size)
        try:
            if wish := request.get("wish"):
                tell(data=draw_preview(*wish), lacks=None)
            elif request.get("is_source"):
                kind, data = look_at_source(file, request["means"])
                tell(format=kind, data=data, lacks=None)
            else:
                found = inspect_image(file, request["preview_pixels"], request["means"], tell)
                tell(**asdict(found))
        except MemoryError:
            tell(lacks="memory")
        except NoPicture as error:
            tell(**{type(error).__name__: str(error)})


def restrict(means: int) -> None:
    """Have the kernel refuse this process more memory, and end it if it takes too long."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for what, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + means),
        (resource.RLIMIT_CPU, PICTURE_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    signal.alarm(10 * PICTURE_SECONDS)  # on the clock, where there is no core for it
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")  # it goes before the worker


# --- what a file tells beside the picture -------------------------------------------------------

Cuts = Iterator[tuple[int, int, bytes]]  # in order: from where to where, and what comes instead


def strip(file: IO[bytes]) -> None:
    """Take out of a file what may tell how its picture was made: texts, EXIF, XMP, what follows the
    end. What is drawn stays byte for byte, with its colours and which way is up.
    """
    with mmap.mmap(file.fileno(), 0) as data:
        kinds = [kind for kind, first in FIRST_BYTES.items() if re.match(first, data[:32], re.S)]
        cuts: list[tuple[int, int, bytes]] = []
        # Where it is broken, or of no such kind, the rest stays.
        with contextlib.suppress(LookupError, struct.error, RecursionError):
            for cut in WALKS[kinds[0]](data):
                cuts.append(cut)
        if not cuts:
            return
        whole = len(data)
        head, data[:2] = data[:2], b"\0\0"  # no picture is left if this ends halfway
        at = end = 0
        for start, stop, new in [*cuts, (whole, whole, b"")]:
            kept = min(start, whole) - at
            if kept >= 0:
                data.move(end, at, kept)
                end += kept + len(new)
                data[end - len(new) : end] = new
                at = min(stop, whole)
        data[:2] = head
    file.truncate(end)


def upright(exif: bytes) -> bytes:
    """EXIF that tells which way is up and nothing else; nothing where this does not tell it."""
    turn = orientation(exif)
    if turn not in EXIF_TURNS or len(exif) < 26:  # longer it must not get
        return b""
    return struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, 0x0112, 3, 1, turn, 0, 0)


def walk_png(data: mmap.mmap) -> Cuts:
    at, kind = 8, b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + size
        if kind not in PNG_CHUNKS:
            new = upright(data[start + 8 : at - 4]) if kind == b"eXIf" else b""
            if new:
                size, new = len(new), kind + new
                new = struct.pack(">I", size) + new + struct.pack(">I", zlib.crc32(new))
            yield start, at, new
    yield at, len(data), b""


def walk_jpeg(data: mmap.mmap) -> Cuts:
    at, marker = 0, 0
    while marker != 0xD9 and (found := JPEG_MARKER.search(data, at)):
        start, at = found.span()
        marker = data[at - 1]
        if marker not in (0x01, 0xD8, 0xD9):
            at += int.from_bytes(data[at : at + 2])
        if JPEG_TOLD.match(data, start + 1):
            new = upright(data[start + 10 : at]) if data[start + 4 : start + 8] == b"Exif" else b""
            yield start, at, new and b"\xff\xe1\0\x22Exif\0\0" + new
    if marker == 0xD9:
        yield at, len(data), b""


def walk_webp(data: mmap.mmap) -> Cuts:
    cuts, at, end = [], 12, 8 + int.from_bytes(data[4:8], "little")
    while at + 8 <= min(end, len(data)):
        kind, size = struct.unpack_from("<4sI", data, at)
        start, at = at, at + 8 + size + size % 2
        if kind not in WEBP_CHUNKS:
            new = upright(data[start + 8 : at]) if kind == b"EXIF" else b""
            cuts.append((start, at, new and b"EXIF" + struct.pack("<I", len(new)) + new))
    left = end - 8 - sum(stop - start - len(new) for start, stop, new in cuts)
    yield 4, 8, struct.pack("<I", left)
    if data[12:16] == b"VP8X":  # which says what there is: XMP 4, EXIF 8
        yield 20, 21, bytes([data[20] & ~0x0C | 8 * any(new for _, _, new in cuts)])
    yield from cuts
    yield end, len(data), b""


def walk_gif(data: mmap.mmap) -> Cuts:
    def table(flags: int) -> int:
        """How many bytes of colours follow."""
        return 6 << (flags & 7) if flags & 0x80 else 0

    at = 13 + table(data[10])
    while data[at] in b"!,":  # an extension, or an image
        start, at = at, at + (2 if data[at] == 0x21 else 11 + table(data[at + 9]))
        while size := data[at]:
            at += 1 + size
        at += 1
        if GIF_TOLD.match(data, start):
            yield start, at, b""
    if data[at] == 0x3B:
        yield at + 1, len(data), b""


def walk_avif(data: mmap.mmap) -> Cuts:
    """Nothing in it may move: what tells becomes zeros."""
    for start, stop in sorted(told(data, 0, len(data))):
        if stop <= len(data):
            yield start, stop, bytes(stop - start)
    *_, (_, _, end) = boxes(data, 0, len(data))
    yield end, len(data), b""


def boxes(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each box, and from where to where its inside is."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        inside = at + (16 if size == 1 else 8)
        size = int.from_bytes(data[at + 8 : inside]) if size == 1 else size or end - at
        at += size
        if not inside <= at <= end:
            return
        yield kind, inside, at


def told(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int]]:
    """From where to where something is told in these boxes, of an AVIF."""
    for kind, start, stop in boxes(data, at, end):
        if kind in (b"moov", b"trak"):
            yield from told(data, start, stop)
        elif kind == b"meta":
            yield from told_by_items(data, start + 4, stop)
        elif kind in (b"udta", b"uuid", b"free", b"skip"):
            yield start, stop


def told_by_items(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the items that are EXIF, XMP or the like are, and where they are said to be that."""
    inside = {kind: (start, stop) for kind, start, stop in boxes(data, at, end)}
    telling = set()
    start, stop = inside[b"iinf"]
    for _, entry, _ in boxes(data, start + (8 if data[start] else 6), stop):
        wide = 4 if data[entry] == 3 else 2
        kind = entry + 4 + wide + 2
        if data[kind : kind + 4] in (b"Exif", b"mime", b"uri "):
            telling.add(int.from_bytes(data[entry + 4 : entry + 4 + wide]))
            yield kind, kind + 4
    extents = [*item_extents(data, inside[b"iloc"][0], inside.get(b"idat", (0, 0))[0])]
    for item, start, stop in extents:
        if item in telling and not any(  # nothing of a picture's
            start < other_stop and other_start < stop
            for other, other_start, other_stop in extents
            if other not in telling
        ):
            yield start, stop


def item_extents(data: mmap.mmap, at: int, idat: int) -> Iterator[tuple[int, int, int]]:
    """Number of the item, start and end of each piece of one, as the box iloc says."""

    def take(size: int) -> int:
        nonlocal at
        at += size
        return int.from_bytes(data[at - size : at])

    version, _, sizes = take(1), take(3), take(2)
    wide = 4 if version == 2 else 2
    for _ in range(take(wide)):
        item, method = take(wide), take(2) & 15 if version else 0
        _, base = take(2), take(sizes >> 4 & 15)
        for _ in range(take(2)):
            take(sizes & 15 if version else 0)
            start = base + take(sizes >> 12) + (idat if method == 1 else 0)
            yield item, start, start + take(sizes >> 8 & 15)


WALKS: dict[str, Callable[[mmap.mmap], Cuts]] = {
    "PNG": walk_png,
    "JPEG": walk_jpeg,
    "WEBP": walk_webp,
    "AVIF": walk_avif,
    "GIF": walk_gif,
}


# --- one picture --------------------------------------------------------------------------------


class Chunks(PngImagePlugin.PngStream):
    """A PNG's: what does not tell of the pixels is passed over, or left out where it is broken."""

    def call(self, cid: bytes, pos: int, length: int) -> bytes:
        if cid in PIXEL_CHUNKS:
            return super().call(cid, pos, length)
        if cid in (b"iCCP", b"eXIf"):
            with contextlib.suppress(Exception):
                return super().call(cid, pos, length)
        assert self.fp
        self.fp.seek(pos)
        return ImageFile._safe_read(self.fp, length)

    def crc(self, cid: bytes, data: bytes) -> None:
        super().crc(cid, data) if cid in PIXEL_CHUNKS else self.crc_skip(cid, data)


def read_app(image: JpegImagePlugin.JpegImageFile, marker: int) -> None:
    """Read a JPEG's segment for applications, or leave it out where it is broken."""
    with contextlib.suppress(Exception):
        JpegImagePlugin.APP(image, marker)
        image.icclist = [part for part in image.icclist if len(part) > 14]


class WebP(WebPImagePlugin.WebPImageFile):
    """Has two canvases made when it is opened, and does not say so where there is no memory."""

    def _open(self) -> None:
        assert self.fp
        width, height = WebPImagePlugin._get_size(self.fp.read(30)) or (0, 0)
        size = self.fp.seek(0, io.SEEK_END)
        self.fp.seek(0)
        if width * height <= MAX_IMAGE_PIXELS:
            bytearray(8 * width * height + 3 * size + BASE_BYTES // 8)  # or MemoryError
        super()._open()


PngImagePlugin.PngStream = Chunks  # type: ignore[misc]
JpegImagePlugin.MARKER.update(dict.fromkeys(range(0xFFE0, 0xFFF0), ("APP", "", read_app)))  # type: ignore[arg-type]
Image.register_open("WEBP", WebP, WebPImagePlugin._accept)
# A JPEG is read as one also where it says that it is several, as those of telephones do.
Image.register_open("JPEG", JpegImagePlugin.JpegImageFile, JpegImagePlugin._accept)


def inspect_image(
    file: IO[bytes],
    preview_pixels: int,
    means: int = LARGE_BYTES,
    tell: Callable[..., None] = lambda **_: None,
) -> Picture:
    """Look at the bytes themselves, whatever the provider calls them. Raises NoPicture.

    An image is decoded once, of an animation the first frame. What tells of it is taken out of the
    file, and an SVG replaced by one that does nothing. What can be told without decoding is told
    before.
    """
    try:
        strip(file)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        with Image.open(file, formats=[*FIRST_BYTES]) as image:
            return decode_image(image, preview_pixels, size, means, tell)
    except UnidentifiedImageError:
        file.seek(0)
        if re.match(OTHER_BYTES, file.read(16), re.DOTALL):
            raise NotTaken("no image that is taken, but a file of another kind") from None
        if BASE_BYTES + 30 * min(size, MAX_SVG_BYTES) > means:
            raise MemoryError from None
        return sanitize_svg(file)
    except Image.DecompressionBombError:
        raise NotTaken("too many pixels") from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise NoPicture(f"no image: {type(error).__name__}") from None  # by Pillow's ways to say so


def decode_image(
    image: Image.Image, preview_pixels: int, size: int, means: int, tell: Callable[..., None]
) -> Picture:
    """Decode an opened image, a JPEG no larger than needed. Raises what Pillow does, or NoPicture.

    Width and height are as displayed: turned as EXIF says.
    """
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise NotTaken("too many pixels")
    kind, full = str(image.format), image.size
    turn = orientation(image.info.get("exif", b""))
    width, height = full[::-1] if turn in SIDEWAYS else full
    side = preview_pixels or BLUR_PIXELS
    if weigh(image, side, size) > means:
        return Picture(kind, width, height, lacks="memory")
    tell(format=kind, width=width, height=height)
    image.draft(None, (2 * side, 2 * side))
    image.load()
    turn = orientation(image.info.get("exif", b""))  # of a PNG it may come last
    width, height = full[::-1] if turn in SIDEWAYS else full
    try:
        has_preview = 0 < preview_pixels < max(width, height)
        return Picture(kind, width, height, *draw_small(image, side, turn, has_preview))
    except MemoryError:
        raise
    except Exception as error:  # the picture itself can be shown
        return Picture(kind, width, height, lacks=type(error).__name__)


def draw_small(
    image: Image.Image, side: int, turn: int, has_preview: bool
) -> tuple[str, bytes | None]:
    """The blurhash of a decoded image, and its preview if it is to have one."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    small = image if image.mode == mode else image.convert(mode)
    small.thumbnail((side, side))
    if turn in EXIF_TURNS:
        small = small.transpose(EXIF_TURNS[turn])
    file = io.BytesIO()
    if has_preview:
        small.save(file, "WEBP", quality=75, icc_profile=profile if is_of_rgb(profile) else None)
    return blur(small), file.getvalue() or None


def weigh(image: Image.Image, side: int, size: int) -> int:
    """How much memory it takes at most to decode an opened image and shrink it to this side."""
    pixels = image.width * image.height
    if image.format == "JPEG":
        each = 2 * len(image.getbands()) + 2  # a progressive one is held whole
    else:  # at the peak, with a copy in another mode
        by_mode = {"RGB": 5, "L": 6, "RGBA": 9}.get(image.mode, 13)
        each = {"AVIF": 10, "WEBP": 17}.get(str(image.format), by_mode)
    return BASE_BYTES + 2 * size + each * pixels + 24 * min(pixels, side * side)


def orientation(exif: bytes) -> int:
    """How EXIF says that an image is turned; 0 where it does not, or is not to be understood."""
    with contextlib.suppress(Exception):
        (known := Image.Exif()).load(exif)
        return int(known.get(0x0112, 0))
    return 0


def is_of_rgb(profile: bytes | None) -> bool:
    """Whether it is a whole profile of RGB colours, which the preview has, and not a huge one."""
    return bool(
        profile
        and len(profile) == int.from_bytes(profile[:4]) <= 64 * 1024
        and (profile[16:20], profile[36:40]) == (b"RGB ", b"acsp")
    )


def blur(image: Image.Image) -> str:
    """The blurhash of an RGB or RGBA image, on white."""
    image.thumbnail((BLUR_PIXELS, BLUR_PIXELS))
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image if image.mode == "RGBA" else None)
    pixels = flat.get_flattened_data()
    rows = [pixels[start : start + flat.width] for start in range(0, len(pixels), flat.width)]
    return str(blurhash.encode(rows, 4, 3))


def sanitize_svg(file: IO[bytes]) -> Picture:
    """Replace an SVG by what svg-hush lets through: no script, handler, link or foreign host.

    Raises NoPicture if it is no SVG, or one that is made to get past or to exhaust a reader.
    """
    file.seek(0)
    source = file.read(MAX_SVG_BYTES + 1)
    if len(source) > MAX_SVG_BYTES:
        raise NotTaken("no image: too large an SVG")
    try:
        root = read_svg(source)  # first: svg-hush indents, so deep nesting would fill the memory
        clean = filter_svg(source, {"image": ["png", "jpeg", "gif", "webp"]})
        clean = SVG_WORDS.sub(b"", clean)  # comments and metadata are gone already
    except (ValueError, expat.ExpatError) as error:  # their words may be the picture's
        raise NoPicture(f"no image: {type(error).__name__}") from None
    if FOREIGN.search(clean):
        raise NotTaken("no image: a reference to elsewhere")
    file.seek(0)
    file.truncate()
    file.write(clean)
    file.flush()
    return Picture("SVG", *svg_size(root))


def read_svg(source: bytes) -> dict[str, str]:
    """Answer the root's attributes. Raises NoPicture or ExpatError for what is no decent SVG."""
    names: list[str] = []  # of the open elements
    root: dict[str, str] = {}
    weight = 0  # the sum of the elements' depths

    def refuse(what: str) -> None:
        raise NotTaken(f"no image: {what}")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal weight
        uri, _, local = name.partition(" ")
        if not names:
            root.update(attributes)
        if (not names and name != f"{SVG} svg") or (uri == SVG and " " in local):
            refuse("not an SVG")  # or one whose names have a prefix, which svg-hush drops
        if names[-1:] == [f"{SVG} style"]:
            refuse("an element in a style sheet")  # svg-hush forgets to filter after it
        names.append(name)
        weight += len(names)
        if len(names) > 200 or weight > 2_000_000:
            refuse("too many elements, or too deep")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.namespace_prefixes = True
    parser.StartElementHandler, parser.EndElementHandler = start, lambda _: names.pop()
    parser.EntityDeclHandler = lambda *_: refuse("an entity")
    parser.Parse(source, True)
    return root


def svg_size(root: Mapping[str, str]) -> tuple[int, int] | tuple[None, None]:
    """Width and height where they are plain numbers, else those of the viewBox, else none."""
    box = root.get("viewBox", "").replace(",", " ").split()[2:]
    for pair in ([root.get("width", ""), root.get("height", "")], box):
        found = [re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)(?:px)?", length) for length in pair]
        sizes = [round(float(each[1])) for each in found if each]
        if len(sizes) == len(pair) == 2 and min(sizes) > 0:
            return sizes[0], sizes[1]
    return None, None


# Of a landscape, five each: the sky from its top to the horizon, the shore, and sun or moon.
COLOURS = """
#1b2a4e #8a4f7d #f2a65a #16142b #ffe7b3  #0b1d3a #27536b #7fb7a8 #071420 #f4f1d0
#2e1f47 #b5446e #ffb17a #1a0f24 #ffd9a0  #5fa8d3 #bfe0ea #fdf0d5 #1f4b4a #fffdf2
#0a0f2c #2a3a7c #8f7fc0 #05071a #e8ecff  #f6bd60 #f7cfa0 #f9e5d0 #6b2d3e #fff6e0
#113537 #3f7d6e #cfe0a4 #0a1f1c #fbf6c8  #3d1e3f #d1495b #f5b841 #24101f #fff0b8
#7f9cc4 #c9b6d6 #f7d6d0 #3a3157 #fff3e6  #06232f #0f5d66 #f0a868 #04161d #ffd28a
"""
PINE = ((0.08, 0.64, 1), (0.11, 0.42, 0.78), (0.15, 0.2, 0.56), (0.18, -0.1, 0.34))  # its tiers
Corners = list[tuple[float, float]]
Ellipse = tuple[float, float, float, float]


def draw_landscape(rng: random.Random, width: int, height: int) -> Image.Image:
    """Draw sky, sun or moon, and mountains, perhaps behind a lake, seen from a shore."""
    first, unit = rng.randrange(0, 50, 5), min(width, height)
    top, middle, low, near, light = map(ImageColor.getrgb, COLOURS.split()[first : first + 5])
    horizon, sun = round(height * rng.uniform(0.5, 0.68)), width * rng.uniform(0.2, 0.8)
    image = Image.new("RGB", (width, height), low)
    sky = Image.linear_gradient("L").resize((width, horizon))
    image.paste(ImageOps.colorize(sky, top, low, middle))

    def paint(
        colour: tuple[int, ...], shapes: Iterable[Corners | Ellipse], strength: float = 1
    ) -> None:
        draw = ImageDraw.Draw(mask := Image.new("L", (2 * width, 2 * height)))
        for shape in shapes:
            if isinstance(shape, tuple):
                x, y, wide, high = (2 * each for each in shape)
                draw.ellipse((x - wide, y - high, x + wide, y + high), fill=255)
            else:
                draw.polygon([(2 * x, 2 * y) for x, y in shape], fill=255)
        # Made smaller, it has smooth edges.
        image.paste(colour, mask=mask.reduce(2).point(lambda value: int(value * strength)))

    def ridge(base: float, rise: float, is_sharp: bool) -> Corners:
        waves = [(rng.random() * 7, rng.uniform(2, 4) * 2**n / unit, 2.3**-n) for n in range(7)]
        line: Corners = [(width, height), (0, height)]
        for x in (width * step / 300 for step in range(301)):
            sines = ((math.sin(start + x * pace), high) for start, pace, high in waves)
            up = sum((1 - 2 * abs(sine) if is_sharp else sine) * high for sine, high in sines)
            line.append((x, base - rise * up))
        return line

    if sum(top) < 190:  # it is dark
        sizes = (unit * rng.choice((5e-4, 8e-4, 14e-4)) for _ in range(150))
        paint(
            light, [(rng.random() * width, rng.random() ** 2 * horizon, r, r) for r in sizes], 0.8
        )
    radius = unit * rng.choice((0.05, 0.07, 0.1, 0.14))
    y, reach = horizon - rng.uniform(-0.3, 2.5) * radius, round(radius + unit * 0.7)
    shine = Image.radial_gradient("L").point(lambda value: max(0, 180 - value) ** 2 // 175)
    box = (round(sun - reach), round(y - reach))
    image.paste(light, box, shine.resize((2 * reach, 2 * reach)))
    paint(light, [(sun, y, radius, radius)])

    has_lake, is_sharp = rng.random() < 0.5, rng.random() < 0.6
    ridges = rng.randrange(1, 3) if has_lake else rng.randrange(3, 6)
    for part in (n / (ridges + 1) for n in range(1, ridges + 1)):
        colour = tuple(round(a + (b - a) * part * 0.75) for a, b in zip(low, near, strict=True))
        base = horizon + (height - horizon) * (-0.04 if has_lake else 0.75 * part - 0.2)
        paint(colour, [ridge(base, unit * rng.uniform(0.04, 0.1) * (1.3 - part), is_sharp)])
    if has_lake:
        deep = height - horizon
        above = image.crop((0, max(0, horizon - deep), width, horizon)).resize((width, deep))
        water = Image.blend(ImageOps.flip(above), Image.new("RGB", above.size, near), 0.3)
        image.paste(water, (0, horizon))
        depths = (rng.random() for _ in range(70))
        waves = ((horizon + deep * each, unit * (0.06 + 0.18 * each)) for each in depths)
        paint(
            light,
            [(sun + rng.gauss(0, r / 2), y, rng.uniform(0, r), r / 60) for y, r in waves],
            0.4,
        )
    shore = ridge(height * rng.uniform(0.87, 0.93), unit * 0.03, False)
    trees = [
        (rng.choice(shore[2:]), unit * rng.uniform(0.08, 0.24))
        for _ in range(rng.choice((0, 14, 45)))
    ]
    pines = [
        [(x - wide * r, y - low * r), (x, y - tip * r), (x + wide * r, y - low * r)]
        for (x, y), r in trees
        for wide, low, tip in PINE
    ]
    paint(near, [shore, *pines])
    return image


def draw_preview(prompt: str, size: tuple[int, int], source: str, seed: int) -> bytes:
    """A PNG that is the same for the same arguments: a landscape, or the blurhash of a source, with
    the prompt on it as far as the font has letters for it.
    """
    if source:
        rows = blurhash.decode(source, 32, 32)
        image = Image.new("RGB", (32, 32))
        image.putdata([tuple(map(int, pixel)) for row in rows for pixel in row])
        image = image.resize(size)
    else:
        image = draw_landscape(random.Random(f"{prompt}\0{seed}"), *size)
    margin, font = min(size) // 25, ImageFont.load_default(max(9, min(size) // 40))
    words = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^ -~]", " ", words)
    width = int((size[0] - 2 * margin) * len(words) / max(1, font.getlength(words)))
    lines = textwrap.wrap(words, max(4, width), max_lines=2, placeholder=" …")
    text, corner = "\n".join(lines), (margin, size[1] - margin)
    draw = ImageDraw.Draw(image)
    draw.multiline_text(corner, text, "white", font, "ld", stroke_width=1, stroke_fill="#333")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def look_at_source(file: IO[bytes], means: int = LARGE_BYTES) -> tuple[str, bytes | None]:
    """The format of what a user gives for a model to see, and the file to hand over in its place.

    There is one if models might see another picture than people do, or none: for what EXIF turns,
    and for kinds that few models read. Raises NoPicture, also for what is cut short: it is decoded
    to its end, a JPEG in small.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with Image.open(file, formats=[*FIRST_BYTES]) as image:
            return make_upright(image, size, means)
    except UnidentifiedImageError:
        raise NoPicture("no image of a kind that is taken") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise NoPicture(f"no image: {type(error).__name__}") from None


def make_upright(image: Image.Image, size: int, means: int) -> tuple[str, bytes | None]:
    """Do this for an opened image. Raises what Pillow does, MemoryError, or NoPicture."""
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise NoPicture("too many pixels")
    kind, turn = str(image.format), orientation(image.info.get("exif", b""))
    is_taken = kind in ("PNG", "JPEG", "WEBP")
    image.draft(None, (TURNED_PIXELS,) * 2 if turn in EXIF_TURNS else (BLUR_PIXELS,) * 2)
    need = weigh(image, 0, size) + 4 * image.width * image.height  # with an upright copy
    if kind == "JPEG":  # a progressive one is held whole, however small it is made
        held = 2 * len(image.getbands()) * pixels if "progressive" in image.info else 0
        need = BASE_BYTES + 2 * size + 8 * image.width * image.height + held
    if need > means:
        raise MemoryError
    image.load()
    turn = turn or orientation(image.info.get("exif", b""))  # of a PNG it may come last
    if is_taken and turn not in EXIF_TURNS:
        return kind, None
    profile, data = image.info.get("icc_profile"), io.BytesIO()
    upright = image.transpose(EXIF_TURNS[turn]) if turn in EXIF_TURNS else image
    kind = kind if kind == "JPEG" else "PNG"
    upright.save(data, kind, quality=95, compress_level=1, icc_profile=profile, exif=b"")
    return kind, data.getvalue()


if __name__ == "__main__":
    serve()
