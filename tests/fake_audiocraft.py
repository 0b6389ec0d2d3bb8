"A clone of AudioCraft in a dozen small files: its `dora` does what a test wants, its `torch` claims to have a card."
import sys
from pathlib import Path

from musiclab.musicgen.clone import NEEDED

TEAM = "default: {dora_dir: /tmp/x, partitions: {global: debug, team: debug}, reference_dir: /tmp/x}\n"
TORCH = """
__version__ = {version!r}
class Card: name, total_memory = "a card", {memory}
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda number: Card)
"""
TRAIN = """
import hashlib, json, os, pathlib, sys, time
settings = dict(one.split("=", 1) for one in sys.argv[2:])
# other settings, another run: as with dora
xp = pathlib.Path(os.environ["AUDIOCRAFT_DORA_DIR"]) / "xps" / hashlib.sha1(repr(sorted(sys.argv[2:])).encode()).hexdigest()[:8]
xp.mkdir(parents=True, exist_ok=True)
past = xp / "history.json"
history = json.loads(past.read_text()) if past.exists() else []
log = (xp / "solver.log.0").open("a")
def say(text): print(f"[\\x1b[36m11-26 12:00:00\\x1b[0m][\\x1b[34mflashy.solver\\x1b[0m][\\x1b[32mINFO\\x1b[0m] - {text}", file=log, flush=True)
epochs, updates = int(settings["optim.epochs"]), int(settings["optim.updates_per_epoch"])
print("starting with", len(history), "epochs", flush=True)
for epoch in range(len(history) + 1, epochs + 1):
    for step in range(updates):
        say(f"Train | Epoch {epoch} | {step}/{updates} | 9 it/sec | lr 1.00E-05 | ce {5 - 0.01 * (epoch * updates + step):.3f} | grad_norm INF")
        PER_STEP
    history.append({"train": {"ce": 4.0 - epoch, "grad_norm": float("nan")}, "valid": {"ce": 4.1 - epoch}})
    say(f"\\x1b[1mTrain Summary | Epoch {epoch} | ce={4.0 - epoch:.3f}\\x1b[0m")
    past.write_text(json.dumps(history))
"""
# a run with a child of its own, neither of which listens to SIGTERM
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"])
out = pathlib.Path(os.environ["AUDIOCRAFT_DORA_DIR"])
(out / "pids.part").write_text(f"{os.getpid()} {child.pid}")
(out / "pids.part").rename(out / "pids")
time.sleep(120)
"""


def train(per_step: str = "pass") -> str: return TRAIN.replace("PER_STEP", per_step)

def write_clone(folder: Path, dora: str | None = None, torch: str = "2.1.0", numpy: str = "1.26.4", memory: int = 25_000_000_000,
                without: tuple = ()) -> Path:
    "Files by their names; those in `without` are left out."
    files = {"audiocraft/train.py": "", "config/config.yaml": "", "config/teams/default.yaml": TEAM, ".git/HEAD": "", "dora/__main__.py": dora or train(),
             "torch/__init__.py": TORCH.format(version=torch, memory=memory), "numpy/__init__.py": f"__version__ = {numpy!r}\n",
             "bin/python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', "bin/ffmpeg": "#!/bin/sh\n"}
    files |= {f"{name}/__init__.py": "" for name in NEEDED if name != "torch"}
    for name, text in files.items():
        if name in without: continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        if name.startswith("bin/"): (folder / name).chmod(0o755)
    return folder
