"""What worker.py and pictures.py make of an output: what is taken, refused and stored."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import uuid
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import blurhash
import httpx
import pytest
from bench import memory
from database import PROJECT
from hostile import chunk, dear_jpeg, encoded, with_chunks, with_segment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageSequence, ImageStat
from PIL.PngImagePlugin import PngInfo
from worker_process import eventually

import pictures
import worker
from pictures import NoPicture, draw_preview, inspect_image
from worker import JobError, Settings, Storage

T = TypeVar("T")

FOLDER = f"{uuid.UUID(int=1)}/{uuid.UUID(int=2)}"
RASTER = ["PNG", "JPEG", "WEBP", "AVIF", "GIF"]
REQUIRED = {
    "DATABASE_URL": "postgresql://localhost",
    "SUPABASE_URL": "http://storage",
    "SUPABASE_SERVICE_KEY": "key",
}


def table(cases: dict[str, Any], names: str = "data") -> pytest.MarkDecorator:
    """One test for each case, named by its key."""
    return pytest.mark.parametrize(names.split(), [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name)
        for name, case in cases.items()
    ])  # fmt: skip


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    return encoded(Image.effect_noise(size, 50).convert("RGB"), kind, **options)


def looked_at(data: bytes, preview_pixels: int = 0) -> tuple[pictures.Picture, bytes]:
    """Return what is found, and what is left of the file."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        found = inspect_image(file, preview_pixels)
        file.seek(0)
        return found, file.read()


def inspected(data: bytes, preview_pixels: int = 0) -> pictures.Picture:
    return looked_at(data, preview_pixels)[0]


def seen(data: bytes) -> tuple[str, int | None, int | None]:
    found = inspected(data)
    return found.format, found.width, found.height


def refusal(data: bytes) -> str:
    with pytest.raises(NoPicture) as refused:
        inspected(data)
    return str(refused.value)


class Bucket:
    """Takes every upload, or answers the first ones as told, or cannot be reached."""

    def __init__(self, *answers: httpx.Response | httpx.TransportError) -> None:
        self.answers = list(answers)
        self.uploads: list[httpx.Request] = []
        self.pictures: Any = pictures.Pictures()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
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

    def stored(self, *bodies: Iterable[bytes | Exception], **limits: int) -> dict[str, Any]:
        """Store one output that comes in these parts, or fails so; read anew, as the next one."""
        left = [*bodies]

        async def chunks() -> AsyncGenerator[bytes, None]:
            for part in left.pop(0) if len(left) > 1 else left[0]:
                await asyncio.sleep(0)
                if isinstance(part, Exception):
                    raise part
                yield part

        async def store() -> dict[str, Any]:
            transport = httpx.MockTransport(self.handle)
            values = {"MAX_IMAGE_BYTES": 10**7, "IMAGE_PREVIEW_PIXELS": 0} | limits
            environment = REQUIRED | {name: str(value) for name, value in values.items()}
            async with httpx.AsyncClient(transport=transport) as http:
                storage = Storage(Settings(environment), http, self.pictures)
                job = SimpleNamespace(user_id=uuid.UUID(int=1), job_id=uuid.UUID(int=2))
                return await storage.store(job, 0, chunks)

        with mock.patch("worker.backoff", return_value=0.0):
            return asyncio.run(store())


# --- source images ---

ROOT = "https://project.supabase.co/storage/v1/object"
SIGNED = "/object/sign/inputs/u/cat.png?token=t"
Answers = list[httpx.Response | httpx.TransportError]


def handed_over(path: str, answers: Answers, *, is_as_given: bool = True) -> tuple[Any, Bucket]:
    """Have a source handed over from a Storage that is public; return what stands for it."""
    bucket = Bucket(*answers)
    provider = SimpleNamespace(fetches_sources=True, upload=mock.AsyncMock(return_value="uploaded"))
    bucket.pictures = mock.Mock(look_at_source=mock.AsyncMock(return_value=("PNG", is_as_given)))
    job = SimpleNamespace(
        provider_input={"prompt": "p", "image": [path], "mask": None},
        image_inputs=["image", "mask", "more"],
        deadline_seconds=300.0,
    )

    async def act() -> dict[str, Any]:
        settings = Settings(REQUIRED | {"SUPABASE_URL": "https://project.supabase.co"})
        async with httpx.AsyncClient(transport=httpx.MockTransport(bucket.handle)) as http:
            storage = Storage(settings, http, bucket.pictures)
            one = worker.Worker(settings, mock.Mock(), {}, storage, mock.Mock())
            return await one._with_sources(provider, job)

    sent = asyncio.run(act())
    assert sent == {"prompt": "p", "image": sent["image"], "mask": None}
    return sent["image"], bucket


