"""Law: imports go one way (rooms are ordered; a module imports only from its own room or an earlier one)."""

import ast
from pathlib import Path

import lwd_jax

ROOT = Path(lwd_jax.__file__).parent
LEVELS = [
    {"errors", "shapes", "config", "files"},
    {"nn", "weights", "objective"},
    {"autoencoders", "backbones", "adapters"},
    {"data", "parallel"},
    {"train"},
    {"plan", "sample"},
    {"evaluate", "report"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Rooms of one level that may also read each other, in this direction only.
SIDEWAYS = {
    ("config", "errors"),
    ("shapes", "errors"),
    ("files", "errors"),
    ("report", "evaluate"),
}


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lwd_jax" and len(parts) > 1 and parts[1] in LEVEL:
                yield parts[1]


def test_imports_go_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in LEVEL, f"{path} is in no room of the house"
        for other in imported_rooms(path):
            if room != other and LEVEL[other] >= LEVEL[room] and (room, other) not in SIDEWAYS:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_objective_knows_no_model():
    for path in (ROOT / "objective").rglob("*.py"):
        assert not set(imported_rooms(path)) & {"nn", "weights"}, path


def test_sampling_knows_no_training():
    """Said outright, whatever the levels: the loop is handed what makes previews."""
    for path in (ROOT / "sample").rglob("*.py"):
        assert "train" not in set(imported_rooms(path)), path


def test_files_stay_readable():
    long = {str(p): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) >= 500}
    assert not long, long
    assert not [p for p in ROOT.rglob("*.py") if p.stem in ("utils", "helpers", "common")]
