"""What worker.py makes of an output: what it takes, what it refuses, what it stores."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import signal
import struct
import subprocess
import sys
import tempfile
import uuid
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import blurhash
import fake_replicate
import httpx
import pytest
from bench import memory
from database import PROJECT, Database
from fake_replicate import FakeReplicate
from hostile import chunk, dear_jpeg, encoded, with_chunks, with_segment
from http_client import SignedUp, answer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageStat
from test_worker_units import ENVIRONMENT, as_file
from worker_process import Workers, eventually

import pictures
import worker
from pictures import NoPicture, inspect_image
from stack import Stack
from worker import JobError, Settings, Storage

pytest_plugins = ["http_fixtures"]
fake = fake_replicate.fake_replicate
T = TypeVar("T")

FOLDER = f"{uuid.UUID(int=1)}/{uuid.UUID(int=2)}"
RASTER = ["PNG", "JPEG", "WEBP", "AVIF", "GIF"]


def noise(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.effect_noise(size, 50).convert("RGB")


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    return encoded(noise(size), kind, **options)


def inspected(data: bytes, preview_pixels: int = 0) -> pictures.Picture:
    return inspect_image(io.BytesIO(data), preview_pixels)


def seen(data: bytes) -> tuple[str, int | None, int | None]:
    found = inspected(data)
    return found.format, found.width, found.height


def refusal(data: bytes) -> str:
    with pytest.raises(NoPicture) as refused:
        inspected(data)
    return str(refused.value)


def stored(
    body: Iterable[bytes],
    answer: Callable[[httpx.Request], httpx.Response] = lambda _: httpx.Response(200),
    max_bytes: int = 10**7,
    preview_pixels: int = 0,
) -> dict[str, Any]:
    """Store one output where every upload is answered like this."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        for part in body:
            await asyncio.sleep(0)
            yield part

    async def handle(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return answer(request)

    async def store() -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            limits = {
                "MAX_IMAGE_BYTES": str(max_bytes),
                "IMAGE_PREVIEW_PIXELS": str(preview_pixels),
            }
            storage = Storage(Settings(ENVIRONMENT | limits), http, pictures.Pictures())
            job = SimpleNamespace(user_id=uuid.UUID(int=1), job_id=uuid.UUID(int=2))
            return await storage.store(job, 0, chunks())

    with mock.patch("worker.backoff", return_value=0.0):
        return asyncio.run(store())


class Bucket:
    """Takes every upload, or answers the first ones as told, or cannot be reached."""

    def __init__(self, *answers: httpx.Response | httpx.TransportError) -> None:
        self.answers = list(answers)
        self.uploads: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.uploads.append(request)
        answer = self.answers.pop(0) if self.answers else httpx.Response(200)
        if isinstance(answer, httpx.TransportError):
            raise answer
        return answer

    def files(self) -> dict[str, tuple[str, bytes]]:
        """Type and bytes by path."""
        return {
            each.url.path.partition("/generations/")[2]: (
                each.headers["content-type"],
                each.content,
            )
            for each in self.uploads
        }


# --- what is an image ---


@pytest.mark.parametrize("kind", RASTER)
def test_format_and_size_are_read_from_the_bytes(kind):
    assert seen(picture(kind)) == (kind, 40, 30)


def test_a_jpeg_of_several_pictures_is_stored_as_a_jpeg():
    several = picture("MPO", save_all=True, append_images=[noise()])

    assert seen(several) == ("JPEG", 40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF", "PNG"])
def test_of_an_animation_the_first_frame_is_shown(kind):
    red, blue = (Image.new("RGB", (600, 300), colour) for colour in ("red", "blue"))
    animation = encoded(red, kind, save_all=True, append_images=[blue], duration=100)

    found = inspected(animation, 100)

    assert (found.format, found.width, found.height) == (kind, 600, 300)
    assert_colour(found, (255, 0, 0))


ONE_PIXEL_OFF = {
    "a jpeg after a page": b"<!doctype html>" + picture("JPEG"),
    "bmp": picture("BMP"),
    "tiff": picture("TIFF"),
    "ico": picture("ICO"),
    "jpeg 2000": picture("JPEG2000"),
    "pdf": picture("PDF"),
}
HOSTILE = {
    "empty": b"",
    "a page": b"<!doctype html><script>alert(1)</script>",
    "a well-formed page": b'<html xmlns="http://www.w3.org/1999/xhtml"><body/></html>',
    "json": b'{"error": "no"}',
    "a program": b"\x7fELF" + bytes(200),
    "a script called gif": b"GIF89a=1;alert(1)",
    "large and nothing": bytes(11 << 20),
    "only a header": picture()[:33],
    "a broken chunk": picture()[:33] + b"\0\0\0\x64" + picture()[37:],
    **{f"truncated {kind}": picture(kind, (90, 80))[:-40] for kind in RASTER},
    **ONE_PIXEL_OFF,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_bytes_that_are_no_image_are_the_providers_error(data):
    assert "no image" in refusal(data)


@pytest.mark.parametrize("kind", RASTER)
def test_a_file_that_is_something_else_too_is_stored_as_the_image_it_is(kind):
    bucket = Bucket()
    data = picture(kind) + b"<script>alert(1)</script>PK\x05\x06" + bytes(18)

    image = stored([data], bucket)

    extension, content_type = worker.FORMATS[kind]
    assert image["content_type"] == content_type
    assert bucket.files() == {f"{FOLDER}/0.{extension}": (content_type, data)}


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """A grey PNG that claims this size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BOMBS = {
    "claims 60000 x 60000": png_of(60_000, 60_000),
    "claims more than fits": png_of(2**31 - 1, 2**31 - 1),
    "has 100 megapixels": png_of(10_000, 10_000, bytes(10_001 * 10_000)),
    "one line": png_of(pictures.MAX_IMAGE_PIXELS + 1, 1),
    "gif": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + picture("GIF")[10:],
    "jpeg": picture("JPEG").replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 60000, 60000)),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_before_it_is_decoded(data):
    with mock.patch("PIL.ImageFile.ImageFile.load", side_effect=AssertionError("decoded")):
        error = refusal(data)

    assert "too many pixels" in error or "no image: Decompression" in error


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(RASTER),
    changes=st.dictionaries(st.integers(0, 300), st.integers(0, 255), max_size=4),
    end=st.integers(0, 3000),
)
def test_damaged_images_are_read_or_refused_but_never_crash(kind, changes, end):
    data = bytearray(picture(kind))
    for at, value in changes.items():
        data[at % len(data)] = value
    with contextlib.suppress(NoPicture):
        found = inspected(bytes(data[:end]), 16)
        assert found.width and found.height


# --- preview and blurhash ---


def colours(found: pictures.Picture) -> list[list[float]]:
    """Mean colours of the blurhash and of the preview."""
    assert found.blurhash and found.preview
    rows = blurhash.decode(found.blurhash, 8, 8)
    preview = Image.open(io.BytesIO(found.preview)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", preview.size, "white"), preview).convert("RGB")
    hashed = [sum(pixel[band] for row in rows for pixel in row) / 64 for band in range(3)]
    return [hashed, ImageStat.Stat(flat).mean]


def assert_colour(found: pictures.Picture, wanted: tuple[int, int, int], within: int = 12) -> None:
    for colour in colours(found):
        assert all(abs(a - b) <= within for a, b in zip(colour, wanted, strict=True)), colour


ORANGE, WHITE = (230, 120, 40), (255, 255, 255)
plain = Image.new("RGB", (300, 200), ORANGE)
half = Image.new("RGBA", (300, 200), (*ORANGE, 128))
KINDS = {
    **{f"rgb {kind}": (encoded(plain, kind), ORANGE) for kind in RASTER},
    "progressive jpeg": (encoded(plain, "JPEG", progressive=True), ORANGE),
    "cmyk jpeg": (encoded(plain.convert("CMYK"), "JPEG"), ORANGE),
    "grey jpeg": (encoded(plain.convert("L"), "JPEG"), (144, 144, 144)),
    "palette png": (encoded(plain.quantize(8), "PNG"), ORANGE),
    "palette png with a clear colour": (encoded(plain.quantize(8), "PNG", transparency=0), WHITE),
    "16-bit png": (encoded(Image.new("I;16", (300, 200), 40000), "PNG"), (156, 156, 156)),
    "1-bit png": (encoded(Image.new("1", (300, 200), 1), "PNG"), WHITE),
    "grey and alpha png": (encoded(Image.new("LA", (300, 200), (0, 128)), "PNG"), (127, 127, 127)),
    "clear png": (encoded(Image.new("RGBA", (300, 200), (0, 0, 0, 0)), "PNG"), WHITE),
    "rgb png with a clear colour": (encoded(plain, "PNG", transparency=ORANGE), WHITE),
    "half clear png": (encoded(half, "PNG"), (242, 187, 147)),
    "half clear webp": (encoded(half, "WEBP"), (242, 187, 147)),
    "half clear avif": (encoded(half, "AVIF"), (242, 187, 147)),
}


@pytest.mark.parametrize(("data", "colour"), KINDS.values(), ids=KINDS.keys())
def test_preview_and_blurhash_show_the_colours_of_every_kind_of_image(data, colour):
    assert_colour(inspected(data, 100), colour)


def test_the_blurhash_has_four_by_three_components_in_their_places():
    picture = Image.new("RGB", (300, 200), "black")
    picture.paste((255, 255, 255), (0, 0, 150, 200))

    found = inspected(encoded(picture, "PNG")).blurhash

    assert blurhash.components(found) == (4, 3)
    rows = blurhash.decode(found, 8, 8)
    assert min(row[0][0] for row in rows) > 200
    assert max(row[7][0] for row in rows) < 130


@pytest.mark.parametrize(
    ("size", "pixels", "preview"),
    [
        ((2000, 1000), 512, (512, 256)),
        ((700, 1400), 512, (256, 512)),
        ((513, 512), 512, (512, 511)),
        ((512, 512), 512, None),
        ((40, 30), 512, None),
        ((3000, 2), 512, (512, 1)),
        ((2000, 1000), 16, (16, 8)),
        ((2000, 1000), 0, None),
    ],
)
def test_a_preview_is_made_of_what_is_larger_than_it(size, pixels, preview):
    found = inspected(picture("JPEG", size), pixels)

    assert (found.width, found.height) == size
    assert len(found.blurhash or "") == 28
    if preview is None:
        assert found.preview is None
    else:
        image = Image.open(io.BytesIO(found.preview or b""))
        assert (image.format, image.size) == ("WEBP", preview)
        assert not image.getexif()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_preview_and_blurhash_are_turned_as_displayed(kind, orientation):
    upright = Image.new("RGB", (600, 400), "white")
    upright.paste("black", (0, 0, 300, 400))
    turns = [0, None, 0, 3, 1, 5, 2, 6, 4]  # Transpose that undoes the display's
    lying = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation

    found = inspected(encoded(lying, kind, exif=exif), 60)

    assert (found.width, found.height) == (600, 400)
    shown = Image.open(io.BytesIO(found.preview or b"")).convert("L")
    assert shown.size == (60, 40)
    assert (shown.getpixel((5, 20)), shown.getpixel((55, 20))) == (
        pytest.approx(0, abs=9),
        pytest.approx(255, abs=9),
    )


def test_image_preview_and_facts_are_stored_side_by_side():
    bucket = Bucket()
    data = picture("AVIF", (1200, 900))

    image = stored([data[:5000], data[5000:]], bucket, preview_pixels=512)

    files = bucket.files()
    assert files[f"{FOLDER}/0.avif"] == ("image/avif", data)
    content_type, preview = files[f"{FOLDER}/0.preview.webp"]
    assert (content_type, Image.open(io.BytesIO(preview)).size) == ("image/webp", (512, 384))
    assert image == {
        "position": 0,
        "storage_path": f"{FOLDER}/0.avif",
        "preview_path": f"{FOLDER}/0.preview.webp",
        "content_type": "image/avif",
        "width": 1200,
        "height": 900,
        "bytes": len(data),
        "blurhash": inspected(data, 512).blurhash,
    }


# --- SVG ---

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"{}>{}</svg>'
)


def svg(inside: str = "", attributes: str = "") -> bytes:
    return SVG.format(attributes, inside).encode()


def sanitized(data: bytes) -> str:
    file = io.BytesIO(data)
    assert inspect_image(file, 512).format == "SVG"
    return file.getvalue().decode()


DRAWING = (
    '<title>t</title><defs><linearGradient id="g"><stop offset="0" stop-color="#f00"/>'
    '</linearGradient><filter id="f"><feGaussianBlur stdDeviation="2"/></filter></defs>'
    '<g transform="scale(2)"><path d="M0 0L9 9Z" fill="url(#g)" filter="url(#f)"/></g>'
    '<text x="1" font-family="serif">&lt;ä&gt;</text><use href="#g"/>'
)


@pytest.mark.parametrize(
    "data",
    [
        svg(DRAWING),
        b"\xef\xbb\xbf" + svg(DRAWING),
        b"\n <!-- by a model -->\n" + svg(DRAWING),
        b'<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n' + svg(DRAWING),
        b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd">'
        + svg(DRAWING),
        svg(DRAWING).decode().encode("utf-16"),
    ],
    ids=["plain", "bom", "comment", "declaration", "doctype", "utf-16"],
)
def test_a_harmless_svg_keeps_what_it_draws(data):
    clean = sanitized(data)

    for kept in ("linearGradient", "feGaussianBlur", "M0 0L9 9Z", "url(#g)", "&lt;ä", 'href="#g"'):
        assert kept in clean


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        (' width="300" height="200"', (300, 200)),
        (' width="300px" height="199.6"', (300, 200)),
        (' width="100%" height="100%" viewBox="0 0 640 480"', (640, 480)),
        (' viewBox="-5,-5,640.2,480"', (640, 480)),
        (' width="10cm" height="5cm"', (None, None)),
        (' width="0" height="0"', (None, None)),
        (' width="300"', (None, None)),
        (' width="9999999999" height="1"', (None, None)),
        (' viewBox="0 0 nan inf"', (None, None)),
        ("", (None, None)),
    ],
)
def test_an_svg_has_a_size_if_it_says_one_in_plain_numbers(attributes, size):
    assert seen(svg(DRAWING, attributes)) == ("SVG", *size)


ATTACKS = {
    "script": svg("<script>alert(1)</script>"),
    "script from elsewhere": svg('<script xlink:href="https://evil.example/x.js"/>'),
    "handler": svg('<rect onclick="alert(1)"/>', ' onload="alert(1)"'),
    "foreignObject": svg(
        '<foreignObject><iframe xmlns="http://www.w3.org/1999/xhtml"/></foreignObject>'
    ),
    "html": svg('<script xmlns="http://www.w3.org/1999/xhtml">alert(1)</script>'),
    "script link": svg('<a href="javascript:alert(1)"><text>x</text></a>'),
    "script link in entities": svg(
        '<a xlink:href="java&#10;script&#58;alert(1)"><text>x</text></a>'
    ),
    "animated link": svg('<a><animate attributeName="href" values="#x"/></a>'),
    "set handler": svg('<set attributeName="onclick" to="x"/>'),
    "image": svg(
        '<image href="https://evil.example/x.png"/><image xlink:href="//evil.example/y"/>'
    ),
    "use": svg('<use xlink:href="https://evil.example/x.svg#a"/>'),
    "base": svg('<use href="#a"/>', ' xml:base="https://evil.example/"'),
    "css import": svg('<style>@import "https://evil.example/x.css"; a{}</style>'),
    "css import in disguise": svg(r'<style>@\69mport "//evil.example/x.css"; a{}</style>'),
    "css url": svg("<style>rect{fill:url( 'https://evil.example/x' )}</style>"),
    "css url in cdata": svg("<style><![CDATA[rect{fill:UrL(//evil.example/x)}]]></style>"),
    "font": svg("<style>@font-face{src:url(https://evil.example/f.woff)}</style>"),
    "style attribute": svg('<rect style="fill:url(https://evil.example/x)"/>'),
    "paint": svg('<rect fill="url(https://evil.example/x#g)" mask="url(//evil.example/m)"/>'),
    "css image-set": svg('<rect style="mask-image:image-set(&quot;//evil.example/x&quot; 1x)"/>'),
    "css after an element": svg('<style><g/>@import "//evil.example/x.css";</style>'),
    "stylesheet": b'<?xml-stylesheet href="//evil.example/x.css"?>' + svg(),
    "data page": svg('<image href="data:text/html,&lt;script&gt;alert(1)&lt;/script&gt;"/>'),
    "data svg": svg('<use href="data:image/svg+xml;base64,PHN2Zz4="/>'),
    "another namespace": b'<s:svg xmlns:s="http://www.w3.org/2000/svg" '
    b'xmlns="http://www.w3.org/1999/xhtml"><s:a>x</s:a><s:style>a{}</s:style></s:svg>',
    "default attribute": b'<!DOCTYPE svg [<!ATTLIST rect onclick CDATA "alert(1)">]>'
    + svg("<rect/>"),
    "file entity": b'<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    + svg("<text>&a;</text>"),
    "parameter entity": b'<!DOCTYPE svg [<!ENTITY % a SYSTEM "//evil.example">%a;]>' + svg(),
    "undeclared entity": svg("<text>&a;</text>"),
    "page around it": b"<html>" + svg("<script>alert(1)</script>") + b"</html>",
    "page after it": svg() + b"<script>alert(1)</script>",
    "no namespace": b"<svg onload='alert(1)'/>",
    "cut off": svg("<g><script>alert(1)</script>")[:-12],
}
DANGERS = ("script", "alert", "evil", "onload", "onclick", "foreign", "iframe", "xhtml", "@import",
           "data:", "passwd", "attributename", "<!", "<?xml-", "xml:base")  # fmt: skip


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_nothing_dangerous_is_left_of_an_svg(data):
    file = io.BytesIO(data)
    try:
        inspect_image(file, 512)
    except NoPicture:
        return
    clean = file.getvalue().decode()
    assert [danger for danger in DANGERS if danger in clean.lower()] == []


def test_a_picture_inside_an_svg_stays():
    assert "data:image/png;base64,iVBO" in sanitized(
        svg('<image href="data:image/png;base64,iVBO"/>')
    )


LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
EXHAUSTING = {
    "entities": f'<!DOCTYPE svg [<!ENTITY a0 "ha">{LAUGHS}]>'.encode() + svg("<text>&a9;</text>"),
    "nesting": svg("<g>" * 200_000 + "</g>" * 200_000),
    "broad nesting": svg("<g>" * 150 + "<g/>" * 100_000 + "</g>" * 150),
    "elements": svg("<g/>" * 2_000_000),
    "attributes": svg("<g " + " ".join(f'data-a{n}="1"' for n in range(100_000)) + "/>"),
    "size": svg(" " * pictures.MAX_SVG_BYTES),
}


@pytest.mark.parametrize("data", EXHAUSTING.values(), ids=EXHAUSTING.keys())
def test_an_svg_made_to_exhaust_its_reader_is_refused(data):
    assert "no image" in refusal(data)


def test_a_path_of_ten_megabytes_is_only_a_large_picture():
    data = svg(f'<path d="{"M0 0L9 9" * 1_250_000}"/>')

    assert len(data) > 10_000_000
    assert len(sanitized(data)) > 10_000_000


def test_an_svg_is_stored_clean_and_under_a_type_no_browser_runs():
    bucket = Bucket()

    data = svg("<script>alert(1)</script><rect/>", ' width="30" height="20"')
    image = stored([data], bucket, preview_pixels=8)

    ((path, (content_type, file)),) = bucket.files().items()
    assert (path, content_type) == (f"{FOLDER}/0.svg.bin", "application/octet-stream")
    assert b"<rect" in file and b"script" not in file
    assert image["content_type"] == "image/svg+xml"
    assert (image["width"], image["height"], image["bytes"]) == (30, 20, len(file))
    assert (image["preview_path"], image["blurhash"]) == (None, None)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=4),
    end=st.integers(0, 1000),
)
def test_a_damaged_svg_is_read_or_refused_but_never_crashes(changes, end):
    data = bytearray(svg(DRAWING))
    for at, value in changes.items():
        data[at % len(data)] = value
    with contextlib.suppress(NoPicture):
        assert inspected(bytes(data[:end])).format == "SVG"


# --- download ---


def test_an_output_over_the_cap_is_given_up_at_the_cap():
    sent = 0

    def two_gigabytes() -> Iterable[bytes]:
        nonlocal sent
        while sent < 2 << 30:
            sent += 1000
            yield bytes(1000)

    with pytest.raises(JobError, match="provider_error: output: more than 5000 bytes"):
        stored(two_gigabytes(), max_bytes=5000)

    assert sent == 6000


def test_an_output_that_trickles_in_is_given_up_in_time_and_not_bought_again():
    def endless() -> Iterable[bytes]:
        while True:
            yield b"x"

    with (
        mock.patch("worker.DOWNLOAD_SECONDS", 0.1),
        pytest.raises(JobError, match=r"provider_timeout: output: not received within 0\.1 s"),
    ):
        stored(endless())


def test_images_in_flight_are_on_disk_and_decoded_elsewhere():
    """`make bench PART=worker` does it with 64 jobs. Held in memory, these would be 320 MB."""
    megabytes, _ = memory.measure(jobs=16, kinds=("png",))

    assert megabytes < 80


# --- what costs too much ---

DEAR = dear_jpeg()


@functools.cache
def large() -> bytes:
    """A progressive JPEG of 40 megapixels; it is held whole, in some 240 MB."""
    image = Image.new("RGB", (6600, 6000), ORANGE)
    return encoded(image, "JPEG", progressive=True, subsampling=0)


class Lab(pictures.Pictures):
    """The worker's, watched from outside."""

    def processes(self) -> list[int]:
        """Return the server's pid, and its children's."""
        if not self.server:
            return []
        pid = self.server.pid
        with contextlib.suppress(FileNotFoundError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            return [pid, *map(int, children.split())]
        return []

    def megabytes(self) -> int:
        """Return what all of them hold, shared memory counted once for each."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError, IndexError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return total * os.sysconf("SC_PAGE_SIZE") >> 20

    async def see(self, data: bytes) -> pictures.Picture:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            return await self.inspect(file, 512)

    async def until_at_work(self) -> int:
        """Wait for a child; return its pid."""
        while len(pids := self.processes()) < 2:
            await asyncio.sleep(0.005)
        return pids[1]


def in_lab(work: Callable[[Lab], Awaitable[T]]) -> T:
    async def run() -> T:
        lab = Lab()
        try:
            return await work(lab)
        finally:
            lab.close()

    return asyncio.run(run())


def test_a_picture_that_costs_too_much_is_stored_without_blurhash_and_preview():
    bucket = Bucket()

    image = stored([DEAR], bucket, preview_pixels=512)

    assert bucket.files() == {f"{FOLDER}/0.jpg": ("image/jpeg", DEAR)}
    assert (image["width"], image["height"], image["bytes"]) == (3000, 3000, len(DEAR))
    assert (image["preview_path"], image["blurhash"]) == (None, None)


def test_an_image_whose_header_alone_costs_too_much_is_stored_as_what_it_begins_as():
    head, _, rest = picture("JPEG").partition(b"\xff\xe0")
    flood = head + b"\xff\xfe\0\2" * 7_000_000 + b"\xff\xe0" + rest

    async def act(lab: Lab) -> pictures.Picture:
        return await lab.see(flood)

    assert in_lab(act) == pictures.Picture("JPEG", None, None, lacks="time")


def test_a_source_that_costs_too_much_is_the_users_fault():
    async def act(lab: Lab) -> None:
        async with asyncio.timeout(40):  # ten times as long as it should take
            await worker.Preview(lab, 0, 0).upload("dear.jpg", as_file(DEAR))

    with pytest.raises(JobError, match="invalid_input: source: takes too much time"):
        in_lab(act)


def test_dear_pictures_do_not_delay_the_others():
    async def act(lab: Lab) -> None:
        dear = [asyncio.create_task(lab.see(DEAR)) for _ in range(2)]
        await lab.until_at_work()
        others = [lab.see(picture("PNG", (1024, 768))) for _ in range(12)]

        assert all(found.preview for found in await asyncio.gather(*others))

        assert not any(task.done() for task in dear)
        assert {found.lacks for found in await asyncio.gather(*dear)} == {"time"}

    in_lab(act)


def test_large_pictures_at_once_stay_within_the_units_memory():
    async def one(lab: Lab) -> None:
        assert (await lab.see(large())).preview

    async def act(lab: Lab) -> None:
        tasks = [asyncio.create_task(one(lab)) for _ in range(4)]
        peak = 0
        while not all(task.done() for task in tasks):
            peak = max(peak, lab.megabytes())
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        print(f"{peak} MB")
        assert 200 < peak < 700

    in_lab(act)


def test_a_picture_that_takes_more_memory_than_there_is_is_stored_all_the_same(monkeypatch):
    monkeypatch.setattr(pictures, "LARGE_BYTES", 110_000_000)

    async def act(lab: Lab) -> pictures.Picture:
        return await lab.see(large())

    assert in_lab(act) == pictures.Picture("JPEG", 6600, 6000, lacks="memory")


# Of its own, for one that has freed much has that to use beside what it is given.
WITH_LITTLE = """
import io, sys, pictures
pictures.weigh = lambda *_: 0
file = io.BytesIO(sys.stdin.buffer.read())
pictures.restrict(1_000_000)
try:
    pictures.inspect_image(file, 512)
except MemoryError:
    sys.exit(7)
"""


def test_memory_that_was_not_foreseen_is_refused():
    """As if the header had told of a smaller picture."""
    data = encoded(plain.resize((7000, 7000)), "PNG", compress_level=1)

    done = subprocess.run([sys.executable, "-c", WITH_LITTLE], cwd=PROJECT, input=data, check=False)

    assert done.returncode == 7


def test_a_picture_whose_process_is_killed_is_stored_and_the_next_is_whole():
    async def act(lab: Lab) -> list[pictures.Picture]:
        task = asyncio.create_task(lab.see(DEAR))
        os.kill(await lab.until_at_work(), signal.SIGKILL)
        bare = await task
        whole = await lab.see(picture())
        os.kill(lab.processes()[0], signal.SIGKILL)
        return [bare, whole, await lab.see(picture())]

    bare, whole, again = in_lab(act)

    assert (bare.format, bare.preview, bare.lacks) == ("JPEG", None, "time")
    assert whole.blurhash and again.blurhash


def test_a_job_that_is_stopped_stops_its_picture():
    async def act(lab: Lab) -> None:
        task = asyncio.create_task(lab.see(DEAR))
        pid = await lab.until_at_work()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        eventually(lambda: pid not in lab.processes(), within=2)

    in_lab(act)


def test_where_no_process_can_be_had_the_job_waits(monkeypatch):
    monkeypatch.setattr(pictures, "__file__", "nothing")

    async def act(lab: Lab) -> None:
        await lab.see(picture())

    with pytest.raises(OSError) as error:
        in_lab(act)

    assert worker.as_job_error(error.value).code == "worker_full"


# --- metadata never decides ---

png, jpeg = picture("PNG", (90, 60)), picture("JPEG", (90, 60))
PACKED = zlib.compress(bytes(50_000_000))
METADATA = {
    "packed texts": with_chunks(png, *[chunk(b"zTXt", b"a\0\0" + PACKED)] * 9),
    "packed international texts": with_chunks(png, chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)),
    "a huge profile": with_chunks(png, chunk(b"iCCP", b"a\0\0" + PACKED)),
    "a profile packed otherwise": with_chunks(png, chunk(b"iCCP", b"a\0\7" + PACKED)),
    "an empty profile": with_chunks(png, chunk(b"iCCP", b"")),
    "a short gamma": with_chunks(png, chunk(b"gAMA", b"a")),
    "a bad checksum of a text": with_chunks(png, chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
    "exif in a png": with_chunks(png, chunk(b"eXIf", b"junk")),
    "exif": with_segment(jpeg, 0xE1, b"Exif\0\0junk"),
    "exif that counts 4 billion": with_segment(
        jpeg, 0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\x08\0\0\0"
    ),
    "a profile": with_segment(jpeg, 0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 1000),
    "a profile without a number": with_segment(jpeg, 0xE2, b"ICC_PROFILE\0"),
    "an index of several pictures": with_segment(jpeg, 0xE2, b"MPF\0junk"),
    "a short segment": with_segment(jpeg, 0xEE, b"Adobe"),
    "exif in a webp": picture("WEBP", (90, 60), exif=b"Exif\0\0junk"),
    "exif in an avif": picture("AVIF", (90, 60), exif=b"Exif\0\0MM\0*junkjunk"),
    "a profile in a webp": picture("WEBP", (90, 60), icc_profile=b"junk"),
}


@pytest.mark.parametrize("data", METADATA.values(), ids=METADATA.keys())
def test_unreadable_metadata_is_left_out(data):
    found = inspected(data, 16)

    assert (found.width, found.height) == (90, 60)
    assert found.preview and found.blurhash


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
HUGE = (10**5).to_bytes(4, "big") + SRGB[4:] + bytes(10**5 - len(SRGB))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    ("profile", "kept"),
    [(SRGB, SRGB), (LAB, None), (SRGB[:-1], None), (b"junk" * 99, None), (HUGE, None)],
    ids=["rgb", "lab", "cut", "junk", "huge"],
)
def test_a_preview_has_the_colours_of_its_image(kind, profile, kept):
    found = inspected(picture(kind, (90, 60), icc_profile=profile), 16)

    assert Image.open(io.BytesIO(found.preview or b"")).info.get("icc_profile") == kept


# --- upload ---


def test_an_upload_is_repeated_with_all_its_bytes():
    bucket = Bucket(httpx.Response(503), httpx.Response(429))
    data = picture(size=(900, 700))

    image = stored([data], bucket)

    assert [upload.content for upload in bucket.uploads] == [data] * 3
    assert {upload.headers["x-upsert"] for upload in bucket.uploads} == {"true"}
    assert (image["bytes"], image["width"], image["height"]) == (len(data), 900, 700)
    assert image["storage_path"] == f"{FOLDER}/0.png"


REFUSED = {"error": "Unauthorized", "message": "new row violates row-level security policy"}


@pytest.mark.parametrize(
    ("answer", "tries", "code"),
    [
        (httpx.Response(500), 4, "storage_unavailable"),
        (httpx.Response(408), 4, "storage_unavailable"),
        (httpx.Response(400, json={"statusCode": "429"}), 4, "storage_unavailable"),
        (httpx.Response(400, json={"statusCode": "423"}), 4, "internal"),
        (httpx.Response(400, json={"statusCode": "403"} | REFUSED), 4, "internal"),
        (httpx.Response(400, json={"statusCode": "404"}), 1, "internal"),
        (httpx.Response(400, json={"statusCode": "413"}), 1, "internal"),
        (httpx.Response(400, json=["odd"]), 1, "internal"),
        (httpx.Response(401), 1, "internal"),
        (httpx.Response(413, text="<html>too large</html>"), 1, "internal"),
        (httpx.Response(415), 1, "internal"),
    ],
)
def test_an_upload_that_never_succeeds_is_our_error_and_repeated_if_that_may_help(
    answer, tries, code
):
    bucket = Bucket(*[answer] * 9)

    with pytest.raises(JobError, match=f"{code}: upload: HTTP {answer.status_code}"):
        stored([picture()], bucket)

    assert len(bucket.uploads) == tries


def test_a_storage_that_cannot_be_reached_is_down():
    bucket = Bucket(*[httpx.ConnectError("refused")] * 9)

    with pytest.raises(JobError, match="storage_unavailable: upload: ConnectError"):
        stored([picture()], bucket)

    assert len(bucket.uploads) == worker.HTTP_TRIES


# --- all the way to the owner ---


@pytest.fixture
def workers(
    stack: Stack, stack_db: Database, fake: FakeReplicate, tmp_path: Path
) -> Iterator[Workers]:
    """One worker on the stack's own database, with Replicate faked and its models switched on."""
    active = stack_db.execute("select id from public.models where is_active")
    stack_db.execute("update public.models set is_active = true")
    with Workers(stack_db, stack, tmp_path) as workers:
        workers.start(REPLICATE_API_URL=fake.url, REPLICATE_API_TOKEN=fake.token)
        yield workers
    ids = [row["id"] for row in active]
    stack_db.execute("update public.models set is_active = (id = any(%s))", ids)


def made(user: SignedUp, workers: Workers, model: str) -> dict[str, Any]:
    """Have an image made, and answer what its owner is told of it."""
    workers.db.execute("select public.grant_credits(%s, 20, 'grant', %s)", user.id, user.id)
    job = user.enqueued(model=model)
    workers.until(job, "completed")
    (image,) = answer(user.get_job_status(job))["images"]
    return dict(image)


def test_the_owner_gets_an_avif_and_its_preview(user, nobody, workers, fake):
    fake.next(format="avif", size=(900, 600))

    image = made(user, workers, "black-forest-labs/flux-schnell")

    file = user.download(f"generations/{image['path']}")
    preview = user.download(f"generations/{image['preview_path']}")
    assert (file.headers["content-type"], len(file.content)) == ("image/avif", image["bytes"])
    assert (image["content_type"], image["width"], image["height"]) == ("image/avif", 900, 600)
    assert image["blurhash"] == inspected(file.content, 512).blurhash
    assert preview.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(preview.content)).size == (512, 341)
    assert not nobody.download(f"generations/{image['preview_path']}").is_success


def test_the_owner_gets_an_svg_that_browsers_only_save(user, workers, fake):
    image = made(user, workers, "recraft-ai/recraft-v3-svg")

    file = user.download(f"generations/{image['path']}")
    assert file.headers["content-type"] == "application/octet-stream"
    assert b"<rect" in file.content
    assert (image["content_type"], image["width"], image["height"]) == ("image/svg+xml", 64, 48)
    assert (image["preview_path"], image["blurhash"]) == (None, None)