@pytest.mark.parametrize(
    ("path", "escaped", "signed"),
    [
        ("u/cat.png", "inputs/u/cat.png", {"signedURL": SIGNED}),
        ("inputs/u/cat.png", "inputs/u/cat.png", {"signedURL": SIGNED}),
        ("generations/u/j/0.png", "generations/u/j/0.png", {"signedURL": SIGNED}),
        ("u/a cat?#%41\\.png", "inputs/u/a%20cat%3F%23%2541%5C.png",
         {"signedURL": "/object/sign/inputs/u/a cat?#%41\\.png?token=t"}),
        ("u/%2e%2e/é望.png", "inputs/u/%252e%252e/%C3%A9%E6%9C%9B.png", {"signedURL": SIGNED}),
        ("u/a&b=c@d+e,f;g:h!$*'(1)", "inputs/u/a&b=c@d+e,f;g:h!$*'(1)", {"signedURL": SIGNED}),
    ],
)  # fmt: skip
def test_a_source_is_given_as_a_signed_address_of_its_own_where_storage_is_public(
    path, escaped, signed
):
    given, bucket = handed_over(path, [httpx.Response(200), httpx.Response(200, json=signed)])

    assert given == [f"{ROOT}/sign/{escaped}?token=t"]
    assert [str(each.url) for each in bucket.uploads] == [
        f"{ROOT}/{escaped}",
        f"{ROOT}/sign/{escaped}",
    ]
    lasting = json.loads(bucket.uploads[1].content)["expiresIn"]
    assert lasting >= 600  # as long as the job may take, and more


def test_a_source_that_is_not_as_its_user_gave_it_is_uploaded_though_storage_is_public():
    given, _ = handed_over("u/cat.png", [httpx.Response(200)], is_as_given=False)

    assert given == ["uploaded"]


def missing(message: str) -> httpx.Response:
    return httpx.Response(400, json={"statusCode": "404", "error": "x", "message": message})


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([missing("Object not found")], "invalid_input"),
        ([httpx.Response(200), missing("Object not found")], "invalid_input"),
        ([missing("Bucket not found")], "internal"),
        ([httpx.Response(404, text="<html>another server")], "internal"),
        ([httpx.Response(404, json=["odd"])], "internal"),
        ([httpx.Response(400, json={"statusCode": "403", "message": "no"})], "internal"),
        ([httpx.Response(503)], "storage_unavailable"),
        ([httpx.ReadTimeout("late")], "storage_unavailable"),
        ([httpx.Response(200, content=bytes((32 << 20) + 1))], "invalid_input"),
    ],
)
def test_a_source_that_is_gone_is_the_users_fault_and_a_storage_that_is_not_well_is_not(
    answers, code
):
    with pytest.raises(JobError) as refusal:
        handed_over("u/cat.png", answers)

    assert refusal.value.code == code


# --- what is an image, and what it shows ---

ORANGE, WHITE, RED = (230, 120, 40), (255, 255, 255), (255, 0, 0)
plain = Image.new("RGB", (300, 200), ORANGE)
half = Image.new("RGBA", (300, 200), (*ORANGE, 128))
red, blue = (Image.new("RGB", (300, 200), colour) for colour in ("red", "blue"))
MOVING = {"save_all": True, "append_images": [blue], "duration": 100}
KINDS = {
    **{f"rgb {kind}": (encoded(plain, kind), kind, ORANGE) for kind in RASTER},
    # Of an animation the first frame is shown.
    **{
        f"moving {kind}": (encoded(red, kind, **MOVING), kind, RED)
        for kind in ("GIF", "WEBP", "AVIF", "PNG")
    },
    "jpeg of several": (encoded(red, "MPO", **MOVING), "JPEG", RED),
    "progressive jpeg": (encoded(plain, "JPEG", progressive=True), "JPEG", ORANGE),
    "cmyk jpeg": (encoded(plain.convert("CMYK"), "JPEG"), "JPEG", ORANGE),
    "grey jpeg": (encoded(plain.convert("L"), "JPEG"), "JPEG", (144, 144, 144)),
    "palette png": (encoded(plain.quantize(8), "PNG"), "PNG", ORANGE),
    "clear palette png": (encoded(plain.quantize(8), "PNG", transparency=0), "PNG", WHITE),
    "16-bit png": (encoded(Image.new("I;16", (300, 200), 40000), "PNG"), "PNG", (156, 156, 156)),
    "1-bit png": (encoded(Image.new("1", (300, 200), 1), "PNG"), "PNG", WHITE),
    "grey and alpha": (encoded(Image.new("LA", (300, 200), (0, 128)), "PNG"), "PNG", (127,) * 3),
    "rgb png with a clear colour": (encoded(plain, "PNG", transparency=ORANGE), "PNG", WHITE),
    **{
        f"half clear {kind}": (encoded(half, kind), kind, (242, 187, 147))
        for kind in ("PNG", "WEBP", "AVIF")
    },
}


@table(KINDS, "data kind colour")
def test_preview_and_blurhash_show_the_colours_of_every_kind_of_image(data, kind, colour):
    found = inspected(data, 100)

    assert (found.format, found.width, found.height) == (kind, 300, 200)
    assert seen(data) == (kind, 300, 200)
    preview = Image.open(io.BytesIO(found.preview or b"")).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", preview.size, "white"), preview).convert("RGB")
    rows = blurhash.decode(found.blurhash, 8, 8)
    hashed = [sum(pixel[band] for row in rows for pixel in row) / 64 for band in range(3)]
    for shown in (hashed, ImageStat.Stat(flat).mean):
        assert shown == pytest.approx(colour, abs=12)


