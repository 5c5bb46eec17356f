"""What a file is, by its first bytes: so that a web page, or the pointer to a file, is called what it is."""

from pathlib import Path

LOOK = 512  # bytes

EMPTY, GZIP, PARQUET = "an empty file", "a gzip archive: unpack it first", "a Parquet table"
_BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself: `git lfs pull` fetches it"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: `git annex get` fetches it"),
    (b"PAR1", PARQUET),
    (b"ARROW1", "an Arrow table"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG", "a PNG image"),
    (b"\x1f\x8b", GZIP),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file"),
)
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")
_ANSWERS = (b"entry not found", b"not found", b"404: not found", b"access denied", b"invalid username or password")
_TAR = b"ustar"


def beginning(path: Path) -> bytes:
    """The first bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        return file.read(LOOK)


def mistaken_for(path: Path) -> str | None:
    """What a file is that cannot be what somebody takes it for (a model, vectors, texts): "a Git LFS pointer, ...".

    None for a file that may be anything else, and for none that can be read.
    """
    try:
        first = beginning(path)
    except OSError:
        return None
    if not first:
        return EMPTY
    for magic, name in _BEGINNINGS:
        if first.startswith(magic):
            return name
    if first[257:262] == _TAR:
        return "a tar archive: unpack it first"
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_PAGES):
        return "an HTML page, as a web server answers in place of a file: download it again, with a login if it asks"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML page, as a web server answers in place of a file: download it again"
    if len(first) < 200 and text.strip(b" \t\r\n.!").startswith(_ANSWERS):
        return f"a web server's answer in place of a file, {first.decode(errors='replace').strip()!r}"
    if not first.strip(b"\x00"):
        return f"a file that begins with {len(first)} zero bytes: a download that was cut off, it seems"
    return None
