"""Writes a pack of three photographs that are installed with scikit-image, as `training/photographs.py` packs them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

PICTURES = {"astronaut": data.astronaut, "coffee": data.coffee, "chelsea": data.chelsea}


def write_pack(file: Path) -> Path:
    """Writes the pack; all pictures but the coffee are held out."""
    entries = []
    with zipfile.ZipFile(file, "w") as archive:
        for name, picture in PICTURES.items():
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(picture())).save(buffer, "JPEG", quality=95)
            archive.writestr(f"{name}.jpg", buffer.getvalue())
            entries.append({"name": name, "held_out": name != "coffee"})
        archive.writestr("manifest.json", json.dumps(entries))
    return file