HOSTILE = {
    "empty": b"",
    "a page": b"<!doctype html><script>alert(1)</script>",
    "a well-formed page": b'<html xmlns="http://www.w3.org/1999/xhtml"><body/></html>',
    "a program": b"\x7fELF" + bytes(200),
    "a script called gif": b"GIF89a=1;alert(1)",
    "large and nothing": bytes(11 << 20),
    "only a header": picture()[:33],
    "a broken chunk": picture()[:33] + b"\0\0\0\x64" + picture()[37:],
    "a jpeg after a page": b"<!doctype html>" + picture("JPEG"),
    **{f"truncated {kind}": picture(kind, (90, 80))[:-40] for kind in RASTER},
}


@table(HOSTILE)
def test_bytes_that_are_no_image_are_the_providers_error(data):
    assert "no image" in refusal(data)


@pytest.mark.parametrize("kind", RASTER)
def test_of_a_file_that_is_something_else_too_the_image_is_stored(kind):
    bucket, data = Bucket(), picture(kind)

    image = bucket.stored([data, b"<script>alert(1)</script>PK\x05\x06" + bytes(18)])

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


@table(BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(data):
    with mock.patch("PIL.ImageFile.ImageFile.load", side_effect=AssertionError("decoded")):
        error = refusal(data)

    assert error == "too many pixels"


@pytest.mark.parametrize(
    ("size", "pixels", "preview"),
    [
        ((2000, 1000), 512, (512, 256)),
        ((700, 1400), 512, (256, 512)),
        ((513, 512), 512, (512, 511)),
        ((512, 512), 512, None),
        ((3000, 2), 512, (512, 1)),
        ((2000, 1000), 16, (16, 8)),
        ((2000, 1000), 0, None),
    ],
)
def test_a_preview_is_made_of_what_is_larger_than_it(size, pixels, preview):
    found = inspected(picture("JPEG", size), pixels)

    assert (found.width, found.height) == size
    assert blurhash.components(found.blurhash) == (4, 3)
    image = Image.open(io.BytesIO(found.preview)) if found.preview else None
    assert (image and image.size) == preview
    assert not image or (image.format == "WEBP" and not image.getexif())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_size_preview_and_blurhash_are_turned_as_displayed(kind):
    upright = Image.new("RGB", (600, 400), "white")
    upright.paste("black", (0, 0, 300, 400))
    undone = [None, 0, 3, 1, 5, 2, 6, 4]  # Transpose that undoes the display's
    for orientation, turn in enumerate(undone, start=1):
        lying = upright if turn is None else upright.transpose(Image.Transpose(turn))
        exif = Image.Exif()
        exif[0x0112] = orientation

        found = inspected(encoded(lying, kind, exif=exif), 60)

        shown = Image.open(io.BytesIO(found.preview or b"")).convert("L")
        assert (found.width, found.height, shown.size) == (600, 400, (60, 40)), orientation
        left, right = shown.getpixel((5, 20)), shown.getpixel((55, 20))
        (dark, *_), *_, (bright, *_) = blurhash.decode(found.blurhash, 8, 8)[4]
        assert left < 9 and right > 246 and dark < 130 and bright > 200, orientation


# --- SVG ---

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"{}>{}</svg>'
)


def svg(inside: str = "", attributes: str = "") -> bytes:
    return SVG.format(attributes, inside).encode()


def sanitized(data: bytes) -> str:
    found, clean = looked_at(data, 512)
    assert found.format == "SVG"
    return clean.decode()


DRAWING = svg(
    '<title>t</title><defs><linearGradient id="g"><stop offset="0" stop-color="#f00"/>'
    '</linearGradient><filter id="f"><feGaussianBlur stdDeviation="2"/></filter></defs>'
    '<g transform="scale(2)"><path d="M0 0L9 9Z" fill="url(#g)" filter="url(#f)"/></g>'
    '<text x="1" font-family="serif">&lt;ä&gt;</text><use href="#g"/>'
    '<image href="data:image/png;base64,iVBO"/>'
)
DOCTYPE = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd">'
HARMLESS = {
    "plain": DRAWING,
    "bom": b"\xef\xbb\xbf" + DRAWING,
    "comment": b"\n <!-- by a model -->\n" + DRAWING,
    "declaration": b'<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n' + DRAWING,
    "doctype": DOCTYPE + DRAWING,
    "utf-16": DRAWING.decode().encode("utf-16"),
    "ten megabytes": DRAWING.replace(b"M0 0", b"M0 0L9 9" * 1_250_000 + b"M0 0"),
}
KEPT = ["linearGradient", "feGaussianBlur", "M0 0L9 9Z", "url(#g)", "&lt;ä", 'href="#g"', "64,iVBO"]


@table(HARMLESS)
def test_a_harmless_svg_keeps_what_it_draws(data):
    clean = sanitized(data)

    assert [each for each in KEPT if each not in clean] == []


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        (' width="300px" height="199.6"', (300, 200)),
        (' width="100%" height="100%" viewBox="0 0 640 480"', (640, 480)),
        (' viewBox="-5,-5,640.2,480"', (640, 480)),
        (' width="10cm" height="5cm"', (None, None)),
        (' width="0" height="0"', (None, None)),
        (' width="300"', (None, None)),
        (' width="9999999999" height="1"', (None, None)),
        (' viewBox="0 0 nan inf"', (None, None)),
    ],
)
def test_an_svg_has_a_size_if_it_says_one_in_plain_numbers(attributes, size):
    assert seen(svg(attributes=attributes)) == ("SVG", *size)


