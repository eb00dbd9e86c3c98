from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import wanfast
from wanfast.runtime.config import OPTIONS
from wanfast.runtime.config.effective import PARTS

PACKAGE = Path(wanfast.__file__).parent


def test_an_option_is_a_field_of_one_part() -> None:
    fields = [field.name for part in PARTS.values() for field in dataclasses.fields(part)]
    assert len(fields) == len(set(fields)) and set(fields) - set(OPTIONS) == {
        "image_sha256",
        "continue_from_sha256",
        "continue_from_frames",
        "written_prompts",
        "expert_sha256",
        "last_image_sha256",
        "lora_sha256",
    }


def reads() -> set[tuple[str, str]]:
    """(part, field) of every field that the program reads of a part; in the parts themselves only properties count."""
    short = {"asked": PARTS, "wanted": ["models"], "s": ["skipping"], "settings": ["skipping"], "config": PARTS}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        nodes = list(ast.walk(tree))
        if path.parent.name == "config":
            properties = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list]
            nodes = [node for function in properties for node in ast.walk(function)]
        for node in nodes:
            if path.parent.name == "config" and isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                found |= {(part, node.attr) for part in PARTS}
            elif isinstance(node, ast.Attribute):
                owner = node.value
                name = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                found |= {(part, node.attr) for part in short.get(name, [name])}
    return found


def test_every_field_is_read_by_the_program() -> None:
    """No flag that silently does nothing."""
    fields = {(name, field.name) for name, part in PARTS.items() for field in dataclasses.fields(part)}
    assert fields - reads() == set()
