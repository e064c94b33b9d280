"""The registry of checks: name -> what it needs, what it proves, why it matters."""

from moeadapt.doctor import adapter, base, checkpoint, environment, files
from moeadapt.doctor.finding import Check

_DAMAGED = "loading refuses it"

CHECKS: dict[str, Check] = {
    "python": Check(
        scope="environment",
        line="this Python is supported",
        why="the installed moeadapt names what it supports",
        run=environment.python_version,
    ),
    "packages": Check(
        scope="environment",
        line="torch, peft, transformers and the others are in the supported ranges",
        why="other versions were not tested",
        run=environment.packages,
    ),
    "extras": Check(
        scope="environment",
        line="optional packages that are installed are in the supported ranges",
        why="other versions were not tested",
        run=environment.extras,
    ),
    "gpu": Check(
        scope="environment",
        line="torch was asked what it computes on",
        why="training on a CPU takes long",
        run=environment.gpu,
    ),
    "method": Check(
        scope="environment",
        line="PEFT knows the method, and loads it through the checks",
        why="else adapters are refused, or loaded unchecked",
        run=environment.method,
    ),
    "files": Check(
        scope="folder", line="there is an adapter or a run", why=_DAMAGED, run=files.present
    ),
    "pickles": Check(
        scope="folder",
        line="no pickled files but a trainer's own",
        why="reading one can run code",
        run=files.pickles,
    ),
    "links": Check(scope="folder", line="no link leaves it", why=_DAMAGED, run=files.links),
    "modes": Check(
        scope="folder",
        line="only its owner and group may change it, and the weights are as readable as the rest",
        why="others could exchange it",
        run=files.modes,
    ),
    "leftovers": Check(
        scope="folder", line="no save was cut", why="they take room", run=files.leftovers
    ),
    "settings": Check(
        scope="adapter",
        line="adapter_config.json is plain data of known fields, each in its range",
        why=_DAMAGED,
        run=adapter.settings,
    ),
    "header": Check(
        scope="adapter",
        line="the tensors fill their file, without overlap, hole or rest",
        why=_DAMAGED,
        run=adapter.header,
    ),
    "factors": Check(
        scope="adapter",
        line="no layer lacks a factor that the same layer of another block has",
        why=_DAMAGED,
        run=adapter.factors,
    ),
    "manifest": Check(
        scope="adapter",
        line="the manifest can be read, and this version knows its format",
        why=_DAMAGED,
        run=adapter.manifest,
    ),
    "sha256": Check(
        scope="adapter",
        line="the files are those that the manifest names",
        why=_DAMAGED,
        run=adapter.sha256,
    ),
    "numbers": Check(
        scope="adapter",
        line="no tensor that can be read holds NaN, infinity or numbers that overflow",
        why=_DAMAGED,
        run=adapter.numbers,
    ),
    "checkpoint": Check(
        scope="folder",
        line="no checkpoint in it is broken",
        why="a run could not go on from it",
        run=checkpoint.checkpoints,
    ),
    "base": Check(
        scope="base",
        line="the base is the one it was trained on, as far as can be told",
        why="on another base the answers are wrong",
        run=base.same_base,
    ),
    "fits": Check(
        scope="base",
        line="it loads on this base: names, shapes and types of all tensors fit",
        why=_DAMAGED,
        run=base.fits,
    ),
}
"""In the order in which they are run: later ones use what earlier ones have read."""