XHTML = 'xmlns="http://www.w3.org/1999/xhtml"'
ATTACKS = {
    "script": svg("<script>alert(1)</script>"),
    "script from elsewhere": svg('<script xlink:href="https://evil.example/x.js"/>'),
    "handler": svg('<rect onclick="alert(1)"/>', ' onload="alert(1)"'),
    "foreignObject": svg(f"<foreignObject><iframe {XHTML}/></foreignObject>"),
    "html": svg(f"<script {XHTML}>alert(1)</script>"),
    "link": svg('<a href="javascript:alert(1)"><text>x</text></a>'),
    "entities": svg('<a xlink:href="java&#10;script&#58;alert(1)"><text>x</text></a>'),
    "animated link": svg('<a><animate attributeName="href" values="#x"/></a>'),
    "set handler": svg('<set attributeName="onclick" to="x"/>'),
    "image": svg('<image href="https://evil.example/x.png"/><image xlink:href="//evil.a/y"/>'),
    "use": svg('<use xlink:href="https://evil.example/x.svg#a"/>'),
    "base": svg('<use href="#a"/>', ' xml:base="https://evil.example/"'),
    "css import": svg('<style>@import "https://evil.example/x.css"; a{}</style>'),
    "css in disguise": svg(r'<style>@\69mport "//evil.example/x.css"; a{}</style>'),
    "css url": svg("<style>rect{fill:url( 'https://evil.example/x' )}</style>"),
    "css in cdata": svg("<style><![CDATA[rect{fill:UrL(//evil.example/x)}]]></style>"),
    "font": svg("<style>@font-face{src:url(https://evil.example/f.woff)}</style>"),
    "style attribute": svg('<rect style="fill:url(https://evil.example/x)"/>'),
    "paint": svg('<rect fill="url(https://evil.example/x#g)" mask="url(//evil.example/m)"/>'),
    "image-set": svg('<rect style="mask-image:image-set(&quot;//evil.example/x&quot; 1x)"/>'),
    "css after an element": svg('<style><g/>@import "//evil.example/x.css";</style>'),
    "stylesheet": b'<?xml-stylesheet href="//evil.example/x.css"?>' + svg(),
    "data page": svg('<image href="data:text/html,&lt;script&gt;alert(1)&lt;/script&gt;"/>'),
    "data svg": svg('<use href="data:image/svg+xml;base64,PHN2Zz4="/>'),
    "prefix": f'<s:svg xmlns:s="http://www.w3.org/2000/svg" {XHTML}><s:a>x</s:a></s:svg>'.encode(),
    "default": b'<!DOCTYPE svg [<!ATTLIST rect onclick CDATA "alert(1)">]>' + svg("<rect/>"),
    "file": b'<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + svg("<text>&a;</text>"),
    "parameter entity": b'<!DOCTYPE svg [<!ENTITY % a SYSTEM "//evil.example">%a;]>' + svg(),
    "undeclared entity": svg("<text>&a;</text>"),
    "page around it": b"<html>" + svg("<script>alert(1)</script>") + b"</html>",
    "page after it": svg() + b"<script>alert(1)</script>",
    "no namespace": b"<svg onload='alert(1)'/>",
    "cut off": svg("<g><script>alert(1)</script>")[:-12],
}
DANGERS = ("script", "alert", "evil", "onload", "onclick", "foreign", "iframe", "xhtml", "@import",
           "data:", "passwd", "attributename", "<!", "<?xml-", "xml:base")  # fmt: skip


@table(ATTACKS)
def test_nothing_dangerous_is_left_of_an_svg(data):
    try:
        clean = sanitized(data)
    except NoPicture:
        return
    assert [danger for danger in DANGERS if danger in clean.lower()] == []


LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
EXHAUSTING = {
    "entities": f'<!DOCTYPE svg [<!ENTITY a0 "ha">{LAUGHS}]>'.encode() + svg("<text>&a9;</text>"),
    "nesting": svg("<g>" * 200_000 + "</g>" * 200_000),
    "broad nesting": svg("<g>" * 150 + "<g/>" * 100_000 + "</g>" * 150),
    "elements": svg("<g/>" * 2_000_000),
    "attributes": svg("<g " + " ".join(f'data-a{n}="1"' for n in range(100_000)) + "/>"),
    "size": svg(" " * pictures.MAX_SVG_BYTES),
}


@table(EXHAUSTING)
def test_an_svg_made_to_exhaust_its_reader_is_refused(data):
    assert "no image" in refusal(data)


def test_an_svg_is_stored_clean_and_under_a_type_no_browser_runs():
    bucket = Bucket()

    data = svg("<script>alert(1)</script><rect/>", ' width="30" height="20"')
    image = bucket.stored([data], IMAGE_PREVIEW_PIXELS=8)

    ((path, (content_type, file)),) = bucket.files().items()
    assert (path, content_type) == (f"{FOLDER}/0.svg.bin", "application/octet-stream")
    assert b"<rect" in file and b"script" not in file
    assert image["content_type"] == "image/svg+xml"
    assert (image["width"], image["height"], image["bytes"]) == (30, 20, len(file))
    assert (image["preview_path"], image["blurhash"]) == (None, None)


# --- what is refused by rules of ours, and what is broken ---

OTHERS = {
    **{kind: picture(kind) for kind in ("BMP", "TIFF", "ICO", "JPEG2000", "PDF")},
    "a film": b"\0\0\0\x18ftypmp42" + bytes(200),
    "another film": b"\x1aE\xdf\xa3" + bytes(200),
    "a sound": b"RIFF\xff\0\0\0WAVEfmt " + bytes(200),
    "a heic": b"\0\0\0\x18ftypheic" + bytes(200),
    "a model": b"glTF\2\0\0\0" + bytes(200),
    "an archive": b"PK\x03\x04" + bytes(200),
    "a program": b"\x7fELF" + bytes(200),
    "a large svg": svg(" " * pictures.MAX_SVG_BYTES),
    "an svg with an entity": b'<!DOCTYPE svg [<!ENTITY a "b">]>' + svg(),
    "a bomb": png_of(60_000, 60_000),
}


@table(OTHERS)
def test_a_whole_file_of_a_kind_or_size_that_is_not_taken_is_refused_and_not_read_again(data):
    with pytest.raises(JobError, match="output_refused: output: "):
        Bucket().stored([data], [AssertionError("again")])


BROKEN = {
    "cut short": [picture(size=(90, 80))[:-40]],
    "a page of an error": [b"<!doctype html><title>502</title>"],
    "nothing": [],
    "a connection that is lost": [picture()[:50], httpx.ReadError("reset")],
    "fewer bytes than told": [picture()[:50], httpx.RemoteProtocolError("incomplete")],
    "an error of the server": [JobError("internal", "output: HTTP 502")],
    "not there yet": [JobError("result_lost", "output: HTTP 404")],
}


@table({name: (parts,) for name, parts in BROKEN.items()}, "parts")
def test_an_output_that_comes_broken_is_read_again_before_it_is_given_up(parts):
    bucket, data = Bucket(), picture(size=(90, 70))

    bucket.stored(parts, parts, parts, [data])

    assert bucket.files() == {f"{FOLDER}/0.png": ("image/png", data)}
    with pytest.raises(JobError, match=r"^(provider_error|internal|result_lost): output: "):
        Bucket().stored(*[parts] * worker.HTTP_TRIES, [AssertionError("again")])


# --- what a file tells beside its picture ---

PROMPT = b"a lighthouse at dusk"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LYING = Image.Exif()
LYING[0x0112], LYING[0x010E] = 6, PROMPT.decode()
LYING.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + PROMPT  # where Stable Diffusion puts it
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>" + PROMPT + b"</x:xmpmeta>"
SAID: dict[str, Any] = {"exif": LYING, "xmp": XMP, "icc_profile": SRGB}


def png_texts() -> PngInfo:
    info = PngInfo()
    info.add_text("parameters", PROMPT.decode())
    info.add_text("prompt", PROMPT.decode(), zip=True)
    info.add_itxt("workflow", PROMPT.decode())
    return info


def boxed(kind: bytes, inside: bytes) -> bytes:
    return struct.pack(">I", len(inside) + 8) + kind + inside


TELLING = {
    "png": picture("PNG", pnginfo=png_texts(), exif=LYING, icc_profile=SRGB),
    "png with exif at its end": picture("PNG", icc_profile=SRGB)[:-12]
    + chunk(b"eXIf", LYING.tobytes()[6:])
    + chunk(b"IEND", b""),
    "moving png": encoded(red, "PNG", pnginfo=png_texts(), exif=LYING, icc_profile=SRGB, **MOVING),
    "jpeg": with_segment(picture("JPEG", comment=PROMPT, **SAID), 0xED, b"Photoshop " + PROMPT),
    "progressive jpeg": picture("JPEG", (300, 200), progressive=True, comment=PROMPT, **SAID),
    "cmyk jpeg": encoded(plain.convert("CMYK"), "JPEG", comment=PROMPT, exif=LYING, xmp=XMP),
    "jpeg of several": encoded(red, "MPO", **MOVING, exif=LYING) + PROMPT,
    "webp": picture("WEBP", **SAID),
    "lossless webp": encoded(half, "WEBP", lossless=True, **SAID),
    "moving webp": encoded(red, "WEBP", **SAID, **MOVING),
    "avif": picture("AVIF", **SAID) + boxed(b"uuid", bytes(16) + PROMPT),
    "half clear avif": encoded(half, "AVIF", **SAID) + PROMPT,
    "moving avif": encoded(red, "AVIF", **SAID, **MOVING),
    "gif": picture("GIF", comment=PROMPT),
    "moving gif": encoded(red, "GIF", comment=PROMPT, loop=0, **MOVING) + PROMPT,
}


def shown(data: bytes) -> list[Any]:
    """All that a viewer needs. Of a JPEG of several, the first is shown."""
    with Image.open(io.BytesIO(data), formats=RASTER) as image:
        turn, colours = image.getexif().get(0x0112), image.info.get("icc_profile")
        ways = [turn, colours, image.info.get("loop"), image.info.get("transparency")]
        frames = [frame.convert("RGBA").tobytes() for frame in ImageSequence.Iterator(image)]
        return [*ways, image.mode, image.size, *frames[: 1 if image.format == "MPO" else None]]


@table(TELLING)
def test_what_is_stored_shows_the_same_and_tells_nothing(data):
    bucket = Bucket()

    bucket.stored([data])

    ((_, clean),) = bucket.files().values()
    assert shown(clean) == shown(data)
    assert PROMPT in data or b"zTXt" in data
    for text in (PROMPT, b"zTXt", b"xmpmeta", b"Photoshop"):
        assert text not in clean


@pytest.mark.parametrize("words", ["<title>{}</title>", "<g><desc id='d'>{}</desc></g>",
    "<!-- {} -->", "<metadata><r:RDF xmlns:r='r'>{}</r:RDF></metadata>"])  # fmt: skip
def test_an_svg_tells_nothing_either(words):
    clean = sanitized(svg(words.format(PROMPT.decode()) + "<text>kept</text>"))

    assert PROMPT.decode() not in clean and "<text>kept</text>" in clean


def test_of_a_file_that_is_half_stripped_when_its_process_ends_no_picture_is_left():
    class Ending(mmap.mmap):
        def move(self, *_: int) -> None:
            raise SystemExit

    with tempfile.TemporaryFile() as file:
        file.write(TELLING["jpeg"])
        file.flush()
        with mock.patch("pictures.mmap.mmap", Ending), pytest.raises(SystemExit):
            pictures.strip(file)
        with pytest.raises(NoPicture):
            inspect_image(file, 0)


@settings(max_examples=300, deadline=None)
@given(
    whole=st.sampled_from([*map(picture, RASTER), *TELLING.values(), DRAWING]),
    changes=st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=4),
    end=st.integers(0, 3000),
)
def test_a_damaged_picture_is_read_or_refused_but_never_crashes(whole, changes, end):
    data = bytearray(whole)
    for at, value in changes.items():
        data[at % len(data)] = value
    with contextlib.suppress(NoPicture):
        found = inspected(bytes(data[:end]), 16)
        assert found.format == "SVG" or (found.width and found.height)


# --- metadata never decides ---

png, jpeg = picture("PNG", (90, 60)), picture("JPEG", (90, 60))
PACKED = zlib.compress(bytes(50_000_000))
COUNTS = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\x08\0\0\0"
METADATA = {
    "packed texts": with_chunks(png, *[chunk(b"zTXt", b"a\0\0" + PACKED)] * 9),
    "packed international texts": with_chunks(png, chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)),
    "a huge profile": with_chunks(png, chunk(b"iCCP", b"a\0\0" + PACKED)),
    "a profile packed otherwise": with_chunks(png, chunk(b"iCCP", b"a\0\7" + PACKED)),
    "a short gamma": with_chunks(png, chunk(b"gAMA", b"a")),
    "a bad checksum of a text": with_chunks(png, chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
    "exif in a png": with_chunks(png, chunk(b"eXIf", b"junk")),
    "exif": with_segment(jpeg, 0xE1, b"Exif\0\0junk"),
    "exif that counts 4 billion": with_segment(jpeg, 0xE1, COUNTS),
    "a profile without a number": with_segment(jpeg, 0xE2, b"ICC_PROFILE\0"),
    "an index of several pictures": with_segment(jpeg, 0xE2, b"MPF\0junk"),
    "a short segment": with_segment(jpeg, 0xEE, b"Adobe"),
    "exif in a webp": picture("WEBP", (90, 60), exif=b"Exif\0\0junk"),
    "exif in an avif": picture("AVIF", (90, 60), exif=b"Exif\0\0MM\0*junkjunk"),
}


@table(METADATA)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unreadable_metadata_is_left_out(data):
    found = inspected(data, 16)

    assert (found.width, found.height) == (90, 60)
    assert found.preview and found.blurhash


@pytest.mark.parametrize("part", ["blur", "is_of_rgb"])
@pytest.mark.parametrize("kind", RASTER)
def test_what_cannot_be_made_of_a_picture_is_left_out(kind, part):
    with mock.patch(f"pictures.{part}", side_effect=ValueError):
        found = inspected(picture(kind, (90, 60)), 16)

    assert found == pictures.Picture(kind, 90, 60, lacks="ValueError")


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
HUGE = (10**5).to_bytes(4, "big") + SRGB[4:] + bytes(10**5 - len(SRGB))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_preview_has_the_colours_of_its_image(kind):
    kept = []
    for profile in (SRGB, LAB, SRGB[:-1], b"junk" * 99, HUGE):
        found = inspected(picture(kind, (90, 60), icc_profile=profile), 16)
        kept.append(Image.open(io.BytesIO(found.preview or b"")).info.get("icc_profile"))

    assert kept == [SRGB, None, None, None, None]


# --- download and upload ---


def test_image_preview_and_facts_are_stored_side_by_side():
    bucket = Bucket()
    data = picture("AVIF", (1200, 900))

    image = bucket.stored([data[:5000], data[5000:]], IMAGE_PREVIEW_PIXELS=512)

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


def test_what_costs_too_much_to_look_at_is_stored_as_it_is():
    bucket, data = Bucket(), picture("JPEG")
    found = pictures.Picture("JPEG", 3000, 3000, lacks="time")
    bucket.pictures = mock.Mock(inspect=mock.AsyncMock(return_value=found))

    image = bucket.stored([data])

    assert bucket.files() == {f"{FOLDER}/0.jpg": ("image/jpeg", data)}
    assert (image["width"], image["preview_path"], image["blurhash"]) == (3000, None, None)


def test_an_output_over_the_cap_is_refused_at_the_cap_and_not_read_again():
    sent: list[int] = []
    two_gigabytes = (bytes(1000) for number in range(2 << 20) if not sent.append(number))

    with pytest.raises(JobError, match="output_refused: output: more than 5000 bytes"):
        Bucket().stored(two_gigabytes, [AssertionError("again")], MAX_IMAGE_BYTES=5000)

    assert len(sent) == 6


def test_an_output_that_trickles_in_is_given_up_in_time_and_not_bought_again():
    late = r"provider_timeout: output: not received within 0\.1 s"

    with mock.patch("worker.DOWNLOAD_SECONDS", 0.1), pytest.raises(JobError, match=late):
        Bucket().stored(iter(lambda: b"x", b""), [AssertionError("again")])


def test_images_in_flight_are_on_disk_and_decoded_elsewhere():
    """`make bench PART=worker` does it with 64 jobs. Held in memory, these would be 160 MB."""
    megabytes, _ = memory.measure(jobs=8, kinds=("png",))

    assert megabytes < 80


def test_an_upload_is_repeated_with_all_its_bytes():
    bucket = Bucket(httpx.Response(503), httpx.Response(429))
    data = picture(size=(900, 700))

    image = bucket.stored([data])

    assert [upload.content for upload in bucket.uploads] == [data] * 3
    assert {upload.headers["x-upsert"] for upload in bucket.uploads} == {"true"}
    assert (image["bytes"], image["storage_path"]) == (len(data), f"{FOLDER}/0.png")


def test_what_is_stored_may_be_kept_by_every_cache_for_ever():
    bucket = Bucket()

    bucket.stored([picture(size=(90, 60))], IMAGE_PREVIEW_PIXELS=16)

    told = [upload.headers["cache-control"] for upload in bucket.uploads]
    assert told == ["max-age=31536000, immutable"] * 2


@pytest.mark.parametrize("status", [403, 413, 503])
def test_a_picture_whose_preview_is_not_taken_is_stored_without(status):
    bucket = Bucket(httpx.Response(200), *[httpx.Response(status)] * 9)

    image = bucket.stored([picture(size=(90, 60))], IMAGE_PREVIEW_PIXELS=16)

    assert (image["preview_path"], len(image["blurhash"])) == (None, 28)


BAD, OUTAGE = JobError("result_lost", "gone"), JobError("storage_unavailable", "down")


@pytest.mark.parametrize(
    ("outputs", "kept"),
    [
        ([None, BAD, None, BAD], [0, 1]),
        ([BAD, JobError("internal", "other")], BAD),
        ([None, OUTAGE, None], OUTAGE),  # the next attempt may well have all of them
    ],
    ids=str,
)
def test_outputs_that_are_good_are_kept_without_gaps_and_else_the_first_says_why(outputs, kept):
    async def store(job: Any, position: int, output: Any) -> int:
        if output:
            raise output
        return position

    one = worker.Worker(*[mock.Mock()] * 3, mock.Mock(store=store), mock.Mock())
    with contextlib.nullcontext() if isinstance(kept, list) else pytest.raises(JobError) as error:
        assert asyncio.run(one._store(mock.Mock(), outputs)) == kept
    assert isinstance(kept, list) or error.value is kept


DENIED = {"error": "Unauthorized", "message": "new row violates row-level security policy"}


@pytest.mark.parametrize(
    ("answer", "tries", "code"),
    [
        (httpx.ConnectError("refused"), 4, "storage_unavailable"),
        (httpx.Response(500), 4, "storage_unavailable"),
        (httpx.Response(408), 4, "storage_unavailable"),
        (httpx.Response(400, json={"statusCode": "429"}), 4, "storage_unavailable"),
        (httpx.Response(400, json={"statusCode": "423"}), 4, "internal"),
        (httpx.Response(400, json={"statusCode": "403"} | DENIED), 1, "internal"),
        (httpx.Response(400, json={"statusCode": "413"}), 1, "output_refused"),
        (httpx.Response(400, json={"statusCode": "415"}), 1, "output_refused"),
        (httpx.Response(400, json=["odd"]), 1, "internal"),
        (httpx.Response(401), 1, "internal"),
        (httpx.Response(413, text="<html>too large</html>"), 1, "output_refused"),
    ],
)
def test_an_upload_that_never_succeeds_is_our_error_and_repeated_if_that_may_help(
    answer, tries, code
):
    bucket = Bucket(*[answer] * 9)

    with pytest.raises(JobError, match=f"{code}: upload: (HTTP 4|HTTP 5|ConnectError)"):
        bucket.stored([picture()])

    assert len(bucket.uploads) == tries


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


LYING = Image.Exif()
LYING[0x0112] = 6


def in_lab(work: Callable[[Lab], Awaitable[T]]) -> T:
    async def run() -> T:
        lab = Lab()
        try:
            return await work(lab)
        finally:
            lab.close()

    return asyncio.run(run())


# What the preview provider draws.


def test_the_same_wish_draws_the_same_bytes_and_another_another_picture():
    wishes = [
        (prompt, seed) for prompt in ("a lighthouse", "a fox", "a koi pond") for seed in (1, 2)
    ]
    drawn = [draw_preview(prompt, (256, 192), "", seed) for prompt, seed in wishes]

    assert drawn == [draw_preview(prompt, (256, 192), "", seed) for prompt, seed in wishes]
    assert len(set(drawn)) == len(wishes)


@pytest.mark.parametrize("size", [(64, 64), (64, 2048), (2048, 64), (2048, 2048)])
def test_any_prompt_is_drawn_at_any_size_as_one_small_picture(size):
    prompts = [
        *("", "W" * 4000, "a lighthouse, " * 285, "\ufdfa" * 4000),
        *(
            "\0\x1b[31m\r\n\t\x7f\u2028",
            "\U0001f98a\u200d\U0001f525 fox",
            "\u05e9\u05dc\u05d5\u05dd \u202e",
        ),
    ]

    async def act(lab: Lab) -> None:
        lab.lanes = lab.lanes[:1]  # with the memory of a small picture
        for prompt in prompts if size != (2048, 2048) else prompts[2:3]:
            drawn = await lab.draw(prompt, size, "", 7)
            assert Image.open(io.BytesIO(drawn)).size == size

    in_lab(act)


def test_a_source_that_costs_too_much_is_the_users_fault():
    async def act(lab: Lab) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(DEAR)
            async with asyncio.timeout(40):  # ten times as long as it should take
                await worker.Preview(lab, 0, 0).upload("dear.jpg", "image/jpeg", file)

    with pytest.raises(JobError, match="invalid_input: source: takes too much time"):
        in_lab(act)


def test_dear_pictures_are_known_by_their_header_and_do_not_delay_the_others():
    head, _, rest = picture("JPEG").partition(b"\xff\xe0")
    flood = head + b"\xff\xfe\0\2" * 7_000_000 + b"\xff\xe0" + rest  # a header that costs as much

    async def act(lab: Lab) -> None:
        dear = [asyncio.create_task(lab.see(each)) for each in (DEAR, flood)]
        await lab.until_at_work()
        others = [lab.see(picture("PNG", (1024, 768))) for _ in range(4)]

        assert all(found.preview for found in await asyncio.gather(*others))

        assert not dear[0].done()
        assert await asyncio.gather(*dear) == [
            pictures.Picture("JPEG", 3000, 3000, lacks="time"),
            pictures.Picture("JPEG", None, None, lacks="time"),
        ]

    in_lab(act)


def test_large_pictures_at_once_stay_within_the_units_memory():
    async def act(lab: Lab) -> None:
        tasks = [asyncio.create_task(lab.see(large())) for _ in range(4)]
        peak = 0
        while not all(task.done() for task in tasks):
            peak = max(peak, lab.megabytes())
            await asyncio.sleep(0.01)
        assert all(found.preview for found in await asyncio.gather(*tasks))
        assert 200 < peak < 700

    in_lab(act)


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        ("WEBP", (4032, 3024), {}),
        ("JPEG", (8064, 6048), {"exif": LYING}),
        ("JPEG", (8064, 6048), {"exif": LYING, "progressive": True}),
        ("JPEG", (6000, 4000), {"exif": LYING, "progressive": True}),
        ("PNG", (4032, 3024), {"exif": LYING, "compress_level": 1}),
    ],
)
def test_large_photos_are_looked_at_and_turned_within_the_memory_for_one(kind, size, options):
    async def act(lab: Lab) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(
                encoded(Image.linear_gradient("L").resize(size).convert("RGB"), kind, **options)
            )
            assert (await lab.inspect(file, 512)).format == kind
            assert await lab.look_at_source(file) == (kind, not options)
            image = Image.open(file)
            assert (image.width < image.height) == bool(options)
            assert min(image.size) >= 3000

    in_lab(act)


def test_a_picture_that_takes_more_memory_than_there_is_is_stored_all_the_same(monkeypatch):
    monkeypatch.setattr(pictures, "LARGE_BYTES", 110_000_000)

    found = in_lab(lambda lab: lab.see(large()))

    assert found == pictures.Picture("JPEG", 6600, 6000, lacks="memory")


# Of its own, for one that has freed much has that to use beside what it is given. The header seems
# to tell of a smaller picture.
WITH_LITTLE = """
import sys, tempfile, pictures
pictures.weigh = lambda *_: 0
file = tempfile.TemporaryFile()
size = file.write(sys.stdin.buffer.read())
file.flush()
pictures.restrict(size + 1_000_000)
try:
    pictures.inspect_image(file, 512)
except MemoryError:
    sys.exit(7)
"""


def test_memory_that_was_not_foreseen_is_refused():
    data = encoded(plain.resize((7000, 7000)), "PNG", compress_level=1)

    done = subprocess.run([sys.executable, "-c", WITH_LITTLE], cwd=PROJECT, input=data, check=False)

    assert done.returncode == 7


def test_a_picture_dies_alone_and_with_the_job_that_is_stopped():
    async def act(lab: Lab) -> None:
        task = asyncio.create_task(lab.see(DEAR))
        os.kill(await lab.until_at_work(), signal.SIGKILL)
        assert ((found := await task).format, found.lacks) == ("JPEG", "time")
        assert (await lab.see(picture())).blurhash
        os.kill(lab.processes()[0], signal.SIGKILL)
        assert (await lab.see(picture())).blurhash

        task = asyncio.create_task(lab.see(DEAR))
        pid = await lab.until_at_work()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        eventually(lambda: pid not in lab.processes(), within=2)

    in_lab(act)


def test_where_no_process_can_be_had_the_job_waits(monkeypatch):
    monkeypatch.setattr(pictures, "__file__", "nothing")

    with pytest.raises(OSError) as error:
        in_lab(lambda lab: lab.see(picture()))

    assert worker.as_job_error(error.value).code == "worker_full"
